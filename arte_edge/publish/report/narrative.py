"""The stages of a run in sentences, and their rows in the form of the report's tables and charts."""

from __future__ import annotations

from typing import Any

from arte_edge.publish.report.data import STAGES, RunData

__all__ = ["StageSummary", "accuracy_rows", "headline", "paired_lines", "score_label", "stage_summaries"]

StageSummary = dict[str, Any]

_SERIES = {"base student": 0, "tuned student": 4, "teacher": 2}
_WHAT = {
    "check": "Does the teacher know what the student does not?",
    "elicit": "The teacher generates candidate questions, and rationales under each reasoning technique.",
    "calibrate": "Item response theory selects the validation questions that best discriminate between students.",
    "prefer": "The student scores which candidates help it most.",
    "align": "DPO aligns the teacher with the student's preferences.",
    "tailor": "The aligned teacher generates the training data.",
    "tune": "The student is fine-tuned on it.",
    "evaluate": "Before and after, on the untouched test split.",
}


def stage_summaries(run: RunData) -> list[StageSummary]:
    """Return name, purpose, result and cost of every finished stage."""
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
        "likelihood": "mean probability of the correct answer",
        "forced": "accuracy, constrained answers",
        "accuracy": "accuracy, generated answers",
    }.get(kind, "score")
    scores = [float(row["score"]) for row in run.of("prefer", "scores.jsonl")]
    if scores and max(scores) < 0:
        name = "mean log-probability of the correct answer, nats"
    return name


def headline(run: RunData) -> str:
    """Return the run's result in a sentence, empty before it is evaluated."""
    summary = run.summaries.get("evaluate", {})
    rows = {(row["model"], row["setting"]): row for row in summary.get("rows", [])}
    for setting, test in summary.get("paired", {}).items():
        base, tuned = rows.get(("base student", setting)), rows.get(("tuned student", setting))
        if base and tuned:
            return (
                f"Accuracy {base['accuracy']:.0%} before, {tuned['accuracy']:.0%} after ({setting}, {tuned['n']} test "
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
    """Return the paired tests, and the share of the gain that is only format."""
    summary = run.summaries.get("evaluate", {})
    lines = [
        f"{setting}: {_paired(test)}; {test['gained']} gained, {test['lost']} lost."
        for setting, test in summary.get("paired", {}).items()
    ]
    if (share := summary.get("format_share")) is not None:
        lines.append(
            f"Of the first gain {share:.0%} is format: what the base student gains with constrained answers."
        )
    if summary.get("partial"):
        lines.append("Only part of the test split was evaluated: for orientation, not as evidence.")
    if (budget := summary.get("answer_budget")) is not None:
        lines.append(f"Answers were cut off after {budget} tokens, the latency budget of the device.")
    return lines


def _paired(test: dict[str, Any]) -> str:
    points = f"{100 * test['difference']:+.1f} points ({100 * test['low']:+.1f} to {100 * test['high']:+.1f})"
    verdict = "significant" if test["p_value"] < 0.05 else "not significant"
    return f"{points}, p = {test['p_value']:.2g}, {verdict}"


def _result(stage: str, s: dict[str, Any]) -> str:
    """Return the result of a stage in a sentence; an older run may lack a number, then it is just finished."""
    try:
        return _SAYS[stage](s)
    except (KeyError, TypeError, ValueError):
        return "finished"


def _check(s: dict[str, Any]) -> str:
    return (
        f"On {s['n']} validation examples the teacher scored {s['teacher']['accuracy']:.0%}, the student "
        f"{s['student']['accuracy']:.0%}, and {s['student_forced']['accuracy']:.0%} with constrained answers; "
        f"the random baseline is {s['chance']:.0%}."
    )


def _elicit(s: dict[str, Any]) -> str:
    rejected = sum(s["rejected"].values())
    return (
        f"{s['questions']} questions from {s['prompts']} prompts ({rejected} rejected), {s['rationales']} "
        f"rationales, {s['usable_rationales']} of them usable; {s['labels']['agree_with_target']:.0%} agree "
        f"with the teacher's own target."
    )


def _calibrate(s: dict[str, Any]) -> str:
    return (
        f"{s['k']} of {s['items']} questions, from {s['respondents']} respondents: discrimination "
        f"{s['discrimination_chosen']:.2f} against {s['discrimination_all']:.2f} on average."
    )


def _prefer(s: dict[str, Any]) -> str:
    text = f"{s['drafts']} candidates scored on {s['k']} questions: {s['mean']:.3f} ± {s['sd']:.3f}."
    if s.get("measured_against_bias") is not None:
        text += (
            f" The raw score correlates with the answer bias that a candidate induces with r = "
            f"{s['measured_against_bias']:+.2f}, the corrected score with {s['score_against_bias']:+.2f}."
        )
    if s.get("over_budget"):
        text += f" {s['over_budget']} candidates exceed the latency budget."
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
        f" {s['over_budget']} exceeded the latency budget and were dropped." if s.get("over_budget") else ""
    )


def _tune(s: dict[str, Any]) -> str:
    return (
        f"{s['examples']} examples, {s['steps']} steps, loss {s['loss_first']:.2f} to {s['loss_last']:.2f}."
    )


def _evaluate(s: dict[str, Any]) -> str:
    n_settings = len(s["rows"])
    return f"{s['rows'][0]['n']} examples in {n_settings} settings; the random baseline is {s['chance']:.0%}."


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
