"""What a bug report needs to know about this installation, and nothing private.

Versions, processor, memory and which optional parts are installed. No user or host name, no path,
no environment variable's value: only the names of our own variables that are set.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from arte_edge import __version__
from arte_edge.extras import EXTRAS, missing_modules

__all__ = ["Environment", "environment"]

_PACKAGES = (
    *("llama-cpp-python", "gguf", "xllamacpp", "onnxruntime", "onnxruntime-genai", "onnx", "optimum-onnx"),
    *("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("huggingface-hub", "numpy", "pydantic", "typer", "rich"),
)
# Their values may hold paths and secrets, so only the names are shown.
_PREFIXES = ("ARTE_EDGE_", "HF_", "TRANSFORMERS_", "LLAMA_", "GGML_", "ORT_", "OMP_", "CUDA_VISIBLE")


@dataclass(frozen=True)
class Environment:
    """This installation. `packages` maps a package to its version; absent ones are left out."""

    arte_edge: str
    python: str
    system: str  # as in "Linux 6.1 x86_64"
    processor: str
    cores: int
    memory_bytes: int
    packages: dict[str, str]
    extras: dict[str, str]  # extra -> "installed" or the modules that are missing
    variables: tuple[str, ...]  # names of variables that are set and change behaviour

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the environment as text, 80 columns wide where the versions allow it."""
        rows = [
            ("arte-edge", self.arte_edge),
            ("python", self.python),
            ("system", self.system),
            ("processor", f"{self.processor}, {self.cores} cores, {self.memory_bytes / 2**30:.1f} GiB"),
            *self.packages.items(),
            *((f"[{extra}]", state) for extra, state in self.extras.items()),
            ("variables", ", ".join(self.variables) or "none"),
        ]
        return [f"{name:<18} {value}" for name, value in rows]


def environment() -> Environment:
    """Return what this installation consists of; loads none of the packages it names."""
    from arte_edge.device.detect import detect

    facts = detect()
    missing = {extra: missing_modules(extra) for extra in EXTRAS}
    return Environment(
        arte_edge=__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=f"{facts.os} {facts.arch}",
        processor=facts.cpu,
        cores=facts.cores,
        memory_bytes=facts.memory_bytes,
        packages={name: found for name in _PACKAGES if (found := _version(name))},
        extras={e: f"without {', '.join(gone)}" if gone else "installed" for e, gone in missing.items()},
        variables=tuple(sorted(name for name in os.environ if name.startswith(_PREFIXES))),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
