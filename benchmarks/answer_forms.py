"""What should the student write: the answer alone, the answer and then reasons, or reasons first?

    python benchmarks/answer_forms.py home_intents object_counting --seeds 0 1 2
    python benchmarks/answer_forms.py snips=../shared/data/snips --seeds 0 1 2 --test 300

For each task and seed the teacher reasons about the task's own labelled rows (a rationale that comes to another
answer is left out); one student a form is trained on them as `arte-edge` does in its trial, and answers the test split
through its own chat template. ``name=folder`` is public data, of which each seed draws its own labelled rows as
`own_labels.py` does. Tokens are those of whole answers. Times are CPU milliseconds of one answer at a time on one
thread from the F16 file through llama-cpp-python's `create_chat_completion`, the forms in turns on the same examples,
answer-first stopped at its closed tag: with an empty cache, as the first question to a program, and with the
instruction read before, as all others. One row a task, seed and form is appended to the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from own_labels import make_task

from arte_edge.asking.form import FORMS, Asking, Form
from arte_edge.console import Reporter
from arte_edge.distill.config import build
from arte_edge.distill.evaluation import student_answers
from arte_edge.distill.run_context import RunContext
from arte_edge.distill.stages.check import train_briefly, training_rows
from arte_edge.distill.stages.target import reasons_for
from arte_edge.models.resolve import LocalModel
from arte_edge.stats import wilson
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Example, Task

RESULTS = Path(__file__).with_name("results") / "answer_forms" / "rows.jsonl"
TIMED = 20  # examples


def task_of(options: argparse.Namespace, ref: str, seed: int) -> Task:
    """Return the task that `ref` names, or one of public data with the labelled rows of a seed."""
    name, is_data, data = ref.partition("=")
    if not is_data:
        return load_task(ref)
    return make_task(name, Path(data), 0, 40, seed, options.work / "tasks" / f"{name}-{seed}")


def measure(options: argparse.Namespace, ref: str, seed: int) -> list[dict[str, Any]]:
    """Return a row a form."""
    task = task_of(options, ref, seed)
    folder = options.work / f"{task.name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    models = {"teacher": {"model": options.teacher}, "student": {"model": options.student}}
    run = RunContext(build("answer_forms", {"seed": seed, **models}), task, folder, Reporter())
    try:
        rationales = reasons_for(run, task.seed)
        reasoned = [i for i, rationale in enumerate(rationales) if rationale]
        test = task.load_test()[: options.test or None]
        found: dict[Form, dict[str, Any]] = {}
        trained: dict[Form, LocalModel] = {}
        asking = {form: run.asking(form) for form in FORMS}
        for form, how in asking.items():
            used = reasoned if form == "reasoning-first" else range(len(task.seed))
            if not used:
                raise SystemExit(f"{task.name}: no rationale of the teacher comes to the right answer")
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
        times = answer_times(asking, {form: model.path for form, model in trained.items()}, test[: TIMED + 1])
        return [row | times[form] for form, row in found.items()]
    finally:
        run.close()


def answer_times(
    how: dict[Form, Asking], files: dict[Form, Path], examples: Sequence[Example]
) -> dict[Form, dict[str, float]]:
    """Return the median CPU milliseconds of an answer of each form's file, its instruction unread and read before."""
    from llama_cpp import Llama

    models = {form: Llama(str(file), n_ctx=2048, n_threads=1, verbose=False) for form, file in files.items()}
    seconds: dict[tuple[Form, bool], list[float]] = defaultdict(list)
    for read in (False, True):
        for example in examples:
            for form, model in models.items():
                if not read:
                    model.reset()
                began = time.process_time()
                model.create_chat_completion(
                    [{"role": "user", "content": example.input}],
                    temperature=0.0,
                    max_tokens=how[form].answer_tokens,
                    stop=list(how[form].answer_stops),
                )
                seconds[form, read].append(time.process_time() - began)
    for model in models.values():
        model.close()
    return {
        form: {
            key: 1000 * statistics.median(seconds[form, read][1:])  # the first warms up
            for key, read in (("first_answer_ms", False), ("answer_ms", True))
        }
        for form in models
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tasks", nargs="+", help="names or folders of tasks, or name=folder of data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--student", default="smollm2-135m-instruct")
    parser.add_argument("--test", type=int, default=0, help="so many test examples; 0: all")
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
                    f"{row['first_answer_ms']:.0f} ms, {row['answer_ms']:.0f} with the instruction read before, "
                    f"{row['rows']} training rows"
                )


if __name__ == "__main__":
    main()
