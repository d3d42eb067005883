"""``arte-edge env``: what a bug report needs to know about this installation, and nothing private.

Versions, processor, memory and which optional parts are installed. No user or host name, no path,
no environment variable's value: only the names of our own variables that are set.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from arte_edge import __version__
from arte_edge.console import emit_json, out
from arte_edge.extras import EXTRAS, missing_modules

_PACKAGES = (
    *("llama-cpp-python", "gguf", "xllamacpp", "onnxruntime", "onnxruntime-genai", "onnx", "optimum-onnx"),
    *("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("huggingface-hub", "numpy", "pydantic", "typer", "rich"),
)
# Their values may hold paths and secrets, so only the names are shown.
_PREFIXES = ("ARTE_EDGE_", "HF_", "TRANSFORMERS_", "LLAMA_", "GGML_", "ORT_", "OMP_", "CUDA_VISIBLE")


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions and hardware for a bug report.

    The output contains nothing private.
    """
    found = environment()
    if as_json:
        emit_json(found)
        return
    rows = {"arte-edge": found["arte_edge"], "python": found["python"], "system": found["system"]}
    memory = f"{found['memory_bytes'] / 2**30:.1f} GiB"
    rows["processor"] = f"{found['processor']}, {found['cores']} cores, {memory}"
    rows |= found["packages"] | {f"[{extra}]": state for extra, state in found["extras"].items()}
    rows["variables"] = ", ".join(found["variables"]) or "none"
    out.print("\n".join(f"{name:<18} {value}" for name, value in rows.items()), soft_wrap=True)


def environment() -> dict[str, Any]:
    """Return what this installation consists of, by key; loads none of the packages it names.

    `packages` maps a package to its version, absent ones are left out; `extras` an extra to "installed" or the
    modules that are missing; `variables` are the names of those that are set and change behaviour.
    """
    from arte_edge.device.detect import detect

    facts = detect()
    missing = {extra: missing_modules(extra) for extra in EXTRAS}
    return {
        "arte_edge": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{facts.os} {facts.arch}",
        "processor": facts.cpu,
        "cores": facts.cores,
        "memory_bytes": facts.memory_bytes,
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "extras": {e: f"without {', '.join(gone)}" if gone else "installed" for e, gone in missing.items()},
        "variables": sorted(name for name in os.environ if name.startswith(_PREFIXES)),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
