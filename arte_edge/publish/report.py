"""``arte-edge report``: a run as one HTML page that needs nothing else, with its charts inside.

The page asks for nothing from any network, follows the reader's light or dark setting, and prints.
All text in it that models wrote is escaped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arte_edge import __version__
from arte_edge.publish.charts import (
    accuracy_chart,
    front_chart,
    histogram_chart,
    length_chart,
    loss_chart,
    questions_chart,
    time_chart,
)
from arte_edge.publish.charts_traces import trace_of, traced
from arte_edge.publish.front import Candidate, front_of
from arte_edge.publish.rates import candidates
from arte_edge.publish.report_data import Story
from arte_edge.publish.report_story import (
    accuracy_rows,
    chapters,
    headline,
    paired_lines,
    score_label,
)
from arte_edge.publish.wants import Wants, size_text
from arte_edge.results.rows import SpeedRow
from arte_edge.store import write_atomic

__all__ = ["render", "write_report"]

_TEMPLATES = Path(__file__).parent / "templates"
_EXAMPLES = 4


def write_report(story: Story, out: Path) -> Path:
    """Write the page to `out`, all of it or nothing.

    Raises:
        ArteError: the disk is full.
        InputError: `out` cannot be written.
    """
    write_atomic(out, render(story).encode("utf-8", errors="replace"))
    return out


def render(story: Story) -> str:
    """Return the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = size_text
    model = story.student.student.name if story.student else ""
    environment.filters["short"] = lambda file: file.removeprefix(model).lstrip("-") or file
    return environment.get_template("report.html.j2").render(**_context(story))


def _context(story: Story) -> dict[str, Any]:
    scores, questions = story.of("prefer", "scores.jsonl"), story.of("prefer", "questions.jsonl")
    evaluation = story.summaries.get("evaluate", {})
    budget = story.deploy["budget"]["answer_tokens"] if story.deploy else None
    devices = _devices(story)
    return {
        "story": story,
        "version": __version__,
        "headline": headline(story),
        "chapters": chapters(story),
        "settings": _settings(story),
        "time": time_chart({name: work.seconds for name, work in story.work.items()}),
        "scores": histogram_chart([float(row["score"]) for row in scores], "preference score", "rationales"),
        "score_label": score_label(story),
        "questions": questions_chart(scores, questions),
        "length": length_chart(scores, budget),
        "training": [
            chart
            for chart in (
                loss_chart(
                    story.of("align", "adapter/log.jsonl"), "rewards/margins", "reward margin", "align"
                ),
                loss_chart(story.of("tune", "student/log.jsonl"), "loss", "loss", "tune"),
            )
            if chart
        ],
        "accuracy": accuracy_chart(accuracy_rows(story), evaluation.get("chance")),
        "accuracy_rows": accuracy_rows(story),
        "paired": paired_lines(story),
        "drafts": sorted(scores, key=lambda row: -row["score"]),
        "n_examples": _EXAMPLES,
        "n_train": len(story.of("tailor", "train.jsonl")),
        "train": story.of("tailor", "train.jsonl")[:_EXAMPLES],
        "artifacts": story.student.artifacts if story.student else (),
        "devices": devices,
        "traces": [trace_of(row) for row in traced([r for r in story.bench if isinstance(r, SpeedRow)])],
        "bad_rows": [row for row in story.bench if row.status != "ok"],
        "missing": story.missing,
        "budget": story.deploy,
    }


def _settings(story: Story) -> list[tuple[str, str]]:
    """Return what decides a run, as pairs of name and value."""
    student, teacher = story.table("student"), story.table("teacher")
    pairs = [
        ("task", story.table("task").get("ref", "")),
        ("teacher", teacher.get("model", "")),
        ("student", student.get("model", "")),
        ("trained on", story.config.get("data", "")),
        ("seed", story.config.get("seed", "")),
        ("score of a draft", story.table("prefer").get("score", "")),
    ]
    if story.student is not None:
        count = story.student.student.parameter_count
        pairs.append(("student's parameters", f"{count / 1e6:.0f} million"))
    return [(name, str(value)) for name, value in pairs if value != ""]


def _devices(story: Story) -> list[dict[str, Any]]:
    """Return a front and a table for every device that something was measured on."""
    if story.student is None:
        return []
    names: dict[str, frozenset[str]] = {}
    for artifact in story.student.artifacts:
        for speed in artifact.speeds:
            ids = frozenset({speed.device, speed.fingerprint, speed.profile} - {""})
            names[speed.device] = names.get(speed.device, frozenset()) | ids
    for row in story.bench:
        name = row.device.profile or row.device.fingerprint
        names[name] = names.get(name, frozenset()) | {name, row.device.fingerprint}
    merged = {
        name: ids for name, ids in names.items() if not any(name in other for other in _others(names, name))
    }
    return [_device(story, name, ids) for name, ids in sorted(merged.items())]


def _others(names: dict[str, frozenset[str]], name: str) -> list[frozenset[str]]:
    return [ids for other, ids in names.items() if other != name]


def _device(story: Story, name: str, ids: frozenset[str]) -> dict[str, Any]:
    assert story.student is not None
    found = [c for c in candidates(story.student, ids, Wants(), story.bench) if c.artifact.status == "ok"]
    known = [c for c in found if c.decode is not None]
    front = front_of(known) if known else None
    accuracy = front is not None and "accuracy" in front.axes
    facts = next((row.device for row in story.bench if row.device.fingerprint in ids), None)
    about = [facts.cpu, f"{facts.cores} cores", size_text(facts.memory_bytes), facts.os] if facts else []
    points = [_point(c, story.student.student.name, accuracy) for c in known if c.accuracy or not accuracy]
    return {
        "name": name,
        "about": ", ".join(part for part in about if part),
        "virtual": facts.virtual if facts else "",
        "candidates": known,
        "front": front.files if front else (),
        "chart": front_chart(name, points, front.files if front else (), accuracy),
    }


def _point(c: Candidate, model: str, accuracy: bool) -> dict[str, Any]:
    assert c.decode is not None
    a = c.accuracy if accuracy else None
    return {
        "file": c.file,
        "name": f"{c.file.removeprefix(model).strip('-/')}, {size_text(c.artifact.size_bytes)}",
        "decode": c.decode.value,
        "predicted": c.decode.predicted,
        "y": 100 * a.accuracy if a else c.artifact.size_bytes / 1e6,
        "low": 100 * a.low if a else None,
        "high": 100 * a.high if a else None,
    }
