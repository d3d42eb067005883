"""A run as one self-contained HTML page, with its charts inline.

The page loads nothing from any network, follows the reader's light or dark setting, and can be
printed. All model-generated text in it is escaped.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge import __version__
from arte_edge.asking.form import tagged
from arte_edge.cache import megabytes, write_atomic
from arte_edge.files import user_path
from arte_edge.publish.recommend.candidates import Constraints, candidates
from arte_edge.publish.recommend.pareto import Candidate, pareto_front
from arte_edge.publish.report.charts import (
    accuracy_chart,
    histogram_chart,
    length_chart,
    loss_chart,
    pareto_chart,
    questions_chart,
    time_chart,
    trace_of,
    traced,
)
from arte_edge.publish.report.data import RunData, read_run
from arte_edge.publish.report.narrative import (
    accuracy_rows,
    evaluation_notes,
    headline,
    score_label,
    stage_summaries,
    training_data,
)
from arte_edge.results.locate import find_run
from arte_edge.results.rows import SpeedRow

__all__ = ["ReportPage", "render", "report"]

_TEMPLATES = Path(__file__).parent / "templates"
_EXAMPLES = 4


@dataclass(frozen=True)
class ReportPage:
    """The page of one run: where it was written, its HTML, and what the run does not have yet."""

    path: Path
    html: str
    missing: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        """Show the page in a frame, so that its styles stay its own."""
        from html import escape

        return f'<iframe srcdoc="{escape(self.html, quote=True)}" width="100%" height="720" style="border:0"></iframe>'


def report(run: str | Path, *, out: str | Path | None = None) -> ReportPage:
    """Write a run's report as one HTML page; a run that is not finished has one too.

    Args:
        run: the run's folder, or its name under ``runs/``.
        out: where to write it; None: ``report.html`` in the run's folder.

    Raises:
        InputError: no run there, one of its files is damaged, or `out` cannot be written.
        ArteError: the disk is full.
    """
    found = read_run(str(run))
    path = user_path(out) if out is not None else find_run(run) / "report.html"
    page = ReportPage(path, render(found), tuple(found.missing))
    write_atomic(page.path, page.html.encode("utf-8", errors="replace"))
    return page


def render(run: RunData) -> str:
    """Return the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = megabytes
    model = run.student.student.name if run.student else ""
    environment.filters["short"] = lambda file: file.removeprefix(model).lstrip("-") or file
    return environment.get_template("report.html.j2").render(**_context(run))


def _context(run: RunData) -> dict[str, Any]:
    scores, questions = run.of("prefer", "scores.jsonl"), run.of("prefer", "questions.jsonl")
    evaluation = run.summaries.get("evaluate", {})
    budget = run.deploy["budget"]["answer_tokens"] if run.deploy else None
    rows = accuracy_rows(run)
    return {
        "run": run,
        "version": __version__,
        "headline": headline(run),
        "stages": stage_summaries(run),
        "settings": _settings(run),
        "time": time_chart({name: cost.seconds for name, cost in run.cost.items()}),
        "scores": histogram_chart([float(row["score"]) for row in scores], "preference score", "candidates"),
        "score_label": score_label(run),
        "questions": questions_chart(scores, questions),
        "length": length_chart(scores, budget),
        "training": [
            loss_chart(run.of("align", "adapter/log.jsonl"), "rewards/margins", "reward margin", "align"),
            loss_chart(run.of("tune", "student/log.jsonl"), "loss", "loss", "tune"),
        ],
        "accuracy": accuracy_chart(rows, evaluation.get("chance")),
        "accuracy_rows": rows,
        "notes": evaluation_notes(run),
        "candidates": sorted((r for r in scores if r["technique"] >= 0), key=lambda row: -row["score"]),
        "n_examples": _EXAMPLES,
        "n_train": len(run.of("tailor", "train.jsonl")),
        "train": (train := run.of("tailor", "train.jsonl")[:_EXAMPLES]),
        "training_data": training_data(run),
        "reasons": any(row["rationale"] != tagged(row["label"]) for row in train),
        "artifacts": run.student.artifacts if run.student else (),
        "devices": _devices(run),
        "traces": [trace_of(row) for row in traced([r for r in run.bench if isinstance(r, SpeedRow)])],
        "bad_rows": [row for row in run.bench if row.status != "ok"],
        "missing": run.missing,
        "budget": run.deploy,
    }


def _settings(run: RunData) -> list[tuple[str, str]]:
    """Return the settings that define a run, as pairs of name and value."""
    student, teacher = run.table("student"), run.table("teacher")
    pairs = [
        ("task", run.table("task").get("ref", "")),
        ("teacher", teacher.get("model", "")),
        ("student", student.get("model", "")),
        ("trained on", run.config.get("data", "")),
        ("seed", run.config.get("seed", "")),
        ("preference score", run.table("prefer").get("score", "")),
    ]
    if run.student is not None:
        count = run.student.student.parameter_count
        pairs.append(("student's parameters", f"{count / 1e6:.0f} million"))
    return [(name, str(value)) for name, value in pairs if value != ""]


def _devices(run: RunData) -> list[dict[str, Any]]:
    """Return a Pareto front and a table for every device with measurements."""
    if run.student is None:
        return []
    names: dict[str, set[str]] = defaultdict(set)
    for speed in (speed for artifact in run.student.artifacts for speed in artifact.speeds):
        names[speed.device] |= speed.names
    for row in run.bench:
        names[row.device.profile or row.device.fingerprint] |= row.device.names
    return [
        _device(run, name, frozenset(ids))
        for name, ids in sorted(names.items())
        if not any(name in other for key, other in names.items() if key != name)
    ]


def _device(run: RunData, name: str, ids: frozenset[str]) -> dict[str, Any]:
    assert run.student is not None
    found = [c for c in candidates(run.student, ids, Constraints(), run.bench) if c.artifact.status == "ok"]
    known = [c for c in found if c.decode is not None]
    front = pareto_front(known)
    accuracy = "accuracy" in front.axes
    facts = next((row.device for row in run.bench if row.device.fingerprint in ids), None)
    about = [facts.cpu, f"{facts.cores} cores", megabytes(facts.memory_bytes), facts.os] if facts else []
    points = [_point(c, run.student.student.name, accuracy) for c in known if c.accuracy or not accuracy]
    return {
        "name": name,
        "about": ", ".join(part for part in about if part),
        "virtual": facts.virtual if facts else "",
        "candidates": known,
        "notes": [f"{c.file}: {note}" for c in found for note in c.notes],
        "front": front.files,
        "chart": pareto_chart(name, points, front.files, accuracy),
    }


def _point(c: Candidate, model: str, accuracy: bool) -> dict[str, Any]:
    assert c.decode is not None
    a = c.accuracy if accuracy else None
    return {
        "file": c.file,
        "name": f"{c.file.removeprefix(model).strip('-/')}, {megabytes(c.artifact.size_bytes)}",
        "decode": c.decode.value,
        "predicted": c.decode.predicted,
        "y": 100 * a.accuracy if a else c.artifact.size_bytes / 1e6,
        "low": 100 * a.low if a else None,
        "high": 100 * a.high if a else None,
    }
