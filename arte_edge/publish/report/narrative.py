"""The stages of a run in sentences, and their rows in the form of the report's tables and charts."""

from __future__ import annotations

from typing import Any

from arte_edge.publish.report.data import RunData, stages_of
from arte_edge.results.comparison import AS_ASKED, BASE, OWN, OWN_ALL, TEACHER, TUNED, comparison_of
from arte_edge.results.comparison import headline as first_line

__all__ = ["accuracy_rows", "evaluation_notes", "headline", "score_label", "stage_summaries", "training_data"]

_SERIES = {BASE: 0, OWN: 1, OWN_ALL: 3, TUNED: 4, TEACHER: 2}
_FORMS = {
    "answer": "the answer alone",
    "answer-first": "the answer, then the reasons",
    "reasoning-first": "the reasons, then the answer",
}
_ROLES = {
    "labels": "The teacher labels",
    "inputs": "The teacher writes inputs for given answers and does not label",
}
_SCORES = {
    "likelihood": "mean probability of the correct answer",
    "forced": "accuracy, constrained answers",
    "accuracy": "accuracy, generated answers",
}
_VOTES = "Its own answer to them agrees with {votes_agree:.0%} of the labels that they were written with."
# Of drafts for a student that gives the answer alone.
_BARE_DRAFTS = (
    "The teacher generates candidate questions.",
    "{questions} questions from {prompts} prompts ({n_rejected} rejected), {usable_rationales} of them labelled.",
)
# Of each stage: its purpose, its result from the keys of its summary, and further sentences by the key they need.
_STAGES: dict[str, tuple[str, str, dict[str, str]]] = {
    "check": (
        "What is this teacher good for?",
        "On {n} validation examples the teacher was right on {teacher[accuracy]:.0%}, the untrained student on "
        "{student[accuracy]:.0%}, and on {student_constrained[accuracy]:.0%} with constrained answers; the majority "
        "baseline is {chance:.0%}.",
        {
            "own_labels": "Trained on your {own_labels[rows]} labels alone it was right on {own_labels[accuracy]:.0%}.",
            "role": "{role_text}: {why}.",
        },
    ),
    "target": (
        "A short trial: what should the student write?",
        "It writes {form_text}. Trained on the same {rows} rows, right on {n} validation examples: {trials}.",
        {},
    ),
    "elicit": (
        "The teacher generates candidate questions, and rationales under each reasoning technique.",
        "{questions} questions from {prompts} prompts ({n_rejected} rejected), {rationales} rationales, "
        "{usable_rationales} of them usable; {labels[agree_with_target]:.0%} agree with the teacher's own target.",
        {"votes_agree": _VOTES},
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
        "The teacher generates the training data.",
        "{examples} training examples from {questions} questions.",
        {
            "reason_words": "A rationale has {reason_words:.0f} words on average.",
            "votes_agree": _VOTES,
            "label_changed": "{label_changed:.0%} of the labels were corrected by the policy '{labels[policy]}'.",
            "questions_dropped": "{questions_dropped:.0%} of the questions were dropped.",
            "over_budget": "{over_budget} exceeded the latency budget and were dropped.",
        },
    ),
    "tune": (
        "The student is fine-tuned.",
        "{examples} examples, {steps} steps, loss {loss_first:.2f} to {loss_last:.2f}.",
        {
            "own_labels": "{own_labels} of the examples are your own labels.",
            "trial": "A short trial decided what it writes: {trials}.",
            "form": "It writes {form_text}.",
        },
    ),
    "validate": (
        "The student of this round on the validation examples.",
        "{right} of {n} right ({share:.0%}).",
        {},
    ),
    "evaluate": (
        "Every model on the untouched test split.",
        "{rows[0][n]} examples, {n_rows} models and settings; the majority baseline is {chance:.0%}.",
        {},
    ),
}


def stage_summaries(run: RunData) -> list[dict[str, Any]]:
    """Return name, purpose, result and cost of every finished stage; of several rounds, which student was kept."""
    names = [name for name in stages_of(run.config) if name in run.summaries]
    if "tune-1" in names and "tune" in names:
        names.remove("tune")  # a copy of the best round's
    return [_stage(run, name) for name in names]


def _stage(run: RunData, name: str) -> dict[str, Any]:
    summary = run.summaries[name]
    stage, _, number = name.partition("-")
    what, text, more = _STAGES[stage]
    if stage == "elicit" and not _reasoned(summary):
        what, text = _BARE_DRAFTS
    result = _result(summary, text, more)
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
            "form_text": _FORMS.get(summary.get("form", ""), ""),
            "role_text": _ROLES.get(summary.get("role", ""), ""),
            "trials": _trials(summary.get("trial") or summary),
            "reason_words": summary.get("rationale_words") if _reasoned(summary) else None,
            "share": summary["right"] / summary["n"] if "right" in summary else None,
        }
        # A count of 0 is left out, a correlation of 0.0 is not; a share of 0.0 of the labels is.
        given = {key: values.get(key) for key in more}
        shown = [
            key for key, value in given.items() if value or (isinstance(value, float) and key not in labels)
        ]
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
    few = (
        ""
        if len(tried) > 1
        else f"; only {trial['with_reasons']} rows had reasons, too few to try another form"
    )
    return "; ".join(tried) + few


def score_label(run: RunData) -> str:
    """Return what a preference score is in this run."""
    scores = [float(row["score"]) for row in run.of("prefer", "scores.jsonl")]
    if scores and max(scores) < 0:
        return "mean log-probability of the correct answer, nats"
    return _SCORES.get(str(run.table("prefer").get("score", "")), "score")


def headline(run: RunData) -> list[str]:
    """Return the run's result in sentences, that against the user's own labels first; none before it is evaluated."""
    summary = run.summaries.get("evaluate", {})
    rows = {(row["model"], row["setting"]): row for row in summary.get("rows", [])}
    tests = {(test["against"], test["setting"]): test for test in summary.get("paired", ())}
    for (against, setting), test in tests.items():
        base, tuned = rows.get((BASE, setting)), rows.get((TUNED, setting))
        if against == BASE and base and tuned:
            return [
                first_line(summary),
                f"Accuracy {base['accuracy']:.0%} before, {tuned['accuracy']:.0%} after ({setting}, {tuned['n']} test "
                f"examples; {_paired(test)}).",
            ]
    return []


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
            f"Of the gain on the base student {share:.0%} is format: what that gains with constrained answers."
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
    return f"examples generated by the {'' if run.config.get('data') == 'original-teacher' else 'aligned '}teacher"


def _paired(test: dict[str, Any]) -> str:
    points = f"{100 * test['difference']:+.1f} points ({100 * test['low']:+.1f} to {100 * test['high']:+.1f})"
    verdict = "significant" if test["p_value"] < 0.05 else "not significant"
    return f"{points}, p = {test['p_value']:.2g}, {verdict}"
