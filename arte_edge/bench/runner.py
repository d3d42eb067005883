"""``arte_edge.bench.bench``: measure the files of a model and return rows; nothing is printed.

Every test runs in a child process of its own, and a failure is a row with its reason, so a sweep
always continues.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge.bench.find_models import Target, describe, find_targets
from arte_edge.bench.settings import (
    BenchSettings,
    Case,
    Reporter,
    Request,
    Split,
    cases,
    load_suite,
    make_settings,
)
from arte_edge.bench.worker import run_child
from arte_edge.errors import ArteError, InputError
from arte_edge.results.rows import DeviceFacts, QualityRow, Row, SpeedRow
from arte_edge.runtimes.loader import choose_runtime

__all__ = ["BenchOutcome", "bench", "run_bench", "run_case", "run_request"]

OnRow = Callable[[Row], None]


@dataclass(frozen=True)
class BenchOutcome:
    """What was measured, failures included.

    Attributes:
        paths: the measured files and folders.
        rows: one per test, in the order in which they were measured.
    """

    paths: tuple[Path, ...]
    rows: tuple[Row, ...]

    @property
    def speed(self) -> tuple[SpeedRow, ...]:
        return tuple(row for row in self.rows if isinstance(row, SpeedRow))

    @property
    def quality(self) -> tuple[QualityRow, ...]:
        return tuple(row for row in self.rows if isinstance(row, QualityRow))

    @property
    def ok(self) -> bool:
        """True unless all tests failed."""
        return not self.rows or any(row.status == "ok" for row in self.rows)

    def _repr_html_(self) -> str:
        from arte_edge.bench.report import as_html

        return as_html(self.rows)


def fetch_model(ref: str) -> Path:
    """Return the file of a registry name or Hub id, downloaded if it is not cached."""
    from arte_edge.models import resolve

    model = resolve(ref)
    found = model.gguf or model.folder
    assert found is not None  # a LocalModel has one of the two
    return found


def bench(
    source: str | Path | Sequence[str | Path],
    *,
    suite: str | None = None,
    task: str | Path | None = None,
    split: Split = "test",
    limit: int = 0,
    bbh: Path | None = None,
    speed: bool = True,
    device: str | None = None,
    compile_there: bool = False,
    save: bool = True,
    reporter: Reporter | None = None,
    on_row: OnRow | None = None,
    fetch: Callable[[str], Path] = fetch_model,
    **settings: Any,
) -> BenchOutcome:
    """Measure speed, memory, heat and energy of a model's files, and with `task` their accuracy.

    Args:
        source: a .gguf file, an ONNX or checkpoint folder, an export's or a run's folder, a registry
            name or Hub id; or several.
        suite: named settings: default, quick, sustained, or a .toml.
        task: a shipped name or a folder; its examples are answered as well.
        split: of the task: test or validation.
        limit: largest number of examples; 0: all.
        bbh: folder of BIG-Bench-Hard files with the task.
        speed: False measures accuracy only.
        device: measure on this device over ssh: a name of ``devices ls`` or user@host.
        compile_there: with `device`: compile llama-cpp-python there.
        save: append rows to the export's bench.jsonl and merge them into its student.json.
        on_row: called with each row as soon as it is measured.
        fetch: returns the file of a registry name or Hub id.
        settings: fields of `BenchSettings`, which override the suite; lists also in llama-bench's
            notation (``n_prompt="1-4"``).

    Raises:
        InputError: a wrong value or a damaged model; nothing was measured.
        ArteError: the device is unreachable or not suited.
    """
    reporter, on_row = reporter or Reporter(), on_row or (lambda row: None)
    if split not in ("test", "validation"):
        raise InputError(f"split '{split}' does not exist", "Use test or validation.")
    if not speed and task is None:
        raise InputError("Without speed and without a task there is nothing to measure", "Give a task.")
    chosen = make_settings("bench", load_suite(suite or "default"), settings)
    refs = [source] if isinstance(source, str | Path) else list(source)
    paths = find_targets([str(ref) for ref in refs], fetch)
    rows: list[Row] = []
    if device is None:
        request = Request(
            settings=chosen, task=str(task) if task else None, split=split, limit=limit, bbh=bbh, speed=speed
        )
        rows = _measure(paths, request, reporter, on_row)
    else:
        from arte_edge import catalog
        from arte_edge.bench.remote import bench_remote
        from arte_edge.device.profiles import find_device

        if bbh is not None:
            raise InputError("bbh cannot be used with a device", "Give a task folder as task.")
        rows = bench_remote(
            find_device(device),
            paths,
            chosen,
            reporter=reporter,
            task=catalog.find("tasks", str(task)) if task else None,
            split=split,
            limit=limit,
            speed=speed,
            compile_there=compile_there,
            on_row=on_row,
        )
    if save:
        _save(paths, rows, reporter)
    return BenchOutcome(tuple(paths), tuple(rows))


def run_request(request: Request, reporter: Reporter, on_row: OnRow) -> list[Row]:
    """Run a request on this machine and return its rows. Raises as `bench`."""
    return _measure(find_targets([request.source], fetch_model), request, reporter, on_row)


def _measure(paths: Sequence[Path], request: Request, reporter: Reporter, on_row: OnRow) -> list[Row]:
    from arte_edge.device.detect import detect

    facts = detect()
    rows: list[Row] = []
    if request.speed:
        rows += run_bench(paths, request.settings, device=facts, reporter=reporter, on_row=on_row)
    if request.task is not None:
        from arte_edge.bench.accuracy import run_quality

        rows += run_quality(
            paths,
            request.task,
            split=request.split,
            limit=request.limit,
            bbh=request.bbh,
            threads=request.settings.threads[0],
            device=facts,
            reporter=reporter,
            on_row=on_row,
        )
    return rows


def _save(paths: Sequence[Path], rows: Sequence[Row], reporter: Reporter) -> None:
    """Append rows to the ``bench.jsonl`` of the exports they belong to, and merge them into student.json."""
    from arte_edge.results.rows import BENCH_NAME, append_rows
    from arte_edge.results.student_json import FILE_NAME as STUDENT

    names = [path.name for path in paths]
    folders = {path.name: path.resolve().parent for path in paths if names.count(path.name) == 1}
    if twice := sorted({name for name in names if names.count(name) > 1}):
        reporter.note(f"{', '.join(twice)}: several files of this name, so the results are not saved")
    for folder in sorted(set(folders.values())):
        own = [row for row in rows if folders.get(row.model_filename) == folder]
        if not own or not (folder / STUDENT).is_file():
            continue
        append_rows(folder / BENCH_NAME, own)
        from arte_edge.results.merge import merge_rows

        try:
            merge_rows(folder, own, note=reporter.note)
        except ArteError as error:  # the rows are saved; a damaged student.json must not fail the benchmark
            reporter.note(f"not merged into {STUDENT}: {error.message}")
            if error.hint:
                reporter.note(error.hint)


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
    from arte_edge.device.memory_estimate import fit, refuse, repacked_types
    from arte_edge.device.model_size import ModelShape
    from arte_edge.memory import available_bytes

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
    from arte_edge.device.model_size import ModelShape
    from arte_edge.device.roofline import expected_here

    try:
        middle = case.n_depth + case.n_gen // 2
        found = expected_here(ModelShape.of(target.path), case.threads, middle)
    except (ArteError, OSError):
        return {}
    bound = " (upper bound)" if found.is_upper_bound else ""
    return {"expected_ts": round(found.decode_tokens_per_s, 3), "expected_from": f"{found.source}{bound}"}
