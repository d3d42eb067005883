"""Right answers on the device: `quality.measure_quality` in a child process of its own, like any other case.

The 16-bit file of an export is measured first, and the others are paired with its answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arte_edge.bench.case import Split, default_threads
from arte_edge.bench.isolate import run_child
from arte_edge.bench.runtimes.open import choose_runtime
from arte_edge.bench.targets import Target, describe
from arte_edge.results.rows import DeviceFacts, QualityRow

if TYPE_CHECKING:
    from arte_edge.bench.case import Reporter

__all__ = ["measure_request", "run_quality"]

_SIXTEEN_BITS = ("F16", "BF16", "F32", "fp32", "fp16")


def run_quality(
    models: Sequence[Path],
    task: str,
    *,
    split: Split = "test",
    limit: int = 0,
    bbh: Path | None = None,
    threads: int = 0,
    timeout_s: float = 7200.0,
    device: DeviceFacts,
    reporter: Reporter,
    on_row: Callable[[QualityRow], None],
) -> list[QualityRow]:
    """Let every model answer the task's examples and return the rows, those of failures included.

    Args:
        task: a shipped name or a folder.
        limit: examples at most; 0: all.
        threads: 0: one for each core worth using.
        timeout_s: of one model.

    Raises:
        InputError: no such task, or not a model.
    """
    from arte_edge.tasks.loaders import load_task

    loaded = load_task(task, bbh=bbh)  # refused here, and not once a model
    targets = sorted((describe(path) for path in models), key=lambda t: t.quantization not in _SIXTEEN_BITS)
    threads = threads or default_threads(device)
    reference: QualityRow | None = None
    rows: list[QualityRow] = []
    for number, target in enumerate(targets, 1):
        request = {
            "kind": "quality",
            "path": str(target.path),
            "task": task,
            "bbh": str(bbh) if bbh else None,
            "split": split,
            "limit": limit,
            "threads": threads,
            "device": device.model_dump(mode="json"),
            "reference": None if reference is None else reference.model_dump(mode="json"),
        }
        label = f"{number}/{len(targets)} {target.model_filename} {loaded.name}"

        def show(what: str, done: int, total: int, label: str = label) -> None:
            reporter.progress(f"{label}: {what} {done}/{total}" if total else f"{label}: {what}")

        row = _row(target, run_child(request, timeout_s, show), loaded.name, split, threads, device)
        if reference is None and row.status == "ok" and target.quantization in _SIXTEEN_BITS:
            reference = row
        rows.append(row)
        on_row(row)
    return rows


def _row(
    target: Target, answer: dict[str, Any], task: str, split: Split, threads: int, device: DeviceFacts
) -> QualityRow:
    if "row" in answer:
        row = QualityRow.model_validate_json(json.dumps(answer["row"]))
        return row.model_copy(
            update={
                "sha256": row.sha256 or target.sha256,
                "tensor_sha256": row.tensor_sha256 or target.tensor_sha256,
                "quantization": row.quantization or target.quantization,
            }
        )
    return QualityRow(
        status=answer["status"],
        reason=answer["reason"],
        model_filename=target.model_filename,
        format=target.format,
        quantization=target.quantization,
        sha256=target.sha256,
        tensor_sha256=target.tensor_sha256,
        runtime=choose_runtime(target.path),
        n_threads=threads,
        task=task,
        split=split,
        n=0,
        right=0,
        accuracy=0.0,
        low=0.0,
        high=1.0,
        device=device,
    )


def measure_request(request: dict[str, Any], say: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Answer a request of `run_quality` in the child process."""
    from arte_edge.bench.quality import measure_quality
    from arte_edge.tasks.loaders import load_task

    say("loading", 0, 0)
    told = request["reference"]
    row = measure_quality(
        Path(request["path"]),
        load_task(request["task"], bbh=Path(request["bbh"]) if request["bbh"] else None),
        split=request["split"],
        limit=request["limit"],
        reference=None if told is None else QualityRow.model_validate_json(json.dumps(told)),
        threads=request["threads"],
        device=DeviceFacts.model_validate_json(json.dumps(request["device"])),
        progress=say,
    )
    return {"row": row.model_dump(mode="json")}
