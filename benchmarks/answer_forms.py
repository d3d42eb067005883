"""What should the student write: the answer alone, the answer and then reasons, or reasons first?

    python benchmarks/answer_forms.py home_intents object_counting --seeds 0 1 2

For each task and seed the teacher reasons about the task's own labelled rows (a rationale that comes to another
answer is left out); one student a form is trained on them as `arte-edge` does in its trial, and answers the test split
through its own chat template. Tokens are those of whole answers; milliseconds are of one answer at a time from the F16
file on llama.cpp, the forms in turns on the same examples, answer-first stopped at its closed tag. One row a task,
seed and form is appended to the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from arte_edge.asking.form import FORMS, Form
from arte_edge.console import Reporter
from arte_edge.distill.config import build
from arte_edge.distill.evaluation import student_answers, student_prompts
from arte_edge.distill.run_context import RunContext
from arte_edge.distill.stages.own_labels import train_briefly, training_rows
from arte_edge.distill.stages.target import reasons_for
from arte_edge.models.resolve import LocalModel
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.stats import wilson
from arte_edge.tasks.loaders import load_task

RESULTS = Path(__file__).with_name("results") / "answer_forms" / "rows.jsonl"
TIMED = 20  # examples


def measure(options: argparse.Namespace, ref: str, seed: int) -> list[dict[str, Any]]:
    """Return a row a form."""
    task = load_task(ref)
    folder = options.work / f"{task.name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    models = {"teacher": {"model": options.teacher}, "student": {"model": options.student}}
    run = RunContext(build("answer_forms", {"seed": seed, **models}), task, folder, Reporter())
    try:
        rationales = reasons_for(run, task.seed)
        reasoned = [i for i, rationale in enumerate(rationales) if rationale]
        test = task.load_test()
        found: dict[Form, dict[str, Any]] = {}
        trained: dict[Form, LocalModel] = {}
        for form in FORMS:
            how = run.asking(form)
            used = reasoned if form == "reasoning-first" else range(len(task.seed))
            rows = training_rows(run, how, [task.seed[i] for i in used], [rationales[i] for i in used])
            trained[form] = train_briefly(run, how, rows, folder / form, form)
            engine = run.engine_with(trained[form], None, run.config.student)
            answers = student_answers(run, engine, how, test, form)
            interval = wilson(int(answers.right.sum()), len(test))
            found[form] = {
                "task": task.name,
                "seed": seed,
                "form": form,
                "rows": len(rows),
                "n": len(test),
                "accuracy": answers.accuracy,
                "low": interval.low,
                "high": interval.high,
                "answer_tokens": statistics.fmean(engine.count_tokens(text) for text in answers.texts),
                "right": "".join("01"[int(one)] for one in answers.right),
            }
        seconds: dict[Form, list[float]] = {form: [] for form in FORMS}
        for example in test[:TIMED]:
            for form in FORMS:
                how, engine = run.asking(form), run.engine_with(trained[form], None, run.config.student)
                (prompt,) = student_prompts(run, engine, how, [example])
                began = time.monotonic()
                engine.complete(
                    [Request(prompt)], Sampling(max_tokens=how.answer_tokens, stop=how.answer_stops)
                )
                seconds[form].append(time.monotonic() - began)
        return [row | {"answer_ms": 1000 * statistics.median(seconds[form])} for form, row in found.items()]
    finally:
        run.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tasks", nargs="+", help="names of shipped tasks, or task folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--student", default="smollm2-135m-instruct")
    parser.add_argument("--work", type=Path, default=Path("runs/answer-forms"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for ref in options.tasks:
        for seed in options.seeds:
            rows = measure(options, ref, seed)
            options.results.parent.mkdir(parents=True, exist_ok=True)
            with options.results.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            for row in rows:
                print(
                    f"{row['task']} seed {seed} {row['form']:<16} {row['accuracy']:.1%} "
                    f"({row['low']:.1%} to {row['high']:.1%}, n = {row['n']}), {row['answer_tokens']:.1f} tokens, "
                    f"{row['answer_ms']:.0f} ms, {row['rows']} training rows"
                )


if __name__ == "__main__":
    main()
