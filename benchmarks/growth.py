"""Time and memory of a distillation against its number of questions, with a teacher and a student that cost nothing.

    python benchmarks/growth.py            # results/growth/rows.jsonl, docs/figures/growth.svg; about 15 minutes
    python benchmarks/growth.py --draw     # the figure alone, from the rows

What is measured is arte-edge's own work: prompts, parsing, near-duplicates, the store of calls, scores, pairs, files.
The engine makes its texts up: words of Zipf's law, a tenth of the inputs a variation of an earlier one. Its own
processor time is left out; trainings are too. Each size is a process of its own. After the stages `again` makes them
all from stored calls, as a killed run does, and has to end with the same files; `shards` takes the calls of four shards
into the store of another folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from studies.figures import write_svg

from arte_edge.asking.form import ANSWER_CLOSE
from arte_edge.cache import write_atomic
from arte_edge.console import Reporter
from arte_edge.distill import run_context
from arte_edge.distill.config import RunConfig
from arte_edge.distill.generation.inputs import Focus
from arte_edge.distill.run_context import RunContext
from arte_edge.distill.stages.align import _pairs
from arte_edge.distill.stages.calibrate import calibrate
from arte_edge.distill.stages.elicit import elicit
from arte_edge.distill.stages.prefer import prefer
from arte_edge.distill.stages.tailor import tailor
from arte_edge.models.resolve import LocalModel
from arte_edge.publish.report.charts import Plot, around
from arte_edge.runtimes.completion import Completion, EngineIdentity, Request, Sampling
from arte_edge.store import Stage, content_key, file_sha256, write_jsonl
from arte_edge.tasks.loaders import load_task

HERE = Path(__file__).parent
ROWS, FIGURE = HERE / "results" / "growth" / "rows.jsonl", HERE.parent / "docs" / "figures" / "growth.svg"
TASKS = ("home_intents", "snips_slots")
SIZES = (100, 1_000, 10_000)
SHARDS = 4
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 50_000
_SYLLABLES = [a + b for a in "bdfghklmnprstvwz" for b in "aeiou"]


def words(rng: random.Random, n: int) -> list[str]:
    """Return words of which the r-th most frequent has a frequency of about 1/r."""
    found = []
    for _ in range(n):
        rank, word = int(VOCABULARY ** rng.random()), ""
        while rank or not word:
            rank, syllable = divmod(rank, len(_SYLLABLES))
            word += _SYLLABLES[syllable]
        found.append(word)
    return found


def made_up(rng: random.Random) -> list[str]:
    """Return an input of six to twelve words; one of ten varies one of two hundred others in one word."""
    if rng.random() >= 0.1:
        return words(rng, rng.randint(6, 12))
    model = random.Random(rng.randrange(200))
    text = words(model, model.randint(6, 12))
    text[rng.randrange(len(text))] = words(rng, 1)[0]
    return text


class NullEngine:
    """An `Engine` that makes up drafts, reasons, answers and scores: the same for the same prompt. It counts calls."""

    chat_template: str | None = TEMPLATE
    supports_grammar = False

    def __init__(self, name: str, targets: Sequence[str]) -> None:
        self.special_tokens = {"eos_token": "<|im_end|>"}
        self.identity = EngineIdentity("null", name)
        self._targets = sorted(set(targets))
        rng = np.random.default_rng(0)
        self._logp = -rng.exponential(2.0, (4096, 16))
        self.calls, self.own_s = 0, 0.0

    @contextmanager
    def _counted(self, n: int) -> Iterator[None]:
        began = time.process_time()
        yield
        self.calls += n
        self.own_s += time.process_time() - began

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        with self._counted(len(requests)):
            texts = [self._text(request) for request in requests]
            return [Completion(text, "stop", 100, len(text.split())) for text in texts]

    def choose_each(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        with self._counted(len(prompts)):
            found = []
            for prompt, own in zip(prompts, choices, strict=True):
                logp = self._logp[crc32(prompt.encode()) % len(self._logp)][: len(own)].copy()
                # An input that was written for an answer names it; nine of ten are then answered so.
                question = self._question(prompt)
                for i, choice in enumerate(own):
                    if question.endswith(choice.removesuffix(ANSWER_CLOSE)) and crc32(question.encode()) % 10:
                        logp[i] = -0.01
                found.append(logp)
            return found

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def close(self) -> None: ...

    def _text(self, request: Request) -> str:
        prompt, rng = request.prompt, random.Random(f"{request.prompt}/{request.sample}")
        if prompt.endswith("<input>"):
            first = int(prompt.rpartition("<Question_")[2].split(">")[0])
            blocks = "\n".join(self._block(i, rng) for i in range(first, first + 5))
            return blocks.removeprefix(f"<Question_{first}><input>")
        if prompt.endswith("."):  # the number of the next input
            label = prompt.rpartition("whose right answer is ")[2].split(",")[0]
            first = int(prompt.rpartition("\n")[2].removesuffix("."))
            lines = [f"{i}. {' '.join(made_up(rng))} {label}" for i in range(first, first + 5)]
            return "\n".join(lines).removeprefix(f"{first}.")
        answer = f"{self._answer(self._question(prompt))}{ANSWER_CLOSE}"
        return answer if prompt.endswith("<ans>") else f"It is {' '.join(words(rng, 16))}. <ans>{answer}"

    def _block(self, number: int, rng: random.Random) -> str:
        text = " ".join(made_up(rng))
        target = self._answer(text)
        return f"<Question_{number}><input>{text}</input><target>{target}</target></Question_{number}>"

    def _question(self, prompt: str) -> str:
        return prompt.rpartition("Question: ")[2].split("\n")[0].removesuffix("<|im_end|>")

    def _answer(self, question: str) -> str:
        return self._targets[crc32(question.encode()) % len(self._targets)]


def config_of(task: str, n: int) -> RunConfig:
    """Return a run of `n` questions in elicit, as many training examples, and pairs in proportion."""
    models = {"teacher": {"model": "null-teacher", "engine": "llamacpp"}, "student": {"model": "null-student"}}
    sizes = {"elicit": {"questions": n}, "tailor": {"questions": n}, "prefer": {"engine": "student"}}
    pairs = {"align": {"question_pairs": n, "rationale_pairs": n}}
    return RunConfig.model_validate({"task": {"ref": task}, **models, **sizes, **pairs})


def opened(folder: Path, task_name: str, n: int, engines: Sequence[NullEngine] = ()) -> RunContext:
    """Return the run in `folder`, after a check that found nothing."""
    task = load_task(task_name)
    run = RunContext(config_of(task_name, n), task, folder, Reporter(folder / "events.jsonl", quiet=True))
    for model, engine in zip((run.config.teacher, run.config.student), engines, strict=False):
        run.lend(model, engine)
    return run


def stages(run: RunContext) -> dict[str, Callable[[], Any]]:
    """Return what makes each stage of a run."""

    def pairs() -> None:
        drawn = _pairs(run)
        stage = Stage(run.folder / "align", {})
        stage.write("pairs.jsonl", drawn.pairs)
        stage.write("held_out.jsonl", drawn.held_out)

    return {
        "elicit": lambda: elicit(run),
        "calibrate": lambda: calibrate(run),
        "prefer": lambda: prefer(run),
        "align: pairs": pairs,
        "tailor": lambda: tailor(run, None, Focus()),
    }


def measure(task_name: str, n: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Make a run of `n` questions in `folder`; yield a row for each stage."""
    task = load_task(task_name)
    run_context.resolve = lambda ref, **_: LocalModel(ref, f"sha256 of {ref}", folder / ref, None, "F16")  # type: ignore[assignment]
    engines = [NullEngine(name, [e.target for e in task.seed]) for name in ("null-teacher", "null-student")]

    def row(stage: str, seconds: float) -> dict[str, Any]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = {"task": task_name, "questions": n, "stage": stage, "cpu_s": round(seconds, 3)}
        return found | {"peak_mib": round(peak, 1)}

    def clock() -> float:
        return time.process_time() - sum(engine.own_s for engine in engines)

    def files() -> dict[str, str]:
        paths = sorted(folder.glob("*/*.jsonl"))
        return {str(path.relative_to(folder)): file_sha256(path) for path in paths}

    (folder / "check").mkdir(parents=True)
    write_jsonl(folder / "check" / "answers.jsonl", [])
    yield row("start", clock())
    run = opened(folder, task_name, n, engines)
    for name, make in stages(run).items():
        began = clock()
        make()
        yield row(name, clock() - began)
    run.close()
    first, made = files(), sum(engine.calls for engine in engines)
    for manifest in folder.glob("*/manifest.json"):
        manifest.unlink()
    began = clock()
    run = opened(folder, task_name, n, engines)
    for make in stages(run).values():
        make()
    run.close()
    stored = {"calls": made, "store_mb": round((folder / "calls.jsonl").stat().st_size / 1e6, 2)}
    again = row("again", clock() - began)
    if files() != first or sum(engine.calls for engine in engines) != made:
        raise SystemExit("made again from stored calls, the run has other files or calls")
    yield again | stored | {"files": content_key(first)}
    other, at = folder / "other", 0
    other.mkdir()
    groups: list[list[bytes]] = [[] for _ in range(SHARDS)]
    for line in (folder / "calls.jsonl").read_bytes().splitlines(keepends=True):
        groups[at % SHARDS].append(line)
        at += json.loads(line)["left"] == 0
    for i, group in enumerate(groups, 1):
        (other / f"calls-{i}-of-{SHARDS}.jsonl").write_bytes(b"".join(group))
    began = clock()
    opened(other, task_name, n).close()
    yield row("shards", clock() - began)


def figure(rows: Sequence[dict[str, Any]]) -> None:
    """Draw processor time a question of all stages, and memory a question, against the number of questions."""
    values: dict[str, dict[float, float]] = {f"{task}, {unit}": {} for task in TASKS for unit in ("ms", "KiB")}
    start = 0.0
    for row in rows:
        n, (ms, kib) = row["questions"], (values[f"{row['task']}, {unit}"] for unit in ("ms", "KiB"))
        if row["stage"] == "start":
            start = row["peak_mib"]
        elif row["stage"] not in ("again", "shards"):
            ms[n] = ms.get(n, 0.0) + 1e3 * row["cpu_s"] / n
            kib[n] = 1024 * (row["peak_mib"] - start) / n
    plot = Plot(
        around("questions", SIZES, log=True),
        around("ms or KiB a question", [y for points in values.values() for y in points.values()], log=True),
        title="Time and memory of a question against the number of questions",
        desc="arte-edge's own work in elicit, calibrate, prefer, align and tailor with models that cost nothing.",
        legend=[(name, i) for i, name in enumerate(values)],
    )
    for i, (name, points) in enumerate(values.items()):
        plot.line(list(points.items()), i, dashed=bool(i % 2))
        for n, y in points.items():
            plot.mark(n, y, i, tip=f"{n:.0f} questions of {name.replace(',', ':')}: {y:.3g}")
    write_svg(plot, FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--draw", action="store_true", help="the figure alone")
    parser.add_argument("--one", nargs=2, metavar=("TASK", "N"), help="one task and size, in this process")
    options = parser.parse_args()
    if options.one:
        task, n = options.one
        with tempfile.TemporaryDirectory() as folder:
            for _ in measure(task, 8, Path(folder) / "first"):
                continue  # everything is imported and compiled
            for row in measure(task, int(n), Path(folder) / "run"):
                print(json.dumps(row), flush=True)
        return
    lines: list[str] = []
    for task, n in () if options.draw else itertools.product(TASKS, SIZES):
        command = [sys.executable, __file__, "--one", task, str(n)]
        lines += subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        print(*lines[-8:], sep="\n", flush=True)
        write_atomic(ROWS, ("\n".join(lines) + "\n").encode())
    figure([json.loads(line) for line in ROWS.read_text("utf-8").splitlines()])


if __name__ == "__main__":
    main()
