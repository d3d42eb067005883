"""The stages of a run in sentences, and their rows in the form of the report's tables and charts."""

from __future__ import annotations

from typing import Any

from arte_edge.publish.report.data import RunData

__all__ = ["accuracy_rows", "headline", "paired_lines", "score_label", "stage_summaries"]

_SERIES = {"base student": 0, "tuned student": 4, "teacher": 2}
_SCORES = {
    "likelihood": "mean probability of the correct answer",
    "forced": "accuracy, constrained answers",
    "accuracy": "accuracy, generated answers",
}
# Of each stage: its purpose, its result from the keys of its summary, and further sentences by the key they need.
_STAGES: dict[str, tuple[str, str, dict[str, str]]] = {
    "check": (
        "Does the teacher know what the student does not?",
        "On {n} validation examples the teacher scored {teacher[accuracy]:.0%}, the student {student[accuracy]:.0%}, "
        "and {student_forced[accuracy]:.0%} with constrained answers; the majority baseline is {chance:.0%}.",
        {},
    ),
    "elicit": (
        "The teacher generates candidate questions, and rationales under each reasoning technique.",
        "{questions} questions from {prompts} prompts ({n_rejected} rejected), {rationales} rationales, "
        "{usable_rationales} of them usable; {labels[agree_with_target]:.0%} agree with the teacher's own target.",
        {},
    ),
    "calibrate": (
        "Item response theory selects the validation questions that best discriminate between students.",
        "{k} of {items} questions, from {respondents} respondents: mean discrimination {discrimination_chosen:.2f}, "
        "of all questions {discrimination_all:.2f} (equal: no better than a random choice).",
        {},
    ),
    "prefer": (
        "The student scores which candidates help it most.",
        "{drafts} candidates scored on {k} questions: {mean:.3f} ± {sd:.3f}.",
        {
            "measured_against_bias": "The raw score correlates with the answer bias that a candidate induces with "
            "r = {measured_against_bias:+.2f}, the corrected score, which ranks, with {score_against_bias:+.2f} "
            "(0: the bias has no part in it).",
            "over_budget": "{over_budget} candidates exceed the latency budget.",
        },
    ),
    "align": (
        "DPO aligns the teacher with the student's preferences.",
        "{pairs} pairs ({question_pairs} of questions, {ties_dropped} ties dropped), {steps} steps; reward margin "
        "{margin:+.3f} (0: nothing learned). Chosen texts are longer in {lengths[chosen_longer]:.0%} of pairs.",
        {"stopped": "Stopped: {stopped}."},
    ),
    "tailor": (
        "The aligned teacher generates the training data.",
        "{examples} training examples from {questions} questions, {rationale_words:.0f} words a rationale on average; "
        "{labels[label_changed]:.0%} of the labels were corrected by the policy '{labels[policy]}'.",
        {"over_budget": "{over_budget} exceeded the latency budget and were dropped."},
    ),
    "tune": (
        "The student is fine-tuned on it.",
        "{examples} examples, {steps} steps, loss {loss_first:.2f} to {loss_last:.2f}.",
        {},
    ),
    "evaluate": (
        "Before and after, on the untouched test split.",
        "{rows[0][n]} examples in {n_settings} settings; the majority baseline is {chance:.0%}.",
        {},
    ),
}


def stage_summaries(run: RunData) -> list[dict[str, Any]]:
    """Return name, purpose, result and cost of every finished stage."""
    return [
        {
            "name": stage,
            "what": what,
            "result": _result(run.summaries[stage], text, more),
            "cost": run.cost.get(stage),
        }
        for stage, (what, text, more) in _STAGES.items()
        if stage in run.summaries
    ]


def _result(summary: dict[str, Any], text: str, more: dict[str, str]) -> str:
    """Return the result of a stage in a sentence; of an older run, which may lack a key, that it is finished."""
    try:
        values = {
            **summary,
            "n_rejected": sum(summary.get("rejected", {}).values()),
            "n_settings": len(summary.get("rows", ())),
        }
        given = {
            key: summary.get(key) for key in more
        }  # a count of 0 is left out, a correlation of 0.0 is not
        texts = [text, *(more[key] for key, value in given.items() if value or isinstance(value, float))]
        return " ".join(texts).format_map(values)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return "finished"


def score_label(run: RunData) -> str:
    """Return what a preference score is in this run."""
    scores = [float(row["score"]) for row in run.of("prefer", "scores.jsonl")]
    if scores and max(scores) < 0:
        return "mean log-probability of the correct answer, nats"
    return _SCORES.get(str(run.table("prefer").get("score", "")), "score")


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
    return [
        {**row, "label": f"{row['model']}, {row['setting']}", "series": _SERIES.get(row["model"], 5)}
        for row in sorted(rows, key=lambda row: settings.index(row["setting"]))
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
