"""A folder of ONNX files that appears whole or not at all, and says nothing about this machine.

An export is built below a name that no reader looks at, checked there, and renamed into place.
What a killed export left is removed by the next one to the same place.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from arte_edge.cache import cleanup_on_full_disk, locked, rename_into_place
from arte_edge.errors import ArteError, InputError
from arte_edge.pii_scan import first_held, this_machine

__all__ = [
    "TOKENIZER_FILES",
    "checkpoint_files",
    "copy_tokenizer",
    "leaks",
    "refuse_leaks",
    "staged",
]

# Whatever a tokenizer may consist of: copied byte for byte where the checkpoint has it.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that takes the place of `out` when the block ends well.

    Only one process at a time builds `out`. A folder that stands there is replaced.

    Raises:
        InputError: `out` is a file, or a folder that holds something other than an export.
        ArteError: the disk is full, or the system refuses.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and (_is_export(out) or not any(out.iterdir()))):
        raise InputError(f"{out} exists and is no ONNX export", "Name another folder, or remove it yourself.")
    with locked(f"onnx-{sha256(str(out).encode()).hexdigest()[:24]}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f".{out.name}.*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        try:
            with cleanup_on_full_disk(staging, out.name):
                (staging / "whole").mkdir()
                yield staging / "whole"
                if out.exists():  # a folder cannot be renamed over one that holds files
                    out.replace(staging / "old")
                rename_into_place(staging / "whole", out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _is_export(folder: Path) -> bool:
    return (folder / "genai_config.json").is_file() or (folder / "onnx").is_dir()


def checkpoint_files(checkpoint: Path) -> list[Path]:
    """Return the weight files of a checkpoint folder.

    Raises:
        InputError: it is no folder with a config, safetensors weights and a tokenizer.json.
    """
    weights = sorted(checkpoint.glob("*.safetensors"))
    missing = [name for name in ("config.json", "tokenizer.json") if not (checkpoint / name).is_file()]
    if not weights:
        missing.append("*.safetensors")
    if missing:
        raise InputError(
            f"{checkpoint} is no checkpoint that can be exported: it has no {', '.join(missing)}",
            "Give a folder as transformers writes it. Adapters and GGUF files are turned into one first.",
        )
    return weights


def copy_tokenizer(checkpoint: Path, folder: Path) -> list[str]:
    """Make the tokenizer files of `folder` those of `checkpoint`, byte for byte; return their names.

    A tokenizer that was loaded and saved again may come back changed, and a file that only the
    saving made (a template moved into a file of its own, say) may contradict the others.
    """
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    names = [name for name in TOKENIZER_FILES if (checkpoint / name).is_file()]
    for name in names:
        shutil.copyfile(checkpoint / name, folder / name)
    return names


def leaks(folder: Path, texts: Sequence[str], besides: Sequence[str] = ()) -> dict[str, str]:
    """Return the first of `texts` that each file below `folder` holds, by the file's name there.

    Args:
        besides: names of files to skip: those of the base model.
    """
    names = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    held = {name: first_held(path, texts) for name, path in names.items() if name not in besides}
    return {name: text for name, text in held.items() if text}


def refuse_leaks(folder: Path, checkpoint: Path, besides: Sequence[str] = ()) -> None:
    """Raise if a file below `folder` names a path of this machine.

    Raises:
        ArteError: with the files and the paths.
    """
    if found := leaks(folder, this_machine().private_paths(checkpoint, folder.parent), besides):
        told = ", ".join(f"{name} ({held})" for name, held in found.items())
        raise ArteError(f"The exporter wrote paths of this machine into {told}", "Please report this.")
