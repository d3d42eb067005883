"""From models and settings to rows: one child process a case, the sweep goes on whatever becomes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from arte_edge.bench.case import BenchSettings, Case, cases
from arte_edge.bench.isolate import run_child
from arte_edge.bench.result import DeviceFacts, SpeedRow
from arte_edge.bench.runtimes.open import choose_runtime
from arte_edge.bench.targets import Target, describe
from arte_edge.errors import ArteError

__all__ = ["Reporter", "run_bench", "run_case"]

OnRow = Callable[[SpeedRow], None]


class Reporter(Protocol):
    """What says how far things are."""

    def progress(self, text: str) -> None:
        """Show what is being done now, in place of what was."""


def run_bench(
    models: Sequence[Path],
    settings: BenchSettings,
    *,
    device: DeviceFacts,
    reporter: Reporter,
    on_row: OnRow,
) -> list[SpeedRow]:
    """Measure every case of every model and return the rows, those of failures included.

    Args:
        models: files and folders, see `targets.find_targets`.
        on_row: called with each row as soon as it is there.

    Raises:
        InputError: a model is damaged or not one; nothing has been measured then.
    """
    targets = [describe(path) for path in models]
    for target in targets:
        choose_runtime(target.path, settings.runtime)
    todo = [(target, case) for target in targets for case in cases(target.path, settings, device)]
    rows: list[SpeedRow] = []
    for number, (target, case) in enumerate(todo, 1):
        label = f"{number}/{len(todo)} {target.model_filename} {case.test}, {case.threads} threads"

        def show(text: str, label: str = label) -> None:
            reporter.progress(f"{label}: {text}")

        row = run_case(target, case, device, show)
        rows.append(row)
        on_row(row)
    return rows


def run_case(
    target: Target, case: Case, device: DeviceFacts, progress: Callable[[str], None] | None = None
) -> SpeedRow:
    """Measure one case in a child process of its own and return its row, whatever becomes of it."""
    base = _base(target, case, device)
    if refusal := _does_not_fit(target, case, device):
        return SpeedRow(**base, status="refused", reason=refusal)

    def show(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{what} {done}/{total}" if total else what)

    request = {"kind": "speed", "case": json.loads(case.model_dump_json())}
    timeout_s = case.timeout_s + case.sustained_s + case.delay_s
    answer = {key: value for key, value in run_child(request, timeout_s, show).items() if value is not None}
    measured = answer.get("status", "ok") == "ok"
    foretold = _expected(target, case) if measured and case.roofline else {}
    return SpeedRow(**base | foretold | answer)


def _base(target: Target, case: Case, device: DeviceFacts) -> dict[str, Any]:
    """Return the fields that are known before anything runs."""
    return {
        "test": case.test,
        "model_filename": target.model_filename,
        "model_type": target.model_type,
        "model_size": target.model_size,
        "model_n_params": target.model_n_params,
        "format": target.format,
        "quantization": target.quantization,
        "sha256": target.sha256,
        "tensor_sha256": target.tensor_sha256,
        "runtime": choose_runtime(case.path, case.runtime),
        "n_threads": case.threads,
        "type_k": case.type_k if target.format == "gguf" else "",
        "type_v": case.type_v if target.format == "gguf" else "",
        "n_prompt": case.n_prompt,
        "n_gen": case.n_gen,
        "n_depth": case.n_depth,
        "device": device,
    }


def _does_not_fit(target: Target, case: Case, device: DeviceFacts) -> str:
    """Return why this case would run out of memory, with what would help; empty if it should fit."""
    if target.format == "null":
        return ""
    from arte_edge.device.fit import fit, refuse, repacked_types
    from arte_edge.device.memory import available_bytes
    from arte_edge.device.shape import ModelShape

    try:
        shape = ModelShape.of(target.path)
    except ArteError:
        return ""
    repacked = repacked_types(device.arch, device.features)
    found = fit(shape, available_bytes(), case.context_tokens, repacked=repacked)
    if found.verdict != "no":
        return ""
    error = refuse(shape, found, "this device")
    return f"{error.message}. {error.hint}"


def _expected(target: Target, case: Case) -> dict[str, Any]:
    """Return what the roofline foretells of writing, empty where it cannot or need not."""
    if not case.n_gen or target.format in ("null", "safetensors"):  # a checkpoint is computed in 32 bits
        return {}
    from arte_edge.device.roofline import expected_here
    from arte_edge.device.shape import ModelShape

    try:
        middle = case.n_depth + case.n_gen // 2
        found = expected_here(ModelShape.of(target.path), case.threads, middle)
    except (ArteError, OSError):
        return {}
    bound = " (upper bound)" if found.is_upper_bound else ""
    return {"expected_ts": round(found.decode_tokens_per_s, 3), "expected_from": f"{found.source}{bound}"}
