"""``arte-edge study``: arms on tasks, students and seeds, each one run, and a table of their paired differences.

The runs of a study lie in one folder and share one store of calls (each ``calls.jsonl`` is a link to the study's), so
that nothing is generated twice; runs of the same task, student and seed also take over each other's finished stages
(`RunContext.siblings`): teacher, controls and trials are made once. The same command resumes a
study. What a student of own labels scores comes with every run and costs no arm.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from arte_edge.cache import sha256_file, write_atomic
from arte_edge.console import Reporter, ResultTable, fragment
from arte_edge.distill.config import ModelConfig, RunConfig, TaskConfig, build, short_name
from arte_edge.distill.pipeline import run_pipeline
from arte_edge.distill.run_context import holds
from arte_edge.distill.validate_config import refuse_run
from arte_edge.errors import InputError, StoppedEarly
from arte_edge.files import read_json, read_toml, validated
from arte_edge.results.comparison import BASE, OWN, OWN_ALL, TEACHER, TUNED
from arte_edge.stats import over_seeds_and_questions
from arte_edge.store import read_jsonl
from arte_edge.tasks.answers import matches
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Task

_Bools = NDArray[np.bool_]
_Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
_FREE = (BASE, OWN, OWN_ALL, TEACHER)  # in the answers of every run
_TOLD = ("prefer", "align", "tailor", "tune")  # stages whose numbers say where an effect is lost
_DONE = "study-done"  # of a run folder: the sha256 of its run.toml when it was evaluated


class StudyFile(BaseModel):
    """A ``STUDY.toml``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("", description="folder under runs/; empty: the file's name")
    tasks: tuple[str | TaskConfig, ...] = Field(min_length=1, description="as task.ref, or tables like [task]")
    students: tuple[str | ModelConfig, ...] = Field(min_length=1, description="as student.model, or tables")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    reference: str = Field("", description="the arm that others are compared with, beside own labels")
    keep_weights: bool = Field(False, description="keep the trained students of every run")
    run: dict[str, Any] = Field({}, description="the settings of every run, as in run.toml")
    arms: dict[_Name, dict[str, Any]] = Field(min_length=1, description="what an arm changes in them")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study; `block` are the task, student and seed that it shares with the other arms."""

    task: str
    student: str
    seed: int
    arm: str
    config: RunConfig
    folder: Path

    @property
    def block(self) -> tuple[str, str, int]:
        return self.task, self.student, self.seed


@dataclass(frozen=True)
class StudyRow:
    """One line of the table: the share of right answers over seeds, and paired differences with 95 % intervals.

    `minus` holds (difference, low, high) by what is subtracted. `task` is empty for the mean over all tasks.
    """

    task: str
    student: str
    arm: str
    n: int
    by_seed: dict[int, float]
    accuracy: float
    minus: dict[str, tuple[float, float, float]]


@dataclass(frozen=True)
class StudyResult:
    """The rows of a study's table, and what became of each run."""

    folder: Path
    reference: str
    rows: tuple[StudyRow, ...]
    runs: tuple[dict[str, Any], ...]

    @property
    def stopped(self) -> list[str]:
        return [f"{run['run']}: {run['stopped']}" for run in self.runs if run["stopped"]]

    @property
    def tables(self) -> list[tuple[str, ResultTable]]:
        """A title and a table for each task and student."""
        groups: dict[tuple[str, str], list[StudyRow]] = defaultdict(list)
        for row in self.rows:
            groups[row.task, row.student].append(row)
        return [(self._title(rows), self._table(rows)) for rows in groups.values()]

    @property
    def lines(self) -> list[str]:
        return [
            "Paired differences in points, with 95 % intervals over seeds and questions.",
            *(f"Stopped early: {text}" for text in self.stopped),
        ]

    def _title(self, rows: Sequence[StudyRow]) -> str:
        seeds = sorted({seed for row in rows for seed in row.by_seed})
        task = rows[0].task or "all tasks, each counted alike"
        return f"{task}, {rows[0].student}: n = {rows[0].n}, seeds {', '.join(map(str, seeds))}"

    def _table(self, rows: Sequence[StudyRow]) -> ResultTable:
        from rich import box

        table = ResultTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("trained on", no_wrap=True)
        against = [OWN, self.reference]
        for name in ("right", *(f"minus {name}" for name in against)):
            table.add_column(name, justify="right", no_wrap=True, overflow="ellipsis")
        for row in rows:
            differences = [_points(*row.minus[name]) if name in row.minus else "" for name in against]
            table.add_row(row.arm.replace("labels + ", "+ "), f"{row.accuracy:.1%}", *differences)
        return table

    def as_dict(self) -> dict[str, Any]:
        keys = ("difference", "low", "high")
        rows = [
            {**vars(row), "minus": {name: dict(zip(keys, found, strict=True)) for name, found in row.minus.items()}}
            for row in self.rows
        ]
        return {"reference": self.reference, "rows": rows, "runs": list(self.runs)}

    def _repr_html_(self) -> str:
        parts = [fragment(title, [table]) for title, table in self.tables]
        return "".join([*parts, fragment("", lines=self.lines)])


def load_study(path: Path) -> StudyFile:
    """Read a ``STUDY.toml``. Raises InputError: it cannot be read; names every wrong key."""
    return validated(StudyFile, read_toml(path), str(path))


def planned_runs(study: StudyFile, folder: Path) -> list[PlannedRun]:
    """Return the runs of a study, those of a task, student and seed together.

    Raises InputError: an arm that is no run, or two runs with one folder.
    """
    runs = []
    for seed, given, learner in product(study.seeds, study.tasks, study.students):
        task = given if isinstance(given, TaskConfig) else TaskConfig(ref=given)
        student = {"model": learner} if isinstance(learner, str) else learner.model_dump()
        where = {"task": task.model_dump(exclude_none=True), "student": student, "seed": seed}
        for arm, changes in study.arms.items():
            config = build(f"arms.{arm}", study.run, where, changes)
            names = Path(task.ref).stem, short_name(config.student.model)
            at = folder / "-".join([*names, arm, f"seed{seed}"])
            runs.append(PlannedRun(*names, seed, arm, config, at))
    twice = {run.folder.name for run in runs if sum(run.folder == other.folder for other in runs) > 1}
    if twice:
        raise InputError(f"two runs of this study would share a folder: {sorted(twice)[0]}", "Name each once.")
    if study.reference and study.reference not in study.arms:
        raise InputError(f"reference = '{study.reference}' is no arm", f"Arms: {', '.join(study.arms)}.")
    return runs


def run_study(study: StudyFile, folder: Path, reporter: Reporter, *, update: bool = False) -> StudyResult:
    """Run what is not done yet, and write study.json and study.html, after each task, student and seed anew.

    A run that a check or a budget stops is left out of the table and named below it.

    Raises InputError: a task, model or arm that cannot be used, or a folder of another run; ArteError: a run failed.
    """
    runs = planned_runs(study, folder)
    tasks = {
        name: load_task(given.ref, bbh=Path(given.bbh) if given.bbh else None)
        for name, given in {run.task: run.config.task for run in runs}.items()
    }
    for run in runs:
        if not _is_done(run, tasks[run.task]):
            refuse_run(run.config, tasks[run.task], f"{run.folder.name}: ")
    stopped: dict[Path, str] = {}
    blocks = dict.fromkeys(run.block for run in runs)
    for i, block in enumerate(blocks):
        arms = [run for run in runs if run.block == block]
        for run in arms:
            if _is_done(run, tasks[run.task]):
                continue
            reporter.say(f" of {len(runs)}: {run.folder.name}", f"run {runs.index(run) + 1}")
            share_calls(folder, run.folder)
            events = Reporter(run.folder / "events.jsonl", quiet=reporter.quiet)
            others = [other.folder for other in arms if other is not run]
            try:
                run_pipeline(run.config, run.folder, events, force=True, update=update, siblings=others)
            except StoppedEarly as error:
                stopped[run.folder] = error.message
                reporter.warn(f"{run.folder.name}: {error.message}")
            else:
                write_atomic(run.folder / _DONE, sha256_file(run.folder / "run.toml", fresh=True).encode())
            reporter.event("run", run=run.folder.name, stopped=stopped.get(run.folder, ""))
        if not study.keep_weights and not any(run.folder in stopped for run in arms):
            _drop_weights(arms)
        result = _result(study, folder, runs, tasks, stopped)
        if i < len(blocks) - 1 and result.rows:
            reporter.say(f" of {len(blocks)} blocks: {folder / 'study.html'} has the table so far", f"{i + 1}")
    return result


def share_calls(study: Path, run: Path) -> None:
    """Make the store of a new run folder a link to the study's."""
    run.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(run / "calls.jsonl"):
        (run / "calls.jsonl").symlink_to(Path("..") / "calls.jsonl")


def _is_done(run: PlannedRun, task: Task) -> bool:
    mark = run.folder / _DONE
    if not mark.is_file() or not holds(run.folder, run.config, task):
        return False
    return mark.read_text() == sha256_file(run.folder / "run.toml", fresh=True)


def _drop_weights(runs: Sequence[PlannedRun]) -> None:
    """Remove the trained students of finished runs, gigabytes each; answers, data and adapters stay.

    The whole folder of a training goes: what is left of one would pass for finished when an arm is added later.
    """
    for run in runs:
        for report in [*run.folder.rglob("training.json")]:
            if (out := report.parent).name != "adapter" and report.is_file():
                gone = out.with_name(f".{out.name}")  # so that a kill leaves no part of it under its name
                shutil.rmtree(gone, ignore_errors=True)
                out.rename(gone)
                shutil.rmtree(gone)
                out.with_name(f"{out.name}-F16.gguf").unlink(missing_ok=True)


def _result(
    study: StudyFile, folder: Path, runs: Sequence[PlannedRun], tasks: Mapping[str, Task], stopped: Mapping[Path, str]
) -> StudyResult:
    """Make the table of the runs that are done, and write it."""
    done = [run for run in runs if _is_done(run, tasks[run.task])]
    reference = study.reference or next(
        (arm for arm, keys in study.arms.items() if keys.get("data") == "original-teacher"), next(iter(study.arms))
    )
    result = StudyResult(
        folder,
        reference,
        tuple(_rows(done, tasks, list(study.arms), reference)),
        tuple(_told(run, run in done, stopped.get(run.folder, "")) for run in runs),
    )
    write_atomic(folder / "study.json", json.dumps(result.as_dict(), indent=1, ensure_ascii=False).encode())
    head = f"<!doctype html><meta charset='utf-8'><title>{folder.name}</title><body style='font:15px sans-serif'>"
    write_atomic(folder / "study.html", (head + result._repr_html_()).encode())
    return result


def _told(run: PlannedRun, done: bool, stopped: str) -> dict[str, Any]:
    """Return what is known of a run: its place in the study, and the summaries of the stages that shape its data."""
    manifests = {stage: read_json(run.folder / stage / "manifest.json") for stage in _TOLD}
    stages = {stage: found.get("summary", {}) for stage, found in manifests.items() if found}
    place = {"task": run.task, "student": run.student, "seed": run.seed, "arm": run.arm}
    return {"run": run.folder.name, **place, "done": done, "stopped": stopped, "stages": stages}


def _rows(
    runs: Sequence[PlannedRun], tasks: Mapping[str, Task], arms: Sequence[str], reference: str
) -> Iterator[StudyRow]:
    """Yield the lines for each task and student, then the means over tasks."""
    rights: dict[tuple[str, str], dict[str, dict[int, _Bools]]] = {}
    for run in runs:
        found = rights.setdefault((run.task, run.student), {})
        for who, right in _answers(run, tasks[run.task]).items():
            known = found.setdefault(run.arm if who == TUNED else who, {})
            if any(len(other) != len(right) for other in known.values()):
                raise InputError(f"{run.folder}: another number of test examples than in other runs of this study")
            known.setdefault(run.seed, right)
    order = [BASE, OWN, OWN_ALL, *arms, TEACHER]
    for (task, student), found in rights.items():
        yield from _lines(task, student, [found], order, reference)
    for student in dict.fromkeys(run.student for run in runs):
        several = [found for (_, other), found in rights.items() if other == student]
        if len(several) > 1:
            yield from _lines("", student, several, order, reference)


def _lines(
    task: str, student: str, found: Sequence[dict[str, dict[int, _Bools]]], order: Sequence[str], reference: str
) -> Iterator[StudyRow]:
    """Yield a line for each of `order` that all of `found`, a table a task, have."""
    for who in order:
        if not all(who in table for table in found):
            continue
        minus = {}
        for other in (OWN, reference):
            pairs = [_paired(table[who], table.get(other, {})) for table in found]
            if other != who and all(pair.size for pair in pairs):
                mean, interval = over_seeds_and_questions(pairs)
                minus[other] = (round(mean, 4), round(interval.low, 4), round(interval.high, 4))
        seeds = sorted(set.intersection(*({*table[who]} for table in found)))
        by_seed = {s: round(float(np.mean([table[who][s].mean() for table in found])), 4) for s in seeds}
        accuracy = float(np.mean([np.mean([*map(np.mean, table[who].values())]) for table in found]))
        n = sum(len(next(iter(table[who].values()))) for table in found)
        yield StudyRow(task, student, who, n, by_seed, round(accuracy, 4), minus)


def _paired(a: Mapping[int, _Bools], b: Mapping[int, _Bools]) -> NDArray[np.int_]:
    """Return a minus b ``[n_seed, n_question]`` on the seeds of both."""
    seeds = sorted({*a} & {*b})
    return np.array([a[seed].astype(int) - b[seed].astype(int) for seed in seeds])


def _answers(run: PlannedRun, task: Task) -> dict[str, _Bools]:
    """Return which test examples each model of a run answered right, in its first prompting."""
    rows = read_jsonl(run.folder / "evaluate" / "answers.jsonl")
    columns: dict[str, str] = {}
    for column in rows[0]:
        who, found, _ = column.rpartition(", ")
        if found and who in (*_FREE, TUNED):
            columns.setdefault(who, column)
    return {
        who: np.array([matches(row[column], row["target"], task.answer) for row in rows])
        for who, column in columns.items()
    }


def _points(difference: float, low: float, high: float) -> str:
    return f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
