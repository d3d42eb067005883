"""Step 1, elicit: the teacher's draft questions, and four rationales for each (paper, section 3.1)."""

from __future__ import annotations

from arte_edge.distill.config import RunConfig
from arte_edge.distill.generation.questions import QuestionPlan, draft_questions
from arte_edge.distill.generation.rationales import (
    direct_votes,
    generate_rationales,
    label_rows,
    reject_repeated,
)
from arte_edge.distill.run_context import RunContext, Summary
from arte_edge.errors import StoppedEarly

__all__ = ["draft_plan", "elicit"]


def draft_plan(config: RunConfig) -> QuestionPlan:
    """Return how many questions are drafted, and how."""
    elicit = config.elicit
    return QuestionPlan(elicit, elicit.questions, elicit.temperature, elicit.max_prompts, config.seed)


def elicit(run: RunContext) -> Summary:
    """Write questions.jsonl, rejected.jsonl and rationales.jsonl. Raises StoppedEarly: no rationale is usable."""
    config, teacher = run.config.elicit, run.config.teacher
    inputs = {
        "elicit": config.model_dump(mode="json"),
        "teacher": run.identity(teacher),
        "task": run.task.sha256,
    }
    with run.stage("elicit", inputs, _describe) as stage:
        if stage.todo:
            engine = run.engine(teacher)
            drafts = draft_questions(run, engine, teacher, draft_plan(run.config), "draft questions")
            rationales = generate_rationales(
                run, engine, teacher, drafts.valid, run.task.techniques, "draft rationales"
            )
            votes = direct_votes(run, engine, teacher, drafts.valid, "direct answers")
            labels = label_rows(run, drafts.valid, rationales, votes, config.label)
            repeated = reject_repeated(rationales)
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
    return (
        f"{summary['questions']} questions ({rejected} rejected), {summary['usable_rationales']} of "
        f"{summary['rationales']} rationales usable{repeated}, {labels['agree_with_target']:.0%} agree with the target"
    )
