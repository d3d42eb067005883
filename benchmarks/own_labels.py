"""Is a student of tailored data better than one of the user's own labels? On public data, full test splits.

    python benchmarks/own_labels.py snips --data ../shared/data/snips --own 40 --seeds 0 1 2
    python benchmarks/own_labels.py banking77 --data ../shared/data/banking77 --labels 20 --own 60 --seeds 0 1 2
    python benchmarks/own_labels.py --summary benchmarks/results/own_labels/rows.jsonl

Each seed draws its own labelled rows, 100 validation rows and, of a set with many labels, the labels' rows from
``train.jsonl`` (rows of input and target); the test split is ``test.jsonl``, of those labels, read after all
training. Arms, paired on the same test examples: own labels alone (as `arte-edge` trains it for its check), those and
the validation rows, tailored data of round 1 added to the own labels, and round 2, which asks for more where round 1
errs on validation and is kept only if validation accuracy rises. One row a seed is appended to the results; the
summary pools the seeds; its second interval also holds that other seeds would differ.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import arte_edge as ae
from arte_edge.asking.form import Asking
from arte_edge.console import Reporter
from arte_edge.models.resolve import from_folder
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.loader import open_local
from arte_edge.runtimes.prompt_render import render
from arte_edge.stats import mcnemar, over_seeds_and_questions, wilson
from arte_edge.tasks.answers import matches
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Task, content_key

RESULTS = Path(__file__).with_name("results") / "own_labels" / "rows.jsonl"
LABELS_SEED = 7  # which labels of a set with many: the same ones for every seed
ABOUT = {
    "snips": "Say which intent a request to a voice assistant has",
    "banking77": "Say which intent a bank customer's message has",
}
ARMS = {
    "own labels": "check/own-labels",
    "own labels + validation": "evaluate/own-labels-all",
    "round 1": "tune-1/student",
    "round 2": "tune/student",
}


def make_task(name: str, data: Path, n_label: int, n_own: int, seed: int, out: Path) -> Task:
    """Write the task of a seed to `out` and load it."""
    rows, test = (
        [json.loads(line) for line in (data / f"{split}.jsonl").read_text("utf-8").splitlines()]
        for split in ("train", "test")
    )
    labels = sorted({row["target"] for row in rows})
    if n_label:
        labels = sorted(random.Random(LABELS_SEED).sample(labels, n_label))
    rng = random.Random(seed)
    rng.shuffle(rows)
    by_label: dict[str, list[dict[str, Any]]] = defaultdict(list)
    seen = {content_key(row["input"]) for row in test}
    for row in rows:
        if row["target"] in labels and content_key(row["input"]) not in seen:
            seen.add(content_key(row["input"]))
            by_label[row["target"]].append(row)
    own = [by_label[labels[i % len(labels)]].pop() for i in range(n_own)]
    rest = [row for label in labels for row in by_label[label]]
    rng.shuffle(rest)
    once = {content_key(row["input"]): row for row in test if row["target"] in labels}
    out.mkdir(parents=True, exist_ok=True)
    for split, part in (("seed", own), ("validation", rest[:100]), ("test", list(once.values()))):
        lines = [json.dumps({"input": row["input"], "target": row["target"]}) for row in part]
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    techniques = ["Say what is asked for.", "Name the key words.", "Rule out other intents.", "Say it briefly."]
    (out / "task.toml").write_text(
        f'name = "{out.name}"\ndescription = "{ABOUT[name]}: {", ".join(labels)}."\n'
        f'techniques = {json.dumps(techniques)}\n\n[answer]\nkind = "choice"\nchoices = {json.dumps(labels)}\n',
        "utf-8",
    )
    return load_task(str(out))


def answers(folder: Path, task: Task) -> list[bool]:
    """Return which test examples a student answers right, asked with the bare input through its own template."""
    engine = open_local(from_folder(folder, folder.parent.name), kind="transformers", parallel=64)
    try:
        how = Asking.of(task, "answer", engine.count_tokens)
        test = task.load_test()
        requests = [Request(render(engine, how.messages(example.input))) for example in test]
        done = engine.complete(requests, Sampling(max_tokens=how.answer_tokens, stop=how.answer_stops))
        return [
            matches(how.read(one.text), example.target, task.answer) for one, example in zip(done, test, strict=True)
        ]
    finally:
        engine.close()


def measure(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Run one seed; resumes where it stopped."""
    name = f"{options.task}-{options.own}-{seed}"
    task = make_task(options.task, options.data, options.labels, options.own, seed, options.work / "tasks" / name)
    began = time.monotonic()
    run = ae.distill(
        task=task.folder,
        teacher=options.teacher,
        student=options.student,
        name=name,
        runs=options.work / "runs",
        set={
            "seed": seed,
            "data": "original-teacher",
            "rounds": 2,
            "elicit.asked": 8,
            "elicit.question_tokens": 300,
            "elicit.top_p": 0.95,
            "elicit.opinion_shots": min(options.own, 60),
            "tailor.questions": options.tailored,
            "tune.target": "answer",
            "tune.learning_rate": 1e-4,
            "tune.batch_size": 8,
            "tune.epochs": 3,
            "evaluate.teacher": False,
            "evaluate.limit": 20,  # the whole test split is answered below
        },
        reporter=Reporter(),
    )
    seconds = round(time.monotonic() - began)
    students = {arm: run.folder / path for arm, path in ARMS.items() if (run.folder / path).is_dir()}
    right = {arm: answers(folder, task) for arm, folder in students.items()}
    check = json.loads((run.folder / "check" / "manifest.json").read_text("utf-8"))["summary"]
    return {
        "task": options.task,
        "own": options.own,
        "tailored": options.tailored,
        "seed": seed,
        "teacher": options.teacher,
        "student": options.student,
        "role": check["role"],
        "check": {who: check[who]["accuracy"] for who in ("teacher", "student_constrained", "own_labels")},
        "seconds": seconds,
        "right": {arm: "".join("01"[one] for one in values) for arm, values in right.items()},
    }


def summary(path: Path) -> None:
    """Print accuracies and paired differences by task and number of own labels, pooled over the seeds."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        groups[row["task"], row["own"]].append(row)
    for (task, own), rows in sorted(groups.items()):
        seeds = [row["seed"] for row in rows]
        print(f"{task}, {own} own labels, seeds {seeds}, {rows[0]['tailored']} tailored examples a round")
        for arm in ARMS:
            able = [row for row in rows if arm in row["right"]]  # a seed may have stopped after round 1
            if not able:
                continue
            each = [_bits(row["right"], arm) for row in able]
            own_labels = np.concatenate([_bits(row["right"], "own labels") for row in able])
            values = np.concatenate(each)
            interval, test = wilson(int(values.sum()), len(values)), mcnemar(own_labels, values)
            mine = [_bits(row["right"], "own labels").astype(int) for row in able]
            grid = np.array([one.astype(int) - own for one, own in zip(each, mine, strict=True)])
            _, seeds = over_seeds_and_questions([grid])
            print(
                f"  {arm:<23} {values.mean():.1%} ({interval.low:.1%} to {interval.high:.1%}, n = {len(values)}; "
                f"{', '.join(f'{one.mean():.1%}' for one in each)}); minus own labels {test.difference:+.1%} "
                f"({test.low:+.1%} to {test.high:+.1%}; over seeds and questions {seeds.low:+.1%} to {seeds.high:+.1%})"
            )


def _bits(right: dict[str, str], arm: str) -> NDArray[np.bool_]:
    return np.array([bit == "1" for bit in right[arm]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", nargs="?", choices=sorted(ABOUT))
    parser.add_argument("--data", type=Path, help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--labels", type=int, default=0, help="so many of the set's labels; 0: all")
    parser.add_argument("--own", type=int, default=40, help="labelled rows, the same number of each label")
    parser.add_argument("--tailored", type=int, default=210, help="examples in each of the two rounds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--student", default="smollm2-135m-instruct")
    parser.add_argument("--evaluate-teacher", action="store_true", help="on the test split too: minutes a seed")
    parser.add_argument("--work", type=Path, default=Path("runs/own-labels"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--summary", type=Path, help="print the summary of a results file and stop")
    options = parser.parse_args()
    if options.summary is None:
        for seed in options.seeds:
            row = measure(options, seed)
            options.results.parent.mkdir(parents=True, exist_ok=True)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    summary(options.summary or options.results)


if __name__ == "__main__":
    main()
