"""A task made in code and engines that follow a script, so that stages run without any model."""

import json
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import Patch, make_gguf

from arte_edge.asking.form import Form
from arte_edge.cli.main import main
from arte_edge.console import Reporter
from arte_edge.distill import validate_config
from arte_edge.distill.config import RunConfig
from arte_edge.distill.latency import Budget
from arte_edge.distill.run_context import RunContext
from arte_edge.distill.stages.calibrate import calibrate
from arte_edge.distill.stages.elicit import elicit
from arte_edge.distill.stages.prefer import prefer
from arte_edge.distill.train.sft import SftResult
from arte_edge.models.resolve import LocalModel
from arte_edge.runtimes.completion import Completion, EngineIdentity, Request, Sampling
from arte_edge.tasks.task import Answer, Example, Task, rows_sha256

TEACHER, STUDENT = "scripted-teacher", "scripted-student"


def parity(start: int, stop: int) -> tuple[Example, ...]:
    return tuple(Example(f"Is {n} even or odd?", "odd" if n % 2 else "even") for n in range(start, stop))


def make_task(n_validation: int = 40) -> Task:
    test = parity(500, 520)
    return Task(
        name="parity",
        description="Say whether a number is even or odd.",
        answer=Answer(kind="choice", choices=("even", "odd")),
        techniques=("Look at the last digit.", "Halve it.", "Count in twos.", "Say it in words."),
        seed=parity(0, 8),
        validation=parity(100, 100 + n_validation),
        test_inputs=frozenset(example.key for example in test),
        test_sha256=rows_sha256(test),
        test_loader=lambda: test,
    )


def draft(sample: int) -> str:
    """Return a teacher's answer with five questions that share no word with each other."""
    rng = random.Random(sample)
    blocks = []
    for number in range(4, 9):
        words = " ".join("".join(rng.choices(string.ascii_lowercase, k=7)) for _ in range(5))
        blocks.append(f"<Question_{number}><input>{words}</input><target>even</target></Question_{number}>")
    return "\n".join(blocks).removeprefix("<Question_4><input>")


_TOLD = re.compile(r"whose right answer is (.+?), numbered, one a line")


def listed(prompt: str, sample: int) -> str:
    """Return a teacher's five inputs for the answer that it was told, which go on with the number in the prompt."""
    label, first = _TOLD.findall(prompt)[-1], prompt.rpartition("\n")[2].removesuffix(".")
    rng = random.Random(f"{prompt}/{sample}")
    numbers = [2 * rng.randrange(1000, 10**9) + (label == "odd") for _ in range(5)]
    lines = [f"{int(first) + i}. Is {n} even or odd?" for i, n in enumerate(numbers)]
    return "\n".join(lines).removeprefix(f"{first}.")


def _second(prompt: str) -> str:
    """Return the second word of the question: no two questions get the same rationale."""
    words = prompt.rpartition("Question:")[2].split()
    return words[1] if len(words) > 1 else "seen"


@dataclass
class ScriptedEngine:
    """An `Engine` that knows the parity of the numbers for which `knows` says so, and counts its calls.

    `drafts` answers the prompts that ask for questions, from the request's sample number, and `inputs` those that
    tell it an answer, from the prompt too; `word` is what differs between its rationales, and `say` may change all
    that it says there. `prompts` are those that it completed.
    """

    name: str
    knows: Callable[[int], bool] = lambda n: True
    drafts: Callable[[int], str] = draft
    inputs: Callable[[str, int], str] = listed
    word: Callable[[str], str] = _second
    say: Callable[[Request, str, Sampling], str] = lambda request, text, sampling: text
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=lambda: {"eos_token": "</s>"})
    supports_grammar: bool = False
    calls: int = 0
    prompts: list[str] = field(default_factory=list)

    @property
    def identity(self) -> EngineIdentity:
        return EngineIdentity("scripted", self.name)

    def answer(self, prompt: str) -> str:
        numbers = re.findall(r"Is (\d+) even or odd", prompt.rpartition("Question:")[2])
        if not numbers:
            return "even"
        n = int(numbers[-1])
        return "odd" if n % 2 == int(self.knows(n)) else "even"

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls += len(requests)
        self.prompts += [request.prompt for request in requests]
        return [Completion(self._text(r, sampling), "stop", prompt_tokens=9, completion_tokens=7) for r in requests]

    def _text(self, request: Request, sampling: Sampling) -> str:
        if request.prompt.endswith("<input>"):
            return self.drafts(request.sample)
        if _TOLD.search(request.prompt):
            return self.inputs(request.prompt, request.sample)
        if "Reply with the answer alone." in request.prompt:
            return self.say(request, self.answer(request.prompt), sampling)
        answer = f"<ans>{self.answer(request.prompt)}</ans>"
        return self.say(request, f"It is {self.word(request.prompt)} at once. {answer}", sampling)

    def choose_each(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        self.calls += len(prompts)
        answers = map(self.answer, prompts)
        return [
            np.array([-0.1 if choice.startswith(answer) else -2.4 for choice in own])
            for answer, own in zip(answers, choices, strict=True)
        ]

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def close(self) -> None:
        return


def _learned(rows: Sequence[dict[str, str]]) -> Callable[[int], bool]:
    """Return what a trained student knows: three of four numbers."""
    return lambda n: n % 4 < 3


@dataclass
class House:
    """The scripted teacher and student, a task, and a folder in which runs open.

    A training is replaced: it only writes down its rows, and `learned` makes of them what the student then knows.
    The teacher asks in tags, unless `by_label`.
    """

    folder: Path
    task: Task = field(default_factory=make_task)
    # Out of four numbers the student knows two: what guessing gives.
    teacher: ScriptedEngine = field(default_factory=lambda: ScriptedEngine(TEACHER))
    student: ScriptedEngine = field(default_factory=lambda: ScriptedEngine(STUDENT, knows=lambda n: n % 4 < 2))

    learned: Callable[[Sequence[dict[str, str]]], Callable[[int], bool]] = _learned
    by_label: bool = False
    trained: list[Path] = field(default_factory=list)  # the folders of the trainings, in order
    seen: dict[Path, list[dict[str, str]]] = field(default_factory=dict)  # the rows of each training
    tuned: dict[str, ScriptedEngine] = field(default_factory=dict)  # by the sha256 of the model

    def config(self, **tables: Any) -> RunConfig:
        base = {"teacher": {"model": TEACHER}, "student": {"model": STUDENT}, "elicit": {"questions": 8}}
        tables = base | tables
        tables["elicit"] = {"by_label": self.by_label} | tables["elicit"]
        return RunConfig.model_validate(tables)

    def run(self, **tables: Any) -> RunContext:
        return RunContext(
            self.config(**tables), self.task, self.folder, Reporter(self.folder / "events.jsonl", quiet=True)
        )

    scoring_from: int = 0  # calls made before the last stage prefer
    run_open: Any = None  # the run of the fixture `scored`

    @property
    def calls(self) -> int:
        return sum(engine.calls for engine in (self.teacher, self.student, *self.tuned.values()))

    def rows(self, folder: str) -> list[dict[str, str]]:
        """Return what the student in this folder of the run was trained on."""
        return self.seen[self.folder / folder]

    def train(self, checkpoint: Path, rows: Sequence[Any], out: Path, settings: Any, **_: Any) -> SftResult:
        """Stand in for `train_sft`, a finished one included."""
        text = json.dumps([dict(row) for row in rows])
        if not (out / "training.json").is_file() or (out / "training.json").read_text() != text:
            self.trained.append(out)
            self.seen[out] = [dict(row) for row in rows]
            out.mkdir(parents=True, exist_ok=True)
            (out / "tokenizer_config.json").write_text("{}")
            (out / "model.safetensors").write_text(text)
            (out / "training.json").write_text(text)
        return SftResult(out, 4, len(rows), 0, 0.0, ({"loss": 2.0}, {"loss": 0.5}), None)

    def open_tuned(self, model: LocalModel) -> ScriptedEngine:
        assert model.gguf is not None
        if model.sha256 not in self.tuned:
            made = json.loads(model.gguf.read_text())
            engine = ScriptedEngine(model.sha256, self.learned(made["rows"]), chat_template=made["template"])
            self.tuned[model.sha256] = engine
        return self.tuned[model.sha256]

    def distill(self, *flags: str) -> int:
        """Run the command; return its exit code."""
        names = ["--task", "parity", "--teacher", TEACHER, "--student", STUDENT]
        names += ["--set", f"elicit.by_label={str(self.by_label).lower()}"]
        return main(["distill", *names, "--runs", str(self.folder.parent), "--name", self.folder.name, *flags])


@pytest.fixture
def house(tmp_path: Path, monkeypatch: Patch) -> House:
    """A house whose engines open in place of real ones."""
    folder = tmp_path / "run"
    house = House(folder)

    def find(ref: str, **_: Any) -> LocalModel:
        sizes = {"llama__block_count": 1, "llama__attention__head_count": 1}
        return LocalModel(ref, f"sha256 of {ref}", make_gguf(tmp_path / f"{ref}.gguf", **sizes), None, "F16")

    def open_scripted(model: LocalModel, **_: Any) -> ScriptedEngine:
        if model.name == f"{STUDENT} tuned":
            return house.open_tuned(model)
        return {TEACHER: house.teacher, STUDENT: house.student}[model.name]

    def convert(checkpoint: Path, base: Path, out: Path) -> None:
        template = (checkpoint / "chat_template.jinja").read_text()
        made = {"rows": json.loads((checkpoint / "model.safetensors").read_text()), "template": template}
        out.write_text(json.dumps(made))

    monkeypatch.setattr("arte_edge.gguf.from_base.checkpoint_to_gguf", convert)
    for stage in ("check", "tune"):
        monkeypatch.setattr(f"arte_edge.distill.stages.{stage}.train_sft", house.train)

    real = validate_config._look_up
    scripted = (TEACHER, STUDENT)
    monkeypatch.setattr(validate_config, "_look_up", lambda ref: None if ref in scripted else real(ref))
    monkeypatch.setattr("arte_edge.distill.run_context.resolve", find)
    monkeypatch.setattr("arte_edge.distill.run_context.open_local", open_scripted)
    unpack = LocalModel.checkpoint

    def checkpoint(model: LocalModel, progress: Any = None) -> Path:
        return tmp_path if model.name in (TEACHER, STUDENT) else unpack(model, progress)

    monkeypatch.setattr(LocalModel, "checkpoint", checkpoint)
    for module in ("pipeline", "estimate"):
        monkeypatch.setattr(f"arte_edge.distill.{module}.load_task", lambda ref, **_: house.task)
    return house


@pytest.fixture
def scored(house: House) -> Callable[..., tuple[RunContext, dict[str, Any], list[dict[str, Any]]]]:
    """Run elicit, calibrate and prefer with these settings; return run, summary and score rows of prefer."""

    def score(budget: Budget | None = None, form: Form = "answer", **tables: Any) -> Any:
        run = house.run_open = house.run(**tables)
        run.budget, run.form = budget, form
        elicit(run)
        calibrate(run)
        house.scoring_from = house.calls
        summary = prefer(run)
        run.close()
        return run, summary, run.read("prefer", "scores.jsonl")

    return score
