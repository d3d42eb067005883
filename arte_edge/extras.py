"""Optional dependencies: check them, and name the pip command that installs missing ones."""

from __future__ import annotations

from importlib.util import find_spec

from arte_edge.errors import ArteError

# extra -> the modules it must provide; the keys are the extras of pyproject.toml
EXTRAS = {
    "train": ("torch", "transformers", "trl", "peft", "datasets", "pyarrow", "accelerate", "scipy", "rouge_score"),
    "gguf": ("llama_cpp", "gguf"),
    "onnx": ("onnxruntime", "onnxruntime_genai", "onnx", "onnx_ir", "tokenizers"),
    "optimum": ("optimum",),
    "xllamacpp": ("xllamacpp",),
    "cluster": ("ray",),
    "qlora": ("bitsandbytes",),
}


def missing_modules(extra: str) -> list[str]:
    """Return the modules of `extra` that are not installed."""
    return [module for module in EXTRAS[extra] if find_spec(module) is None]


def need(extra: str, why: str) -> None:
    """Raise `ArteError` with the pip command if a module of `extra` is not installed. Imports none of them."""
    if missing := missing_modules(extra):
        raise ArteError(
            f"{why} needs {', '.join(missing)}, which is not installed", f"pip install 'arte-edge[{extra}]'"
        )
