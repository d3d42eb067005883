"""Step 1, elicit: the teacher's draft questions, and four rationales for each (paper, section 3.1)."""

from __future__ import annotations

from arte_edge.distill.config import RunConfig
from arte_edge.distill.generation.inputs import Focus, InputSource, focus_of
from arte_edge.distill.generation.questions import (
    DraftSource,
    QuestionPlan,
    QuestionSource,
    draft_questions,
    elicit_inputs,
)
from arte_edge.distill.generation.rationales import label_drafts, reject_repeated
from arte_edge.distill.run_context import RunContext, Summary
from arte_edge.errors import StoppedEarly
from arte_edge.runtimes.completion import Engine


def draft_plan(config: RunConfig) -> QuestionPlan:
    """Return how many questions are drafted, and how."""
    elicit = config.elicit
    return QuestionPlan(elicit, elicit.questions, elicit.temperature, elicit.max_prompts, config.seed)


def draft_source(run: RunContext, engine: Engine, plan: QuestionPlan, focus: Focus) -> DraftSource:
    """Return how the teacher is asked for drafts: told an answer where the task has fixed ones, else in tags."""
    if run.by_label:
        return InputSource(run, engine, plan, focus)
    return QuestionSource(run, engine, plan)


def first_focus(run: RunContext) -> Focus:
    """Return which answers the student of the own labels confused in the check: near misses are written for them."""
    if not run.by_label:
        return Focus()
    rows = run.read("check", "answers.jsonl")
    return focus_of(((row["target"], row["own_labels"]) for row in rows if "own_labels" in row), weighted=False)


def focus_inputs(run: RunContext) -> Summary:
    """Return what the check decides of drafts: the near misses, where there are any."""
    confused = first_focus(run).confused
    return {"confused": confused} if confused else {}


def elicit(run: RunContext) -> Summary:
    """Write questions.jsonl, rejected.jsonl and rationales.jsonl. Raises StoppedEarly: no rationale is usable."""
    config, teacher = run.config.elicit, run.config.teacher
    inputs = {
        "elicit": elicit_inputs(run),
        "teacher": run.identity(teacher),
        "task": run.task.sha256,
        **run.data_inputs(),
        **focus_inputs(run),
    }
    with run.stage("elicit", inputs, _describe) as stage:
        if stage.todo:
            engine = run.engine(teacher)
            plan = draft_plan(run.config)
            source = draft_source(run, engine, plan, first_focus(run))
            drafts = draft_questions(run, engine, plan, "draft questions", source)
            rationales, labels = label_drafts(run, engine, drafts.valid, run.task.techniques, config.label, "draft")
            repeated = reject_repeated(rationales) if run.reasons else 0
            if not any(row["usable"] for row in rationales):
                raise StoppedEarly(
                    f"elicit: none of {len(rationales)} rationales is usable ({labels['readable']:.0%} have a "
                    f"readable answer, label policy {config.label}; {repeated} repeat one text for many questions)",
                    "Raise elicit.rationale_tokens, give the teacher more few-shot examples (teacher.shots), "
                    "or use a stronger one.",
                )
            stage.write("questions.jsonl", drafts.valid)
            stage.write("rejected.jsonl", drafts.rejected)
            stage.write("rationales.jsonl", rationales)
            stage.finish(
                {
                    "questions": len(drafts.valid),
                    "rejected": drafts.reasons(),
                    "prompts": drafts.prompts,
                    "rationales": len(rationales),
                    "usable_rationales": sum(row["usable"] for row in rationales),
                    "parroted": repeated,
                    "labels": labels,
                }
            )
    return stage.summary


def _describe(summary: Summary) -> str:
    rejected = sum(summary["rejected"].values())
    labels, n_repeated = summary["labels"], summary.get("parroted", 0)  # older runs have no such count
    repeated = f" ({n_repeated} repeated)" if n_repeated else ""
    if not labels["readable"]:
        return f"{summary['questions']} questions ({rejected} rejected), {summary['usable_rationales']} labelled"
    return (
        f"{summary['questions']} questions ({rejected} rejected), {summary['usable_rationales']} of "
        f"{summary['rationales']} rationales usable{repeated}, {labels['agree_with_target']:.0%} agree with the target"
    )
