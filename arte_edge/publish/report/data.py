"""The contents of a run folder: settings, stage summaries and rows, times, the export, the benchmark.

What does not exist yet is listed as missing, so an interrupted run has a report too. Only damaged files are an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arte_edge.distill.config import UNALIGNED
from arte_edge.errors import InputError
from arte_edge.files import json_loads, read_json, read_toml
from arte_edge.results.comparison import upgraded
from arte_edge.results.rows import Row
from arte_edge.results.student_json import StudentFile, find_export, find_run, read_bench, read_student
from arte_edge.store import read_jsonl

# Of each stage the files that hold its rows. With rounds there are tune-1, validate, tailor-2 and so on besides.
_ROWS = {
    "check": ("answers.jsonl",),
    "target": (),
    "elicit": ("questions.jsonl", "rationales.jsonl"),
    "calibrate": ("preference_set.jsonl",),
    "prefer": ("scores.jsonl", "questions.jsonl"),
    "align": ("pairs.jsonl", "adapter/log.jsonl"),
    "tailor": ("train.jsonl", "rejected.jsonl"),
    "tune": ("student/log.jsonl",),
    "evaluate": ("answers.jsonl",),
}
_ALIGNING = ("elicit", "calibrate", "prefer", "align")
_MOST_ROUNDS = 10
_LARGEST = 1e300

JsonRow = dict[str, Any]


_AGAIN = "Remove it and run `arte-edge distill` again: finished calls are kept."


# What the page needs of a row, by key; more keys may be there. A list holds any number of what is in it.
_SHARE = {"n": int, "right": int, "accuracy": float, "low": float, "high": float}
_TEST = {"gained": int, "lost": int, "difference": float, "low": float, "high": float, "p_value": float}
_RATES = {"decode_tokens_per_s": float, "evidence": str, "source": str}
_LOGGED = {"loss": float | None, "rewards/margins": float | None}
_SHAPES: dict[str, dict[str, Any]] = {
    "prefer/scores.jsonl": {"question": str, "technique": int, "text": str, "score": float},
    "prefer/questions.jsonl": {"id": str, "input": str, "score": float},
    "align/adapter/log.jsonl": _LOGGED,
    "tailor/train.jsonl": {"input": str, "rationale": str, "label": str},
    "tune/student/log.jsonl": _LOGGED,
    "evaluate/manifest.json": {
        "rows": [{"model": str, "setting": str, "slot_f1": float | None, **_SHARE}],
        "paired": [{"against": str, "setting": str, **_TEST}],
        **dict.fromkeys(("chance", "format_share"), float | None),
    },
    "deploy.json": {
        "budget": {"answer_tokens": int, "prompt_tokens": int, "rates": _RATES},
        "deploy": {"device": str, "file": str, "max_answer_seconds": float},
    },
}


@dataclass
class StageCost:
    """The cost of a stage, over all starts of the run: seconds, calls made, tokens generated."""

    seconds: float = 0.0
    calls: int = 0
    tokens: int = 0


@dataclass
class RunData:
    """A run as far as it got. `summaries` holds the finished stages; `rows` their files as stage/file."""

    name: str
    config: dict[str, Any]
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, list[JsonRow]] = field(default_factory=dict)
    cost: dict[str, StageCost] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    deploy: dict[str, Any] | None = None
    student: StudentFile | None = None
    bench: list[Row] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def table(self, key: str) -> dict[str, Any]:
        """Return a table of the configuration, empty if it is not there."""
        found = self.config.get(key)
        return found if isinstance(found, dict) else {}

    def of(self, stage: str, file: str) -> list[JsonRow]:
        return self.rows.get(f"{stage}/{file}", [])


def stages_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of a run's stages in order; ``tune`` is the best of the rounds, where there are several."""
    rounds = config.get("rounds", 1)
    if not isinstance(rounds, int) or rounds < 2:
        return tuple(_ROWS)
    before, after = tuple(_ROWS)[:-3], tuple(_ROWS)[-2:]
    numbered: list[str] = []
    for n in range(1, min(rounds, _MOST_ROUNDS) + 1):
        more = "" if n == 1 else f"-{n}"
        numbered += [f"tailor{more}", f"tune-{n}", f"validate{more}"]
    return (*before, *numbered, *after)


def read_run(ref: str) -> RunData:
    """Read the run that `ref` names: a folder, or a name under ``runs/``.

    Raises InputError: no run, or one of its files is damaged; the message names it.
    """
    folder = find_run(ref)
    config = read_toml(folder / "run.toml")
    run = RunData(str(config.get("name") or folder.resolve().name), config)
    stages = stages_of(config)
    for stage in stages:
        _read_stage(run, folder / stage)
    if (folder / "events.jsonl").is_file():
        _read_events(run, folder / "events.jsonl")
    if deploy := read_json(folder / "deploy.json", _AGAIN):
        _check(folder, "deploy.json", [deploy])
        run.deploy = deploy
    _read_export(run, folder)
    return run


def _read_stage(run: RunData, folder: Path) -> None:
    manifest = read_json(folder / "manifest.json", _AGAIN)
    # A run that does not align has no such stages; of rounds and trials there are as many as it took.
    skipped = folder.name in _ALIGNING and run.config.get("data") in UNALIGNED
    optional = folder.name not in _ROWS or folder.name == "target"
    if not manifest:
        if not (skipped or optional):
            run.missing.append(f"{folder.name}: this stage has not finished")
        return
    summary = upgraded(manifest.get("summary"))
    _check(folder.parent, f"{folder.name}/manifest.json", [summary])
    run.summaries[folder.name] = summary if isinstance(summary, dict) else {}
    for file in _ROWS.get(folder.name, ()):
        if (folder / file).is_file():
            rows = run.rows[f"{folder.name}/{file}"] = read_jsonl(folder / file)
            _check(folder.parent, f"{folder.name}/{file}", rows)


def _check(run: Path, file: str, rows: Sequence[Any]) -> None:
    """Raise InputError with the file, line and key of a value that the page could not show."""
    for number, row in enumerate(rows if file in _SHAPES else (), 1):
        if (key := _misfit(row, _SHAPES[file])) is not None:
            what = f"{key.removeprefix('.') or 'it'} is missing, or not what it should be"
            raise InputError(f"{run / file}:{number}: {what}", _AGAIN)


def _misfit(value: Any, shape: Any) -> str | None:
    """Return the key below which `value` has another shape, None if it fits; a float may be a whole number."""
    if isinstance(shape, dict | list):
        if not isinstance(value, type(shape)):
            return ""
        keys: Any = shape if isinstance(shape, dict) else range(len(value))
        inner = shape if isinstance(shape, dict) else dict.fromkeys(keys, shape[0])
        parts = value if isinstance(value, dict) else dict(enumerate(value))
        found = ((key, _misfit(parts.get(key), inner[key])) for key in keys)
        return next((f".{key}{below}" for key, below in found if below is not None), None)
    if shape in (float, float | None):
        is_number = isinstance(value, int | float) and abs(value) < _LARGEST  # neither infinite nor NaN
        return None if is_number or (value is None and shape is not float) else ""
    return None if isinstance(value, shape) else ""


def _read_export(run: RunData, folder: Path) -> None:
    try:
        export = find_export(folder)
    except InputError as error:
        none = "no files yet: `arte-edge export` makes and verifies them"
        run.missing.append(f"files: {error.message if 'several' in error.message else none}")
        return
    run.student = read_student(export)
    run.bench = read_bench(export)
    speeds = run.student is not None and any(a.speeds for a in run.student.artifacts)
    if not run.bench and not speeds:
        run.missing.append("speed: nothing measured yet: `arte-edge bench` on the device does it")
    elif not run.bench:
        run.missing.append("token times: bench.jsonl, which holds every token's time, is not beside the files")


def _read_events(run: RunData, path: Path) -> None:
    cost: dict[str, StageCost] = defaultdict(StageCost)
    stage = ""
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            event = json_loads(line)
        except ValueError:  # cut off when the process was killed; nothing depends on it
            continue
        kind = event.get("event") if isinstance(event, dict) else None
        if kind == "stage":
            name = str(event.get("name", ""))
            stage = name if event.get("state") == "begin" else ""
            cost[name].seconds += _number(event, "seconds")
        elif kind == "calls" and stage:
            cost[stage].calls += int(_number(event, "n") - _number(event, "kept"))
            cost[stage].tokens += int(_number(event, "tokens"))
        elif kind == "warning" and (text := str(event.get("text", ""))) not in run.warnings:
            run.warnings.append(text)
    run.cost = {name: cost[name] for name in stages_of(run.config) if name in cost}


def _number(event: dict[str, Any], key: str) -> float:
    """Return a number of an event, 0 for what is none."""
    value = event.get(key)
    return value if isinstance(value, int | float) and abs(value) < 1e15 else 0.0
