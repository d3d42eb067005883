"""Right answers are measured in a child too: what it says comes back as a row, what it cannot do as well."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import Patch, facts, quality_row, speed_row, student_file

from arte_edge.asking.form import instruction, with_instruction
from arte_edge.bench import accuracy, runner
from arte_edge.bench.accuracy import example_key, measure_quality, measure_request
from arte_edge.bench.runner import run_quality
from arte_edge.bench.settings import BenchSettings, Reporter, Request, Target
from arte_edge.errors import InputError
from arte_edge.models import LocalModel
from arte_edge.results.accuracy import paired_on_common
from arte_edge.results.rows import QualityRow, paired
from arte_edge.results.student_json import Asking, write_student
from arte_edge.runtimes.prompt_render import render
from arte_edge.runtimes.protocol import RuntimeFacts
from arte_edge.stats import mcnemar, wilson
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Answer, Example, Task, rows_sha256

DEVICE = facts()
TEST = tuple(Example(f"{i}?", "odd" if i % 2 else "even") for i in range(40))
TASK = Task(
    name="parity",
    description="Even or odd.",
    answer=Answer(kind="choice", choices=("even", "odd")),
    techniques=("Look.",),
    seed=(),
    validation=tuple(Example(f"validation {i}?", "odd") for i in range(6)),
    test_inputs=frozenset(example.key for example in TEST),
    test_sha256=rows_sha256(TEST),
    test_loader=lambda: TEST,
)


@dataclass
class Pupil:
    """An `Runtime` that answers parity right but for the numbers below `ignores`; one word is one token."""

    name: str
    ignores: int = 0
    quantization: str = "Q8_0"
    facts = RuntimeFacts("pupil 1.0")
    asked: list[list[str]] = field(default_factory=list)
    bound: list[str] = field(default_factory=list)  # what was answered with a grammar
    open: bool = True

    follows = False  # grammars
    chat_template = with_instruction(
        "{% for m in messages %}{{ m.content }}\n{% endfor %}", instruction(TASK, "reasoning-first"), {}
    )
    special_tokens: dict[str, str] = field(default_factory=dict)
    budgets: set[int] = field(default_factory=set)

    def render(self, messages: Sequence[Any]) -> str:
        return render(self, messages)

    def tokenize(self, text: str) -> list[int]:
        return [0] * len(text.split())

    def chat(self, asked: Sequence[Any], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        self.asked.append([messages[-1]["content"] for messages in asked])
        self.budgets.add(max_tokens)
        assert all([message["role"] for message in messages] == ["user"] for messages in asked)
        return [self._answer(text) for text in self.asked[-1]]

    def constrained(self, messages: Sequence[Any], grammar: str, max_tokens: int, stop: Sequence[str]) -> str | None:
        assert '"even" | "odd"' in grammar and "</ans>" in stop
        if not self.follows:
            return None
        self.bound.append(messages[-1]["content"])
        return f"<ans>{'odd' if int(messages[-1]['content'][:-1]) % 2 else 'even'}</ans>"

    def _answer(self, text: str) -> str:
        number = text.partition("?")[0]
        if not number.isdigit():
            return " It is <ans>odd</ans>"
        even = (int(number) % 2 == 0) == (int(number) >= self.ignores)
        return f" Look. <ans>{'even' if even else 'odd'}</ans>"

    def close(self) -> None:
        self.open = False


class Shelf:
    """Opens pupils in place of files, so that what is asked, and when a model is closed, can be looked at."""

    def __init__(self, monkeypatch: Patch, folder: Path, **pupils: int) -> None:
        self.paths = {name: folder / f"{name}.gguf" for name in pupils}
        self.opened: list[Pupil] = []
        self.runtimes: list[str] = []

        def open_model(path: Path, threads: int | None = None, runtime: str = "auto") -> Pupil:
            assert not any(pupil.open for pupil in self.opened)  # a small device holds one at a time
            self.opened.append(Pupil(path.name, pupils[path.stem]))
            self.runtimes.append(runtime)
            return self.opened[-1]

        for path in self.paths.values():
            path.touch()
        monkeypatch.setattr(accuracy, "open_model", open_model)
        known = {"quantization": "Q8_0", "sha256": "f", "tensor_sha256": "t"}
        monkeypatch.setattr(accuracy, "describe", lambda path: Target(path, "gguf", path.name, **known))

    def measure(self, name: str, **options: Any) -> QualityRow:
        return measure_quality(self.paths[name], TASK, device=DEVICE, **options)


@pytest.fixture
def shelf(monkeypatch: Patch, tmp_path: Path) -> Shelf:
    return Shelf(monkeypatch, tmp_path, good=0, worse=12)


def test_the_row_says_what_was_answered_with_its_interval_and_its_time(shelf: Shelf) -> None:
    row = shelf.measure("worse", threads=3)
    assert (row.task, row.split, row.n, row.right, row.partial) == ("parity", "test", 40, 28, False)
    assert (row.low, row.high) == wilson(28, 40)
    assert (row.model_filename, row.runtime, row.n_threads) == ("worse.gguf", "pupil 1.0", 3)
    assert (row.sha256, row.tensor_sha256, row.task_sha256) == ("f", "t", TASK.sha256)
    assert row.answers[0] == (example_key(TEST[0]), "odd", False) and row.answers[-1][1:] == ("odd", True)
    assert row.answer_tokens_mean == 2 and row.difference is None
    assert 0 <= row.answer_seconds_p50 <= row.answer_seconds_p95
    assert not shelf.opened[0].open
    assert row.contended is not None or not Path("/proc/stat").exists()


def test_where_the_runtime_follows_a_grammar_the_same_examples_are_answered_with_it_too(
    shelf: Shelf, monkeypatch: Patch
) -> None:
    free = shelf.measure("worse")
    assert free.with_grammar is None, "this runtime follows none"
    monkeypatch.setattr(Pupil, "follows", True)
    row = shelf.measure("worse")
    assert (row.right, row.answers, row.answer_tokens_mean) == (28, free.answers, free.answer_tokens_mean)
    found = row.with_grammar
    assert found is not None and (found.n, found.right, found.reference_right) == (40, 40, 28)
    assert (found.lost, found.gained, found.difference) == (0, 12, pytest.approx(12 / 40))
    assert shelf.opened[-1].bound == [example.input for example in TEST]
    assert shelf.measure("worse", grammar=False).with_grammar is None and not shelf.opened[-1].bound
    number = replace(TASK, answer=Answer(kind="number"))
    assert measure_quality(shelf.paths["good"], number, device=DEVICE, limit=2).with_grammar is None


def test_each_example_is_asked_alone_after_a_warm_up(shelf: Shelf) -> None:
    shelf.measure("good", limit=5)
    warmup, *asked = shelf.opened[0].asked
    assert warmup == ["?"]
    assert asked == [[example.input] for example in TEST[:5]]


def test_the_budget_of_an_answer_is_the_one_beside_the_file(shelf: Shelf, tmp_path: Path) -> None:
    shelf.measure("good", limit=1)
    asking = Asking(form="reasoning-first", instruction="Say it.", answer_tokens=250)
    write_student(tmp_path, student_file(asking=asking))
    shelf.measure("good", limit=1)
    shelf.measure("good", limit=1, answer_tokens=40)
    assert [max(pupil.budgets) for pupil in shelf.opened] == [96, 250, 40]


def test_the_child_gets_the_runtime_and_the_budget_of_the_request(shelf: Shelf, monkeypatch: Patch) -> None:
    monkeypatch.setattr("arte_edge.tasks.loaders.load_task", lambda *_, **__: TASK)
    request = Request(
        source=str(shelf.paths["good"]),
        task="parity",
        limit=1,
        answer_tokens=250,  # a device has no student.json beside the file
        settings=BenchSettings(runtime="xllamacpp"),
    )
    asked = {"request": request.model_dump(mode="json"), "threads": 1, "device": DEVICE.model_dump(mode="json")}
    measure_request(asked, lambda *_: None)
    assert shelf.runtimes == ["xllamacpp"] and max(shelf.opened[0].budgets) == 250


def test_a_sweep_begins_with_the_16_bit_file_and_limits_the_time_of_an_answer(monkeypatch: Patch) -> None:
    answers = tuple((f"{i:016x}", "on", i < 90) for i in range(100))
    seen: list[tuple[str, float, bool]] = []

    def run_child(asked: Any, timeout_s: float, progress: Any, *, per_step: bool) -> dict[str, Any]:
        name = Path(asked["request"]["source"]).name
        seen.append((name, timeout_s, per_step))
        row = quality_row(90, model_filename=name, quantization=name[2:-5], answers=answers)
        return {"row": row.model_dump(mode="json")}

    monkeypatch.setattr(runner, "run_child", run_child)
    monkeypatch.setattr(runner, "choose_runtime", lambda *_: "llama-cpp-python")
    monkeypatch.setattr(runner, "describe", lambda path: Target(path, "gguf", path.name, quantization=path.stem[2:]))
    request = Request(settings=BenchSettings(threads=(1,), timeout_s=7), task="home_intents")
    files = [Path("m-Q8_0.gguf"), Path("m-F16.gguf")]
    rows = run_quality(files, request, device=DEVICE, reporter=Reporter(), on_row=lambda row: None)
    assert seen == [("m-F16.gguf", 7, True), ("m-Q8_0.gguf", 7, True)]
    assert [(row.reference, row.difference) for row in rows] == [("", None), ("m-F16.gguf", 0)]


def test_the_difference_is_paired_with_a_row_of_any_machine(shelf: Shelf) -> None:
    earlier = shelf.measure("good").model_copy(update={"device": facts(arch="arm64")})
    earlier = QualityRow.model_validate_json(earlier.model_dump_json()).model_copy(update={"quantization": "F16"})
    failed = earlier.model_copy(update={"status": "crashed", "answers": ()})
    row = shelf.measure("worse")
    assert paired(row, [speed_row(), failed, row]) == row
    row = paired(row, [failed, earlier, row])
    test = mcnemar([True] * 40, [False] * 12 + [True] * 28)
    assert (row.reference, row.reference_right) == ("good.gguf", 40)
    assert (row.difference, row.p_value) == (test.difference, test.p_value)
    assert (row.difference_low, row.difference_high) == (test.low, test.high)
    assert paired_on_common("a", earlier.answers, "b", row.answers).difference == row.difference
    assert not any(pupil.open for pupil in shelf.opened)


def test_a_limit_marks_the_row_and_pairs_the_same_examples(shelf: Shelf) -> None:
    whole = shelf.measure("good").model_copy(update={"quantization": "F16"})
    row = paired(shelf.measure("worse", limit=20), [whole])
    assert (row.n, row.right, row.partial, row.reference_right) == (20, 8, True, 20)
    assert row.difference == pytest.approx(-12 / 20)
    assert shelf.measure("good", limit=40).partial is False


def test_the_test_split_is_left_alone_unless_it_is_asked_for(shelf: Shelf) -> None:
    row = shelf.measure("good", split="validation")
    assert (row.split, row.n) == ("validation", 6)
    assert all("validation" in prompts[0] for prompts in shelf.opened[0].asked[1:])


def test_a_question_that_was_asked_before_has_no_time(monkeypatch: Patch, shelf: Shelf) -> None:
    times = iter(range(1000))
    clock = SimpleNamespace(perf_counter=lambda: float(next(times)) ** 2)
    monkeypatch.setattr("arte_edge.verify.accuracy.time", clock)
    twice = replace(TASK, validation=(TEST[0], TEST[0], TEST[1]))
    row = measure_quality(shelf.paths["good"], twice, split="validation", device=DEVICE)
    assert row.n == 3
    assert (row.answer_seconds_p50, row.answer_seconds_p95) == (4.0, pytest.approx(6.7))  # of 1 and 7 s


def run(path: Path, task: str = "home_intents", **options: Any) -> QualityRow:
    seen: list[QualityRow] = []
    request = Request(**{"settings": BenchSettings(threads=(1,)), "task": task} | options)
    (row,) = run_quality([path], request, device=DEVICE, reporter=Reporter(), on_row=seen.append)
    assert seen == [row]
    return row


@pytest.mark.model
def test_a_real_file_answers_and_equals_itself(smollm2: LocalModel) -> None:
    pytest.importorskip("llama_cpp")
    task = load_task("home_intents")
    options: dict[str, Any] = {"split": "validation", "limit": 2, "device": DEVICE, "answer_tokens": 16}
    first = measure_quality(smollm2.gguf, task, **options)
    again = paired(measure_quality(smollm2.gguf, task, **options), [first.model_copy(update={"quantization": "F16"})])
    assert first.with_grammar is not None and first.with_grammar.n == 2
    assert first.answers == again.answers and again.difference == 0 and again.p_value == 1
    assert (first.format, first.quantization, first.partial) == ("gguf", "Q4_1", True)
    assert len(first.tensor_sha256) == 64
    assert 1 < first.answer_tokens_mean <= 16 and first.answer_seconds_p50 > 0.01
    row = run(smollm2.gguf, split="validation", limit=2)  # in a child
    assert (row.status, row.partial, row.n_threads, len(row.answers)) == ("ok", True, 1, 2), row.reason


def test_a_model_that_cannot_answer_is_a_row_with_a_reason() -> None:
    row = run(Path("null"))
    assert row.status in ("refused", "crashed") and row.reason
    assert (row.n, row.right, row.task) == (0, 0, "home_intents")
    with pytest.raises(InputError, match="home_intens"):
        run(Path("null"), "home_intens")
    with pytest.raises(InputError, match="does not run null models"):
        run(Path("null"), settings=BenchSettings(runtime="xllamacpp"))
