"""`bench`: measure the files of a model, here or on a device, and return rows.

Every test runs in a child process of its own (`arte_edge.bench.worker`), and a failure is a row with its
reason, so a sweep always continues. ``python -m arte_edge.bench.runner REQUEST`` is how `bench.remote` starts
a benchmark on a device: it gets a `Request` as JSON and prints its rows as JSON lines.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge import catalog
from arte_edge.bench.settings import (
    BenchSettings,
    Case,
    Reporter,
    Request,
    Split,
    Target,
    cases,
    decode_threads,
    describe,
    find_targets,
    load_suite,
    make_settings,
    threads_note,
)
from arte_edge.bench.timing import OnProgress
from arte_edge.bench.worker import run_child
from arte_edge.cache import megabytes
from arte_edge.device.model_size import ModelSize
from arte_edge.errors import ArteError, InputError
from arte_edge.files import own_name
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.rows import BENCH_NAME, SIXTEEN_BITS, DeviceFacts, QualityRow, Row, SpeedRow, append_rows, paired
from arte_edge.runtimes.loader import choose_runtime

OnRow = Callable[[Row], None]


@dataclass(frozen=True)
class BenchOutcome:
    """The result of a benchmark, failures included."""

    paths: tuple[Path, ...]  # the measured files and folders
    rows: tuple[Row, ...]  # one per test, in the order of measurement

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


def _fetch(ref: str, reporter: Reporter) -> Path:
    """Return the file of a registry name or Hub id, downloaded if it is not cached."""
    from arte_edge.models import resolve

    def report(what: str, done_bytes: int, total_bytes: int) -> None:
        share = f" {done_bytes / total_bytes:.0%} of {megabytes(total_bytes)}" if total_bytes else ""
        reporter.progress(f"{ref}: {what}{share}")

    return resolve(ref, progress=report).path


def bench(
    source: str | Path | Sequence[str | Path],
    *,
    suite: str | None = None,
    task: str | Path | None = None,
    split: Split = "test",
    limit: int = 0,
    bbh: Path | None = None,
    speed: bool = True,
    grammar: bool = True,
    device: str | None = None,
    compile_there: bool = False,
    save: bool = True,
    reporter: Reporter | None = None,
    on_row: OnRow | None = None,
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
        grammar: with a closed set or JSON, measure accuracy with the task's grammar too, where the runtime can.
        device: measure on this device over ssh: a name of ``devices ls`` or user@host.
        compile_there: with `device`: compile llama-cpp-python there.
        save: append rows to the export's bench.jsonl and merge them into its student.json.
        on_row: called with each row as soon as it is measured.
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
    if device is not None and bbh is not None:
        raise InputError("bbh cannot be used with a device", "Give a task folder as task.")
    ref = str(task) if task else None
    if ref:  # a mistake in it is said before anything is fetched or measured
        from arte_edge.tasks.loaders import load_task

        if device is not None:
            ref = str(catalog.find("tasks", ref))
        load_task(ref, bbh=bbh)
    refs = [source] if isinstance(source, str | Path) else list(source)
    paths = find_targets([str(ref) for ref in refs], lambda ref: _fetch(ref, reporter))
    request = Request(settings=chosen, task=ref, split=split, limit=limit, bbh=bbh, speed=speed, grammar=grammar)
    exports = _Exports(paths if save else (), reporter)
    if device is None:

        def keep(row: Row) -> None:  # at once: a later model may end this process
            exports.append(row)
            on_row(row)

        try:
            rows = _measure(paths, request, reporter, keep)
        finally:
            exports.merge()
    else:
        from arte_edge.bench.remote import bench_remote
        from arte_edge.device.profiles import find_device

        rows = bench_remote(
            find_device(device),
            paths,
            request,
            reporter=reporter,
            compile_there=compile_there,
            on_row=on_row,
        )
        for row in rows:  # until here the device keeps them
            exports.append(row)
        exports.merge()
    return BenchOutcome(tuple(paths), tuple(rows))


def run_request(request: Request, reporter: Reporter, on_row: OnRow) -> list[Row]:
    """Run a request on this machine and return its rows. Raises as `bench`."""
    return _measure(find_targets([request.source], lambda ref: _fetch(ref, reporter)), request, reporter, on_row)


def _measure(paths: Sequence[Path], request: Request, reporter: Reporter, on_row: OnRow) -> list[Row]:
    from arte_edge.device.detect import detect

    facts = detect()
    rows: list[Row] = []
    if request.speed:
        rows += run_bench(paths, request.settings, device=facts, reporter=reporter, on_row=on_row)
    if request.task is not None:
        rows += run_quality(paths, request, device=facts, reporter=reporter, on_row=on_row)
    return rows


class _Exports:
    """The export of each measured file, where its rows are kept; a file that is in none has no rows to keep."""

    def __init__(self, paths: Sequence[Path], reporter: Reporter) -> None:
        from arte_edge.results.student_json import FILE_NAME

        names = Counter(map(own_name, paths))
        folders = {own_name(path): path.resolve().parent for path in paths}
        self._folders = {n: f for n, f in folders.items() if names[n] == 1 and (f / FILE_NAME).is_file()}
        self._rows: defaultdict[Path, list[Row]] = defaultdict(list)
        self._reporter = reporter
        if twice := sorted(name for name in names if names[name] > 1):
            reporter.note(f"{', '.join(twice)}: several files of this name, so the results are not saved")

    def append(self, row: Row) -> None:
        """Append a row to ``bench.jsonl``. Raises as `append_rows`."""
        if folder := self._folders.get(row.model_filename):
            append_rows(folder / BENCH_NAME, [row])
            self._rows[folder].append(row)

    def merge(self) -> None:
        """Merge the appended rows into student.json; a damaged one must not fail the benchmark."""
        from arte_edge.results.merge import merge_rows

        for folder, rows in self._rows.items():
            try:
                merge_rows(folder, rows, note=self._reporter.note)
            except ArteError as error:
                self._reporter.note(f"not merged into student.json: {error.message}. {error.hint}".rstrip(". "))


def run_bench(
    models: Sequence[Path], settings: BenchSettings, *, device: DeviceFacts, reporter: Reporter, on_row: OnRow
) -> list[SpeedRow]:
    """Return a row for every test of every model, failures included; InputError before the first: no model."""
    targets = [describe(path) for path in models]
    for target in targets:
        choose_runtime(target.path, settings.runtime)
    todo = [(target, case) for target in targets for case in cases(target.path, settings, device)]
    if 0 in settings.threads:
        reporter.note(threads_note(device))
    rows: list[SpeedRow] = []
    for number, (target, case) in enumerate(todo, 1):
        label = f"{number}/{len(todo)} {target.model_filename} {case.test}, {case.threads} threads"
        row = run_case(target, case, device, _progress(reporter, label))
        rows.append(row)
        on_row(row)
    return rows


def _progress(reporter: Reporter, label: str) -> OnProgress:
    return lambda what, done, total: reporter.progress(
        f"{label}: {what} {done}/{total}" if total else f"{label}: {what}"
    )


def run_case(target: Target, case: Case, device: DeviceFacts, on_progress: OnProgress | None = None) -> SpeedRow:
    """Measure one case in a child process of its own and return its row, whatever happens to it."""
    known: dict[str, Any] = {
        "test": case.test,
        **target.row_fields,
        "model_type": target.model_type,
        "model_size": target.model_size,
        "model_n_params": target.model_n_params,
        "runtime": choose_runtime(case.path, case.runtime),
        "n_threads": case.threads,
        "type_k": case.type_k if target.format == "gguf" else "",
        "type_v": case.type_v if target.format == "gguf" else "",
        "n_prompt": case.n_prompt,
        "n_gen": case.n_gen,
        "n_depth": case.n_depth,
        "device": device,
    }
    if reason := _does_not_fit(target, case, device):
        return SpeedRow(**known, status="refused", reason=reason)
    request = {"kind": "speed", "case": json.loads(case.model_dump_json())}
    timeout_s = case.timeout_s + case.sustained_s + case.delay_s
    answer = {key: value for key, value in run_child(request, timeout_s, on_progress).items() if value is not None}
    measured = answer.get("status", "ok") == "ok"
    predicted = _predicted(target, case) if measured and case.roofline else {}
    return SpeedRow(**known | predicted | answer)


def _does_not_fit(target: Target, case: Case, device: DeviceFacts) -> str:
    """Return why this case would run out of memory and what would help; empty if it should fit."""
    from arte_edge.device.memory_estimate import does_not_fit, fit, repacked_types
    from arte_edge.machine import available_bytes

    if target.format == "null":
        return ""
    try:
        size = ModelSize.of(target.path)
    except ArteError:
        return ""
    repacked = repacked_types(device.arch, device.features)
    found = fit(size, available_bytes(), case.context_tokens, repacked=repacked)
    if found.verdict != "no":
        return ""
    error = does_not_fit(size, found, "this device")
    return f"{error.message}. {error.hint}"


def _predicted(target: Target, case: Case) -> dict[str, Any]:
    """Return the roofline's prediction of the decode rate, empty where there is none."""
    from arte_edge.device.roofline import expected_here

    if not case.n_gen or target.format in ("null", "safetensors"):  # a checkpoint is computed in 32 bits
        return {}
    try:
        found = expected_here(ModelSize.of(target.path), case.threads, case.n_depth + case.n_gen // 2)
    except (ArteError, OSError):
        return {}
    bound = " (upper bound)" if found.is_upper_bound else ""
    return {"expected_ts": round(found.decode_tokens_per_s, 3), "expected_from": f"{found.source}{bound}"}


def run_quality(
    models: Sequence[Path], request: Request, *, device: DeviceFacts, reporter: Reporter, on_row: OnRow
) -> list[QualityRow]:
    """Return a row of answers to the request's task for every model, failures included; errors as `run_bench`.

    The 16-bit file of an export comes first, and the others are paired with its answers.
    """
    from arte_edge.tasks.loaders import load_task

    assert request.task is not None
    loaded, settings = load_task(request.task, bbh=request.bbh), request.settings
    targets = sorted((describe(path) for path in models), key=lambda t: t.quantization not in SIXTEEN_BITS)
    for target in targets:
        choose_runtime(target.path, settings.runtime)
    threads = settings.threads[0] or decode_threads(device)
    rows: list[QualityRow] = []
    for number, target in enumerate(targets, 1):
        asked = {
            "kind": "quality",
            "request": request.model_copy(update={"source": str(target.path)}).model_dump(mode="json"),
            "threads": threads,
            "device": device.model_dump(mode="json"),
        }
        label = f"{number}/{len(targets)} {target.model_filename} {loaded.name}"
        answer = run_child(asked, settings.timeout_s, _progress(reporter, label), per_step=True)
        if "row" in answer:
            row = paired(QualityRow.model_validate_json(json.dumps(answer["row"])), rows)
        else:
            row = QualityRow(
                **target.row_fields | PairedAccuracy.of(loaded.name, request.split, 0, 0).model_dump(),
                status=answer["status"],
                reason=answer["reason"],
                runtime=choose_runtime(target.path, settings.runtime),
                n_threads=threads,
                device=device,
            )
        rows.append(row)
        on_row(row)
    return rows


class _Lines(Reporter):
    """Prints one line per test to stderr."""

    _label = ""

    def progress(self, text: str) -> None:
        label = text.rpartition(": ")[0]
        if label != self._label:
            self._label = label
            self.note(label)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def main(request: str) -> int:
    """Run a `Request` given as JSON and print its rows as JSON lines; return 1 if no test succeeded."""
    try:
        rows = run_request(
            Request.model_validate_json(request), _Lines(), lambda row: print(row.model_dump_json(), flush=True)
        )
    except ArteError as error:
        print(f"{error.message} {error.hint}".rstrip(), file=sys.stderr)
        return error.exit_code
    return int(not any(row.status == "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
