"""Convert through the user's own checkout of llama.cpp, for models that we have no family of.

Its `convert_hf_to_gguf.py` runs as a process of its own with this Python; it needs
torch and transformers, and whatever its requirements file lists. The file appears
under its name only after its head was read back and says what was asked for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from arte_edge.cache import whole_file
from arte_edge.errors import ArteError, InputError
from arte_edge.models.gguf_header import read_header
from arte_edge.models.gguf_write import FILE_TYPES

__all__ = ["SCRIPT", "convert_with"]

SCRIPT = "convert_hf_to_gguf.py"
_SHOWN_LINES = 3


def convert_with(llama_cpp: Path, checkpoint: Path, out: Path, dtype: str = "F16") -> Path:
    """Write the model in `checkpoint` to the GGUF file `out` by the converter in `llama_cpp`; return `out`.

    Raises:
        InputError: `llama_cpp` has no converter, or `checkpoint` is no folder.
        ArteError: the converter failed, or what it wrote is not a GGUF of type `dtype`.
    """
    script = llama_cpp / SCRIPT
    if not script.is_file():
        raise InputError(f"{llama_cpp}: no {SCRIPT} there", "Give the folder of a checkout of llama.cpp.")
    if dtype not in FILE_TYPES:
        raise InputError(f"'{dtype}' is not a type to convert to", f"Choose from {', '.join(FILE_TYPES)}.")
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: no such folder", "Give a transformers checkpoint.")
    # The script fills {…} in names itself, and adds nothing to a name without one.
    partial = out.with_name(f".{out.name}.partial".replace("{", "_").replace("}", "_"))
    command = [sys.executable, str(script.absolute()), str(checkpoint.absolute())]
    command += ["--outfile", str(partial.absolute()), "--outtype", dtype.lower()]
    with whole_file(out, partial):
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"},
            check=False,
        )
        if done.returncode != 0 or not partial.is_file():
            raise _failure(script, done)
        _check(script, partial, dtype)
    return out


def _failure(script: Path, done: subprocess.CompletedProcess[str]) -> ArteError:
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    said = " / ".join(lines[-_SHOWN_LINES:])[:500] or "no message"
    hint = f"Run it by hand to see all it says: python {script.name} CHECKPOINT."
    if "ModuleNotFoundError" in said or "ImportError" in said:
        hint = f"Install what it needs: pip install -r {script.parent / 'requirements.txt'}"
    return ArteError(f"{script} ended with code {done.returncode}: {said}", hint)


def _check(script: Path, partial: Path, dtype: str) -> None:
    """Raise unless the file is a whole GGUF whose matrices are of type `dtype`."""
    try:
        header = read_header(partial)
    except InputError as error:
        raise ArteError(f"{script} wrote no usable GGUF: {error.message}", error.hint) from error
    if header.metadata.get("general.file_type") != FILE_TYPES[dtype]:
        raise ArteError(f"{script} wrote {header.quantization} instead of {dtype}", "Update the checkout.")
