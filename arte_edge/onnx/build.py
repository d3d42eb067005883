"""Build an ONNX folder: in a child process without network access, atomically, without paths of this machine.

The exporters print a lot, keep gigabytes until they end, and read the Hub, shell settings and the git
repository around them. A child process frees the memory, its environment disables the network, and the end
of its log becomes the error message. An export is built under a temporary name, checked, and renamed. What a
killed process left is removed by the next export to the same place.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arte_edge.cache import cleanup_on_full_disk, locked, rename_into_place
from arte_edge.errors import ArteError, InputError
from arte_edge.model_folder import TOKENIZER_FILES, look
from arte_edge.pii_scan import first_held, this_machine

_WORKER = Path(__file__).with_name("worker.py")
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTHONIOENCODING": "utf-8",
    # The builder writes the commit of the surrounding repository into the model, which may be the user's own.
    "GIT_DIR": os.devnull,
}
_SHOWN_LINES = 12


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
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    held = {name: first_held(path, texts) for name, path in names.items() if name not in skip}
    return {name: text for name, text in held.items() if text}


def reject_private_text(folder: Path, checkpoint: Path, skip: Sequence[str] = ()) -> None:
    """Raise `ArteError` if a file below `folder` contains a path of this machine."""
    if found := find_private_text(folder, this_machine().private_paths(checkpoint, folder.parent), skip):
        files = ", ".join(f"{name} ({text})" for name, text in found.items())
        raise ArteError(f"The exporter wrote paths of this machine into {files}", "Please report this.")


def child_environment() -> dict[str, str]:
    """Return this process's environment with network access disabled for exporters."""
    return {**os.environ, **_OFFLINE}


def run_worker(job: Mapping[str, Any], folder: Path, *, python: str = sys.executable, what: str) -> None:
    """Run one job of `worker.py` in `python`, with its log in ``folder/log.txt``.

    `folder` is where the child works and puts its temporary files, `what` the subject of the error message.

    Raises ArteError: it failed; with the last lines of its log.
    """
    log_path = folder / "log.txt"
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {**child_environment(), "TMPDIR": str(temporary), "TEMP": str(temporary)}
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            [python, "-P", str(_WORKER)],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        assert child.stdin is not None
        try:
            try:
                child.stdin.write(json.dumps(dict(job)).encode() + b"\n")
                child.stdin.flush()  # and left open: the child ends when this pipe closes
            except BrokenPipeError:
                pass  # it failed at start: see its log
            code = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            child.stdin.close()
    if code != 0:
        raise ArteError(f"{what} failed (exit {code}):\n{_log_tail(log_path)}", _hint(code))


def _log_tail(log: Path) -> str:
    """Return the last lines of a log, of progress bars only the last state."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
    return "\n".join(["  " + line for line in lines if line.strip()][-_SHOWN_LINES:]) or "  no output"


def _hint(code: int) -> str:
    if code in (-9, 137):
        return "The system killed it, most likely because memory ran out: close programs or use a smaller model."
    return "Nothing was written. `arte-edge --debug` shows the traceback."
