"""The stages of a run in sentences, and their rows as the report's tables and charts want them."""

from __future__ import annotations

from typing import Any

from arte_edge.publish.report.data import STAGES, RunData

__all__ = ["StageSummary", "accuracy_rows", "headline", "paired_lines", "score_label", "stage_summaries"]

StageSummary = dict[str, Any]

_SERIES = {"base student": 0, "tuned student": 4, "teacher": 2}
_WHAT = {
    "check": "Does the teacher know what the student does not?",
    "elicit": "The teacher drafts questions, and rationales under each reasoning technique.",
    "calibrate": "Item response theory picks the validation questions that tell students apart.",
    "prefer": "The student says which drafts it learns from.",
    "align": "The teacher learns the student's preferences.",
    "tailor": "The aligned teacher writes the training data.",
    "tune": "The student learns from it.",
    "evaluate": "Before and after, on the untouched test split.",
}


def stage_summaries(run: RunData) -> list[StageSummary]:
    """Return name, what it is for, what came of it, and what it took, of every stage that finished."""
    found = []
    for stage in STAGES:
        if (summary := run.summaries.get(stage)) is None:
            continue
        cost = run.cost.get(stage)
        found.append(
            {
                "name": stage,
                "what": _WHAT[stage],
                "result": _result(stage, summary),
                "seconds": cost.seconds if cost else None,
                "calls": cost.calls if cost else None,
                "tokens": cost.tokens if cost else None,
            }
        )
    return found


def score_label(run: RunData) -> str:
    """Return what a preference score is in this run."""
    kind = str(run.table("prefer").get("score", ""))
    name = {
        "likelihood": "mean probability of the right answer",
        "forced": "share right, answer forced",
        "accuracy": "share right, written",
    }.get(kind, "score")
    scores = [float(row["score"]) for row in run.of("prefer", "scores.jsonl")]
    if scores and max(scores) < 0:
        name = "mean log-probability of the right answer, nats"
    return name


def headline(run: RunData) -> str:
    """Return the run's result in a sentence, empty before it is evaluated."""
    summary = run.summaries.get("evaluate", {})
    rows = {(row["model"], row["setting"]): row for row in summary.get("rows", [])}
    for setting, test in summary.get("paired", {}).items():
        base, tuned = rows.get(("base student", setting)), rows.get(("tuned student", setting))
        if base and tuned:
            return (
                f"{base['accuracy']:.0%} right before, {tuned['accuracy']:.0%} after ({setting}, {tuned['n']} test "
                f"examples; {_paired(test)})."
            )
    return ""


def accuracy_rows(run: RunData) -> list[dict[str, Any]]:
    """Return the evaluation's rows, before and after beside each other, with a label and a series."""
    rows = run.summaries.get("evaluate", {}).get("rows", [])
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    ordered = sorted(rows, key=lambda row: settings.index(row["setting"]))
    return [
        {**row, "label": f"{row['model']}, {row['setting']}", "series": _SERIES.get(row["model"], 5)}
        for row in ordered
    ]


def paired_lines(run: RunData) -> list[str]:
    """Return what the paired tests say, and what of the gain is format alone."""
    summary = run.summaries.get("evaluate", {})
    lines = [
        f"{setting}: {_paired(test)}; {test['gained']} gained, {test['lost']} lost."
        for setting, test in summary.get("paired", {}).items()
    ]
    if (share := summary.get("format_share")) is not None:
        lines.append(
            f"Of the first gain {share:.0%} is format: what the base student gains when its answer is forced."
        )
    if summary.get("partial"):
        lines.append("Only a part of the test split was asked: for a look, not for a claim.")
    if (budget := summary.get("answer_budget")) is not None:
        lines.append(f"Students were cut off after {budget} tokens, the time limit of the device.")
    return lines


def _paired(test: dict[str, Any]) -> str:
    points = f"{100 * test['difference']:+.1f} points ({100 * test['low']:+.1f} to {100 * test['high']:+.1f})"
    verdict = "beyond chance" if test["p_value"] < 0.05 else "may be chance"
    return f"{points}, p = {test['p_value']:.2g}, {verdict}"


def _result(stage: str, s: dict[str, Any]) -> str:
    """Return what came of a stage; an older run may lack a figure, and says less then."""
    try:
        return _SAYS[stage](s)
    except (KeyError, TypeError, ValueError):
        return "finished"


def _check(s: dict[str, Any]) -> str:
    return (
        f"On {s['n']} validation examples the teacher had {s['teacher']['accuracy']:.0%} right, the student "
        f"{s['student']['accuracy']:.0%}, and {s['student_forced']['accuracy']:.0%} with its answer forced; "
        f"guessing gives {s['chance']:.0%}."
    )


def _elicit(s: dict[str, Any]) -> str:
    refused = sum(s["rejected"].values())
    return (
        f"{s['questions']} questions from {s['prompts']} prompts ({refused} refused), {s['rationales']} "
        f"rationales, {s['usable_rationales']} of them usable; {s['labels']['agree_with_target']:.0%} agree "
        f"with the teacher's own target."
    )


def _calibrate(s: dict[str, Any]) -> str:
    return (
        f"{s['k']} of {s['items']} questions, from {s['respondents']} respondents: discrimination "
        f"{s['discrimination_chosen']:.2f} against {s['discrimination_all']:.2f} on average."
    )


def _prefer(s: dict[str, Any]) -> str:
    text = f"{s['drafts']} drafts scored on {s['k']} questions: {s['mean']:.3f} ± {s['sd']:.3f}."
    if s.get("measured_against_bias") is not None:
        text += (
            f" The score as measured follows the answer bias that a draft induces with r = "
            f"{s['measured_against_bias']:+.2f}, the score in use with {s['score_against_bias']:+.2f}."
        )
    if s.get("over_budget"):
        text += f" {s['over_budget']} drafts are longer than the device has time for."
    return text


def _align(s: dict[str, Any]) -> str:
    stopped = f" Stopped: {s['stopped']}." if s.get("stopped") else ""
    return (
        f"{s['pairs']} pairs ({s['question_pairs']} of questions, {s['ties_dropped']} ties dropped), {s['steps']} "
        f"steps; reward margin {s['margin']:+.3f}. Chosen texts are longer in {s['lengths']['chosen_longer']:.0%} "
        f"of pairs.{stopped}"
    )


def _tailor(s: dict[str, Any]) -> str:
    text = (
        f"{s['examples']} training examples from {s['questions']} questions, {s['rationale_words']:.0f} words a "
        f"rationale on average; {s['labels']['label_changed']:.0%} of the labels were corrected by the policy "
        f"'{s['labels']['policy']}'."
    )
    return text + (
        f" {s['over_budget']} were too long for the device and left out." if s.get("over_budget") else ""
    )


def _tune(s: dict[str, Any]) -> str:
    return (
        f"{s['examples']} examples, {s['steps']} steps, loss {s['loss_first']:.2f} to {s['loss_last']:.2f}."
    )


def _evaluate(s: dict[str, Any]) -> str:
    return (
        f"{s['rows'][0]['n']} examples in {len(s['rows'])} settings; always guessing gives {s['chance']:.0%}."
    )


_SAYS = {
    "check": _check,
    "elicit": _elicit,
    "calibrate": _calibrate,
    "prefer": _prefer,
    "align": _align,
    "tailor": _tailor,
    "tune": _tune,
    "evaluate": _evaluate,
}
