"""Turn a GGUF file into an ordinary safetensors checkpoint, once, and keep it.

Training needs weights that torch can read, and a GGUF takes transformers half a
minute and more to unpack. The folder appears only when it is complete and has been
loaded again: same logits, and the same tokens as the GGUF's own runtime gives.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from arte_edge.cache import (
    FULL_MARKS,
    DiskFull,
    Progress,
    check_room,
    full_disk_is_clear,
    home,
    locked,
    publish,
    room,
    slug,
)
from arte_edge.errors import ArteError, InputError
from arte_edge.extras import need
from arte_edge.models.gguf_header import read_header

__all__ = ["VERSION", "checkpoint_folder", "to_checkpoint"]

# Part of the folder's name: raised when the conversion changes, so that old results are not taken for new.
VERSION = 1


def checkpoint_folder(name: str, sha256: str) -> Path:
    """Return where the checkpoint of a GGUF with this sum is kept; it need not exist."""
    return home() / "checkpoints" / f"{slug(name)}-{sha256[:16]}-v{VERSION}"


def to_checkpoint(name: str, gguf: Path, sha256: str, progress: Progress | None = None) -> Path:
    """Return the bfloat16 safetensors checkpoint of `gguf`, converting it if that was never done.

    Raises:
        InputError: an architecture that transformers cannot read from GGUF.
        ArteError: packages are missing, the disk or the memory is too small, or the result does not hold.
    """
    final = checkpoint_folder(name, sha256)
    if final.is_dir():
        return final
    need("train", "Converting a GGUF to a checkpoint")
    need("gguf", "Converting a GGUF to a checkpoint")
    with locked(final.name, progress):
        if final.is_dir():  # another process was first
            return final
        header = read_header(gguf)
        what = f"the checkpoint of '{name}'"
        for left_over in room("staging").glob(f"{final.name}.*"):
            shutil.rmtree(left_over, ignore_errors=True)  # a conversion cannot be gone on with
        staging = Path(tempfile.mkdtemp(dir=room("staging"), prefix=f"{final.name}."))
        try:
            with full_disk_is_clear(staging, what):
                check_room(staging, 2 * header.parameter_count, what)
                _run_child(gguf, staging, what, progress)
                origin = {"gguf": gguf.name, "sha256": sha256, "quantization": header.quantization}
                (staging / "origin.json").write_text(json.dumps(origin, indent=1) + "\n", "utf-8")
                staging.chmod(0o755)  # mkdtemp's folder would be closed to other users of a shared cache
                publish(staging, final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return final


def _run_child(gguf: Path, out: Path, what: str, progress: Progress | None) -> None:
    """Run `arte_edge.models.unpack` and pass its steps to `progress`, its errors to the caller."""
    command = [sys.executable, "-m", "arte_edge.models.unpack", str(gguf.absolute()), str(out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    failure: dict[str, str] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as chatter:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=chatter,
            text=True,
            env=environment,
        )
        try:
            for line in child.stdout or ():
                said = json.loads(line)
                if progress and "step" in said:
                    progress(said["step"], 0, 0)
                failure = said if "error" in said else failure
        finally:
            if child.poll() is None and sys.exc_info()[0] is not None:
                child.kill()
            code = child.wait()
        chatter.seek(0)
        words = chatter.read()
    if code == 0:
        return
    if any(mark in words + failure.get("error", "") for mark in FULL_MARKS):
        raise DiskFull(out.parent, what)
    if failure:
        raise (InputError if code == InputError.exit_code else ArteError)(failure["error"], failure["hint"])
    if code == -9:
        raise ArteError(
            f"Making {what} was killed by the system, most likely for lack of memory",
            "It needs about three times the size of the checkpoint, which has two bytes a parameter.",
        )
    last = (words.strip().splitlines() or ["no message"])[-1]
    raise ArteError(f"Making {what} failed: {last[:300]}", "Please report this with the model's name.")
