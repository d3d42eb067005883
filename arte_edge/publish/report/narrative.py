"""The stages of a run in sentences, and their rows in the form of the report's tables and charts."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from arte_edge.distill.config import UNALIGNED
from arte_edge.publish.report.data import RunData, stages_of
from arte_edge.results.comparison import AS_ASKED, BASE, OWN, OWN_ALL, TEACHER, TUNED, comparison_of
from arte_edge.results.comparison import headline as first_line

__all__ = ["accuracy_rows", "evaluation_notes", "headline", "score_label", "stage_summaries", "training_data"]

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
        lines.append(
            f"Of the gain on the base student {share:.0%} is format: its gain by constrained answers."
        )
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
