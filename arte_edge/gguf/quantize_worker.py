"""Call ``llama_model_quantize`` in a process of its own.

llama.cpp aborts the whole process on a file that it does not expect, cannot be interrupted, and keeps its
buffers. In a child an abort becomes an error with a reason, Ctrl-C works at once, and the memory is returned.
The child reads a job as JSON from its standard input and answers with llama.cpp's log as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arte_edge.errors import ArteError

__all__ = ["QuantJob", "run_job"]

# Rows of one tensor kept in memory at once. llama.cpp's own default is 8 GiB; the speed is the same.
_BUFFER_BYTES = 256 * 1024**2
_STRING, _INT = 3, 0  # LLAMA_KV_OVERRIDE_TYPE_STR, _INT
_TEXT_BYTES = 127  # an overriding string lives in char[128]


@dataclass(frozen=True)
class QuantJob:
    """What to quantize to what. `tensor_types` holds ggml numbers by exact tensor name."""

    source: str
    out: str
    number: int
    threads: int
    imatrix: str | None = None
    tensor_types: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str | int] = field(default_factory=dict)


def run_job(job: QuantJob) -> str:
    """Quantize in a child process; return llama.cpp's log.

    Raises:
        ArteError: llama.cpp rejected the file or crashed; the message has the reason.
    """
    command = [sys.executable, "-P", "-m", "arte_edge.gguf.quantize_worker"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    child = subprocess.run(
        command, input=json.dumps(asdict(job)).encode(), capture_output=True, env=environment, check=False
    )
    if child.returncode == -9:
        raise ArteError(
            f"Quantizing {Path(job.source).name} was killed by the system, most likely for lack of memory"
        )
    try:
        answer: dict[str, Any] = json.loads(child.stdout)
    except ValueError:
        output = child.stderr.decode(errors="replace").strip().splitlines() or [f"exit {child.returncode}"]
        reason = next((line for line in output if "GGML_ASSERT" in line or "Error" in line), output[-1])
        raise ArteError(
            f"{Path(job.source).name}: llama.cpp crashed while quantizing: {reason[:300]}",
            "Check the file's sha256; a model of a new family may need a newer llama-cpp-python.",
        ) from None
    log = str(answer["log"])
    if answer["status"] != 0:
        marks = ("failed to quantize:", "error", "ERROR")
        lines = log.splitlines()
        reason = next(
            (line for mark in marks for line in lines if mark in line), f"status {answer['status']}"
        )
        reason = reason.partition("failed to quantize: ")[2] or reason
        raise ArteError(f"{Path(job.source).name}: llama.cpp cannot quantize it: {reason.strip()[:300]}")
    return log


def _quantize(job: QuantJob) -> dict[str, Any]:
    """Fill the C structures, make the call, and return its status and log."""
    import llama_cpp as lib

    lines: list[str] = []
    listen = lib.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
    lib.llama_log_set(listen, ctypes.c_void_p())
    lib.llama_backend_init()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = job.number, job.threads
    params.max_buf_size = _BUFFER_BYTES
    # Arrays end with an empty element; every array and string must live until the call is over.
    if job.tensor_types:
        types = (lib.llama_model_tensor_override * (len(job.tensor_types) + 1))()
        for slot, (name, number) in zip(types, job.tensor_types.items(), strict=False):
            slot.pattern, slot.type = f"^{name.replace('.', '[.]')}$".encode(), number
        params.tt_overrides = types
    if job.metadata:
        pairs = (lib.llama_model_kv_override * (len(job.metadata) + 1))()
        for slot, (key, value) in zip(pairs, job.metadata.items(), strict=False):
            slot.key = key.encode()
            if isinstance(value, str):
                slot.tag, slot.value.val_str = _STRING, _clipped(value)
            else:
                slot.tag, slot.value.val_i64 = _INT, value
        params.kv_overrides = pairs
    if job.imatrix is not None:
        from arte_edge.gguf.imatrix import read_imatrix

        weights = read_imatrix(Path(job.imatrix)).weights()
        entries = (lib.llama_model_imatrix_data * (len(weights) + 1))()
        for slot, (name, values) in zip(entries, weights.items(), strict=False):
            slot.name, slot.size = name.encode(), values.size
            slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    status = lib.llama_model_quantize(os.fsencode(job.source), os.fsencode(job.out), ctypes.byref(params))
    return {"status": int(status), "log": "".join(lines)}


def _clipped(text: str) -> bytes:
    """Return `text` in at most `_TEXT_BYTES` bytes of UTF-8, cut between characters."""
    return text.encode()[:_TEXT_BYTES].decode(errors="ignore").encode()


if __name__ == "__main__":
    print(json.dumps(_quantize(QuantJob(**json.load(sys.stdin)))))
