"""Step 1, elicit: draft questions of the teacher, and four rationales for each (paper, section 3.1)."""

from __future__ import annotations

from arte_edge.distill.parrots import refuse_parrots
from arte_edge.distill.questions import QuestionPlan, draft_questions
from arte_edge.distill.rationales import label_rows, opinions, write_rationales
from arte_edge.distill.run import Run, Summary
from arte_edge.errors import StoppedEarly
from arte_edge.store import Stage

__all__ = ["elicit"]


def elicit(run: Run) -> Summary:
    """Write questions.jsonl, rejected.jsonl and rationales.jsonl."""
    config, teacher = run.config.elicit, run.config.teacher

    def body(stage: Stage) -> Summary:
        engine = run.engine(teacher)
        plan = QuestionPlan(
            wanted=config.questions,
            shown=config.shown,
            asked=config.asked,
            one_draw=config.one_draw,
            temperature=config.temperature,
            top_p=run.config.elicit.top_p,
            tokens=config.question_tokens,
            rouge=config.rouge,
            max_prompts=config.max_prompts,
            seed=run.config.seed,
        )
        drafts = draft_questions(run, engine, teacher, plan, "draft questions")
        rationales = write_rationales(
            run,
            engine,
            teacher,
            drafts.valid,
            run.task.techniques,
            config.rationale_tokens,
            "draft rationales",
        )
        votes = opinions(run, engine, teacher, drafts.valid, "bare answers")
        labels = label_rows(run, drafts.valid, rationales, votes, config.label)
        parroted = refuse_parrots(rationales)
        if not any(row["usable"] for row in rationales):
            raise StoppedEarly(
                f"elicit: none of {len(rationales)} rationales is usable ({labels['readable']:.0%} have a readable "
                f"answer, label policy {config.label}; {parroted} repeat one text for question after question)",
                "Raise elicit.rationale_tokens, show the teacher more worked examples (teacher.shots), "
                "or take a stronger one.",
            )
        stage.write("questions.jsonl", drafts.valid)
        stage.write("rejected.jsonl", drafts.rejected)
        stage.write("rationales.jsonl", rationales)
        return {
            "questions": len(drafts.valid),
            "rejected": drafts.reasons(),
            "prompts": drafts.prompts,
            "rationales": len(rationales),
            "usable_rationales": sum(row["usable"] for row in rationales),
            "parroted": parroted,
            "labels": labels,
        }

    inputs = {
        "elicit": config.model_dump(mode="json"),
        "teacher": run.identity(teacher),
        "task": run.task.sha256,
    }
    return run.stage("elicit", inputs, body, _say)


def _say(summary: Summary) -> str:
    refused = sum(summary["rejected"].values())
    labels, parroted = summary["labels"], summary.get("parroted", 0)  # runs from before had no such count
    parrots = f" ({parroted} parroted)" if parroted else ""
    return (
        f"{summary['questions']} questions ({refused} refused), {summary['usable_rationales']} of "
        f"{summary['rationales']} rationales usable{parrots}, {labels['agree_with_target']:.0%} agree with the target"
    )
