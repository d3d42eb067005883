"""A run as one self-contained HTML page, with its charts inline.

The page loads nothing from any network, follows the reader's light or dark setting, and can be
printed. All model-generated text in it is escaped.
"""

from __future__ import annotations

import tomllib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge import __version__
from arte_edge.asking.form import tagged
from arte_edge.cache import megabytes, write_atomic
from arte_edge.distill.config import UNALIGNED
from arte_edge.files import user_path
from arte_edge.publish.recommend.candidates import Candidate, Constraints, candidates, pareto_front
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
from arte_edge.publish.report.data import RunData, read_run, stages_of
from arte_edge.results.comparison import AS_ASKED, BASE, OWN, OWN_ALL, TEACHER, TUNED, comparison_of
from arte_edge.results.comparison import headline as first_line
from arte_edge.results.rows import SpeedRow
from arte_edge.results.student_json import find_run

_SERIES = {BASE: 0, OWN: 1, OWN_ALL: 3, TUNED: 4, TEACHER: 2}
_TEXTS = tomllib.loads((Path(__file__).parent / "templates" / "narrative.toml").read_text("utf-8"))
_FORMS: dict[str, str] = _TEXTS["forms"]


def stage_summaries(run: RunData) -> list[dict[str, Any]]:
    """Return name, purpose, result and cost of every finished stage; of several rounds, which student was kept."""
    names = [name for name in stages_of(run.config) if name in run.summaries]
    if "tune-1" in names and "tune" in names:
        names.remove("tune")  # a copy of the best round's
    return [_stage(run, name) for name in names]


def _stage(run: RunData, name: str) -> dict[str, Any]:
    summary = run.summaries[name]
    stage, _, number = name.partition("-")
    texts = _TEXTS["stages"]["elicit-bare" if stage == "elicit" and not _reasoned(summary) else stage]
    what, result = texts["purpose"], _result(summary, texts["result"], texts.get("more", {}))
    if number and stage == "tune" and summary == run.summaries.get("tune"):
        result += " This is the run's student."
    if number not in ("", "1") and stage == "tailor":
        what = "The teacher generates more, above all for the answers that the student got wrong."
    return {"name": name, "what": what, "result": result, "cost": run.cost.get(name)}


def _result(summary: dict[str, Any], text: str, more: dict[str, str]) -> str:
    """Return the result of a stage in a sentence; of an older run, which may lack a key, that it is finished."""
    try:
        labels = summary.get("labels", {})
        values = {
            "student_constrained": summary.get("student_forced"),  # its name in older runs
            **{key: value for key, value in labels.items() if key != "policy"},
            **summary,
            "n_rejected": sum(summary.get("rejected", {}).values()),
            "n_rows": len(rows) if isinstance(rows := summary.get("rows", ()), list) else 0,
            "form_text": _FORMS.get(str(summary.get("form")), ""),
            "role_text": _TEXTS["roles"].get(summary.get("role"), ""),
            "trials": _trials(summary.get("trial") or summary),
            "reason_words": summary.get("rationale_words") if _reasoned(summary) else None,
            "gain": summary.get("fresh", {}).get("gain"),
            "share": summary["right"] / summary["n"] if "right" in summary else None,
        }
        # A count of 0 is left out, a correlation of 0.0 is not; a share of 0.0 of the labels is.
        shown = [k for k in more if values.get(k) or (isinstance(values.get(k), float) and k not in labels)]
        return " ".join([text, *(more[key] for key in shown)]).format_map(values)
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        return "finished"


def _reasoned(summary: dict[str, Any]) -> bool:
    """Return whether the teacher gave reasons: it does not where the student gives the answer alone."""
    return bool(summary.get("labels", {}).get("readable", True))


def _trials(trial: dict[str, Any]) -> str:
    """Return the outcome of a trial of forms, empty for a summary that is none."""
    if "tokens" not in trial:
        return ""
    tried = [
        f"{_FORMS.get(form, form)} {accuracy:.0%} (about {trial['tokens'][form]:.0f} tokens)"
        for form, accuracy in trial["accuracy"].items()
    ]
    if len(tried) == 1:
        tried.append(f"only {trial['with_reasons']} rows had reasons, too few to try another form")
    return "; ".join(tried)


def score_label(run: RunData) -> str:
    """Return what a preference score is in this run."""
    scores = [float(row["score"]) for row in run.of("prefer", "scores.jsonl")]
    if scores and max(scores) < 0:
        return "mean log-probability of the correct answer, nats"
    return str(_TEXTS["scores"].get(str(run.table("prefer").get("score")), "score"))


def headline(run: RunData) -> list[str]:
    """Return the run's result in sentences, that against the user's own labels first; none before it is evaluated."""
    summary = run.summaries.get("evaluate", {})
    rows = {(row["model"], row["setting"]): row for row in summary.get("rows", [])}
    test: dict[str, Any] = next((test for test in summary.get("paired", ()) if test["against"] == BASE), {})
    setting = test.get("setting")
    base, tuned = rows.get((BASE, setting)), rows.get((TUNED, setting))
    if not (base and tuned):
        return []
    points = f"{100 * test['difference']:+.1f} points ({100 * test['low']:+.1f} to {100 * test['high']:+.1f})"
    gain = f"{points}, p = {test['p_value']:.2g}, {'' if test['p_value'] < 0.05 else 'not '}significant"
    before = f"Accuracy {base['accuracy']:.0%} before, {tuned['accuracy']:.0%} after"
    return [first_line(summary), f"{before} ({setting}, {tuned['n']} test examples; {gain})."]


def accuracy_rows(run: RunData) -> list[dict[str, Any]]:
    """Return the evaluation's rows in the order of the closing table, with a label, a series and the difference."""
    return [
        {
            **row.model_dump(),
            "label": row.model if row.setting == AS_ASKED else f"{row.model}, {row.setting}",
            "series": _SERIES.get(row.model, 5),
            "shown": row.with_slots.replace("%", " %"),
            "points": row.difference_points,
        }
        for row in comparison_of(run.summaries.get("evaluate") or {"rows": [], "paired": []})
    ]


def evaluation_notes(run: RunData) -> list[str]:
    """Return what belongs below the table: answer form, the share of the gain that is only format, limits."""
    summary, lines = run.summaries.get("evaluate", {}), []
    if summary.get("rows"):
        lines.append("Tuned minus it: the paired difference in points, with its 95 % interval.")
    if (form := summary.get("form")) in _FORMS:
        lines.append(f"The tuned student writes {_FORMS[form]}.")
    if (share := summary.get("format_share")) is not None:
        lines.append(f"Of the gain on the base student {share:.0%} is format: its gain by constrained answers.")
    if summary.get("partial"):
        lines.append("Only part of the test split was evaluated: for orientation, not as evidence.")
    if (budget := summary.get("answer_budget")) is not None:
        lines.append(f"Answers were cut off after {budget} tokens, the latency budget of the device.")
    return lines


def training_data(run: RunData) -> str:
    """Return what the training data are, in a few words."""
    if run.summaries.get("check", {}).get("role") == "inputs":
        return "inputs that the teacher wrote for given answers"
    return f"examples generated by the {'' if run.config.get('data') in UNALIGNED else 'aligned '}teacher"


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
