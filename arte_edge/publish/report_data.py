"""What a run folder tells: settings, stages with their summaries and rows, times, the export, the benchmark.

Whatever is not there is missing from the story, and the report says so; a run that stopped half-way has
a report too. Only files that are damaged are an error.
"""

from __future__ import annotations

import json
import tomllib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arte_edge.errors import InputError
from arte_edge.publish.where import find_export, find_run, read_bench
from arte_edge.results.rows import Row
from arte_edge.results.student_json import StudentFile, read_student
from arte_edge.store import read_jsonl

__all__ = ["STAGES", "Story", "Work", "read_story"]

STAGES = ("check", "elicit", "calibrate", "prefer", "align", "tailor", "tune", "evaluate")
_ROWS = {
    "check": ("answers.jsonl",),
    "elicit": ("questions.jsonl", "rationales.jsonl"),
    "calibrate": ("preference_set.jsonl",),
    "prefer": ("scores.jsonl", "questions.jsonl"),
    "align": ("pairs.jsonl", "adapter/log.jsonl"),
    "tailor": ("train.jsonl", "rejected.jsonl"),
    "tune": ("student/log.jsonl",),
    "evaluate": ("answers.jsonl",),
}

JsonRow = dict[str, Any]


@dataclass
class Work:
    """What a stage took, over all starts of the run: seconds, calls made, tokens written."""

    seconds: float = 0.0
    calls: int = 0
    tokens: int = 0


@dataclass
class Story:
    """A run as far as it got. `summaries` holds the finished stages; `rows` their files as stage/file."""

    name: str
    config: dict[str, Any]
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, list[JsonRow]] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=dict)
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


def read_story(ref: str) -> Story:
    """Read the run that `ref` names: a folder, or a name under ``runs/``.

    Raises:
        InputError: no run, or one of its files is damaged; says which.
    """
    folder = find_run(ref)
    try:
        config = tomllib.loads((folder / "run.toml").read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / 'run.toml'}: not TOML: {error}") from error
    story = Story(str(config.get("name") or folder.resolve().name), config)
    for stage in STAGES:
        _read_stage(story, folder / stage)
    if (folder / "events.jsonl").is_file():
        _read_events(story, _events(folder / "events.jsonl"))
    story.deploy = _json(folder / "deploy.json")
    _read_export(story, folder)
    return story


def _read_stage(story: Story, folder: Path) -> None:
    manifest = _json(folder / "manifest.json")
    skipped = story.config.get("data") == "original-teacher" and folder.name in STAGES[1:5]
    if manifest is None:
        if not skipped:
            story.missing.append(f"{folder.name}: this stage has not finished")
        return
    story.summaries[folder.name] = manifest.get("summary", {})
    for file in _ROWS[folder.name]:
        if (folder / file).is_file():
            story.rows[f"{folder.name}/{file}"] = read_jsonl(folder / file)


def _read_export(story: Story, folder: Path) -> None:
    try:
        export = find_export(folder)
    except InputError as error:
        several = "several" in error.message
        why = error.message if several else "no files yet: `arte-edge export` makes and verifies them"
        story.missing.append(f"files: {why}")
        return
    story.student = read_student(export)
    story.bench = read_bench(export)
    speeds = story.student is not None and any(a.speeds for a in story.student.artifacts)
    if not story.bench and not speeds:
        story.missing.append("speed: nothing measured yet: `arte-edge bench` on the device does it")
    elif not story.bench:
        story.missing.append(
            "token times: bench.jsonl, which holds every token's time, is not beside the files"
        )


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(
            f"{path}: not readable as JSON", "The `arte-edge distill` command makes it again."
        ) from error
    return found if isinstance(found, dict) else None


def _events(path: Path) -> list[JsonRow]:
    """Return the events that can be read: a killed process may have torn one, and nothing depends on it."""
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_events(story: Story, events: list[JsonRow]) -> None:
    work: dict[str, Work] = defaultdict(Work)
    stage = ""
    for event in events:
        kind = event.get("event")
        if kind == "stage":
            name = str(event.get("name", ""))
            stage = name if event.get("state") == "begin" else ""
            work[name].seconds += float(event.get("seconds") or 0.0)
        elif kind == "calls" and stage:
            work[stage].calls += int(event.get("n") or 0) - int(event.get("kept") or 0)
            work[stage].tokens += int(event.get("tokens") or 0)
        elif kind == "warning" and (text := str(event.get("text", ""))) not in story.warnings:
            story.warnings.append(text)
    story.work = {name: work[name] for name in STAGES if name in work}
