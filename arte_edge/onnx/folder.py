"""Write an ONNX folder atomically and without paths of this machine.

An export is built under a temporary name, checked, and renamed. What a killed process left is removed by the
next export to the same place.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from arte_edge.cache import cleanup_on_full_disk, locked, rename_into_place
from arte_edge.errors import ArteError, InputError
from arte_edge.model_folder import TOKENIZER_FILES, look
from arte_edge.pii_scan import first_held, this_machine


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `out` when the block succeeds. One process at a time builds `out`.

    Raises InputError: `out` is a file, or a folder that is not an export;
    ArteError: the disk is full or not writable.
    """
    out = out.absolute()
    is_export = (out / "genai_config.json").is_file() or (out / "onnx").is_dir()
    if out.exists() and not (is_export or (out.is_dir() and not any(out.iterdir()))):
        raise InputError(f"{out} exists and is not an ONNX export", "Choose another folder, or remove it.")
    with locked("onnx", of=out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for leftover in out.parent.glob(f".{out.name}.*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        try:
            with cleanup_on_full_disk(staging, out.name):
                (staging / "complete").mkdir()
                yield staging / "complete"
                if out.exists():  # a folder cannot be renamed over one that holds files
                    out.replace(staging / "old")
                rename_into_place(staging / "complete", out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def checkpoint_files(checkpoint: Path) -> list[Path]:
    """Return the weight files of a checkpoint folder, with their index.

    Raises InputError: what `look` raises, or tokenizer.json is missing.
    """
    found = look(checkpoint)
    if found.kind != "checkpoint" or not (checkpoint / "tokenizer.json").is_file():
        raise InputError(f"{checkpoint}: no checkpoint with a tokenizer.json", "Save both with transformers.")
    index = checkpoint / "model.safetensors.index.json"
    return [*found.weights, *([index] if found.tensors else [])]


def copy_tokenizer(checkpoint: Path, folder: Path) -> list[str]:
    """Replace the tokenizer files of `folder` by those of `checkpoint`, byte for byte; return their names.

    Loading and saving a tokenizer may change it, and files that only saving creates may contradict the others.
    """
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    names = [name for name in TOKENIZER_FILES if (checkpoint / name).is_file()]
    for name in names:
        shutil.copyfile(checkpoint / name, folder / name)
    return names


def find_private_text(folder: Path, texts: Sequence[str], skip: Sequence[str] = ()) -> dict[str, str]:
    """Return the first of `texts` found in each file below `folder`, by file name; files in `skip` are not read."""
    names = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    held = {name: first_held(path, texts) for name, path in names.items() if name not in skip}
    return {name: text for name, text in held.items() if text}


def reject_private_text(folder: Path, checkpoint: Path, skip: Sequence[str] = ()) -> None:
    """Raise `ArteError` if a file below `folder` contains a path of this machine."""
    if found := find_private_text(folder, this_machine().private_paths(checkpoint, folder.parent), skip):
        files = ", ".join(f"{name} ({text})" for name, text in found.items())
        raise ArteError(f"The exporter wrote paths of this machine into {files}", "Please report this.")
