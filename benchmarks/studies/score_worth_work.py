"""What the study of scores works on: a teacher's drafts, the questions, and fresh ones to be judged by.

    python benchmarks/studies/score_worth_work.py draft TASK RUN       # a teacher's drafts, the preference set
    python benchmarks/studies/score_worth_work.py gather TASK RUN OUT  # all of it in one file

The outcome of a training is judged on examples that the task's generator makes anew from another seed: the
test split stays unread, and none of its questions, nor any of the other splits, is among them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from arte_edge.console import Reporter
from arte_edge.distill.config import build, parse_set
from arte_edge.distill.run_context import RunContext, open_folder
from arte_edge.distill.stages.calibrate import calibrate
from arte_edge.distill.stages.elicit import elicit
from arte_edge.store import read_jsonl
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Example

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shipped_tasks import boolean_expressions, date_understanding, home

TEACHER, STUDENT = "qwen2.5-coder-0.5b-instruct", "smollm2-135m-instruct"
OUTCOME = 400  # fresh questions
SETTINGS = {
    "home_intents": ("elicit.shown=8", "elicit.rationale_tokens=60"),
    "boolean_expressions": ("elicit.shown=6", "elicit.rationale_tokens=80"),
    "date_understanding": ("elicit.shown=4", "elicit.rationale_tokens=120"),
}
_FRESH_SEED, _SEEDS = 271_828, 4


def draft(name: str, folder: Path, questions: int, teacher: str, student: str) -> None:
    """Run elicit and calibrate, and stop there."""
    wanted = [f"task.ref={name}", f"teacher.model={teacher}", f"student.model={student}"]
    wanted += [f"elicit.questions={questions}", "elicit.top_p=0.95", "elicit.one_draw=true"]
    wanted += ["elicit.question_tokens=220", "elicit.opinion_shots=0", "elicit.max_prompts=1000"]
    config = build(name, parse_set([*wanted, "calibrate.k=40", "calibrate.items=100", *SETTINGS[name]]))
    task = load_task(name)
    folder.mkdir(parents=True, exist_ok=True)
    open_folder(config, folder, task, update=False)
    run = RunContext(config, task, folder, Reporter(folder / "events.jsonl", as_json=False))
    run.calls.group = 96  # a GPU takes more at once
    try:
        elicit(run)
        calibrate(run)
    finally:
        run.close()


def gather(name: str, folder: Path) -> dict[str, Any]:
    """Return drafts, validation questions, the preference set's place in them, and fresh questions."""
    task = load_task(name)
    questions = {row["id"]: row for row in read_jsonl(folder / "elicit" / "questions.jsonl")}
    places = {key: i for i, key in enumerate(questions)}
    drafts = [
        {
            "question": places[row["question"]],
            "input": questions[row["question"]]["input"],
            "target": questions[row["question"]]["target"],
            "answer": row["answer"],
            "technique": row["technique"],
            "text": row["text"],
        }
        for row in read_jsonl(folder / "elicit" / "rationales.jsonl")
        if row["usable"]
    ]
    inputs = [example.input for example in task.validation]
    preferred = [inputs.index(row["input"]) for row in read_jsonl(folder / "calibrate" / "preference_set.jsonl")]
    known = {example.key for example in (*task.seed, *task.validation)} | set(task.test_keys())
    fresh = [example for example in _fresh(name) if example.key not in known][:OUTCOME]
    rows = {
        split: [{"input": e.input, "target": e.target} for e in examples]
        for split, examples in (("validation", task.validation), ("outcome", fresh))
    }
    return {"task": name, "drafts": drafts, "preferred": preferred, **rows}


def _fresh(name: str) -> list[Example]:
    """Return questions from the task's generator under other seeds, each once."""
    found: dict[str, Example] = {}
    for seed in range(_FRESH_SEED, _FRESH_SEED + _SEEDS):
        if name == "home_intents":
            home.INTENT_SEED = seed
            rows = home.generate_intents()["test"]
        elif name == "boolean_expressions":
            boolean_expressions.SEED = seed
            rows = boolean_expressions.generate()["test"]
        else:
            date_understanding.SEED = seed
            rows = date_understanding.generate()["test"]
        found |= {row.key: row for row in rows}
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("verb", choices=["draft", "gather"])
    parser.add_argument("task", choices=SETTINGS)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--student", default=STUDENT)
    options = parser.parse_args()
    if options.verb == "draft":
        return draft(options.task, options.run, options.questions, options.teacher, options.student)
    work = gather(options.task, options.run)
    options.out.write_text(json.dumps(work), "utf-8")
    print({key: len(value) for key, value in work.items()})


if __name__ == "__main__":
    main()
