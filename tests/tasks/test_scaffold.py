"""Task folders written: skeletons, shipped data, proposed techniques."""

import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from shipped_tasks import snips
from shipped_tasks.__main__ import GENERATORS, main, write_data
from tiny import Capture

from arte_edge import catalog
from arte_edge.errors import ArteError
from arte_edge.runtimes.completion import Completion, Request, Sampling
from arte_edge.tasks import scaffold
from arte_edge.tasks.folder import load_folder, read_folder
from arte_edge.tasks.from_table import task_from_table
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.tables import Table
from arte_edge.tasks.task import SPLITS, Example


def test_the_check_of_a_skeleton_lists_what_to_fill_in(tmp_path: Path) -> None:
    scaffold.write_skeleton(tmp_path / "mine", "mine")
    task, problems = read_folder(tmp_path / "mine")
    assert task is None
    assert [problem.where for problem in problems] == [
        *("task.toml: description", "task.toml: techniques"),
        *("seed.jsonl", "validation.jsonl", "test.jsonl"),
    ]


def test_a_table_written_as_a_folder_is_the_same_task(tmp_path: Path) -> None:
    odd = ("C", "C++", "a\n\nb", "3,5", '"""', "\\", "é\x7f", "{0}")
    records = [(n, f"“{n}”?\n\u2028", odd[n % 8]) for n in range(80)]
    table = task_from_table("even", Table("t", records), description='Is it "even"? Say \\ yes or no.')
    scaffold.write_task(tmp_path / "even", table)
    folder = load_folder(tmp_path / "even")
    assert folder.sha256 == table.sha256
    assert (set(folder.answer.choices), folder.techniques) == (set(odd), table.techniques)


def test_new_techniques_leave_the_rest_of_the_file_alone(parity: Path) -> None:
    path = parity / "task.toml"
    path.write_text("# mine\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    before = tomllib.loads(path.read_text(encoding="utf-8"))
    scaffold.set_techniques(parity, ['Say "why".', "Halve it."])
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# mine\n")
    assert tomllib.loads(text) == before | {"techniques": ['Say "why".', "Halve it."]}


NAMES = catalog.names("tasks")


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_data_is_what_the_generator_writes(name: str, tmp_path: Path) -> None:
    if name == "snips_slots" and not snips.source():
        pytest.skip("ARTE_EDGE_SNIPS names no checkout of github.com/sonos/nlu-benchmark")
    write_data(name, tmp_path)
    written = sorted(tmp_path.iterdir())
    assert len(written) >= len(SPLITS)
    for file in written:
        committed = catalog.find("tasks", name) / file.name
        assert file.read_bytes() == committed.read_bytes(), committed


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_task_has_balanced_splits_and_four_techniques(name: str) -> None:
    task = load_task(name)
    assert (len(task.seed), len(task.validation), len(task.load_test())) == (40, 100, 200)
    assert len(set(task.techniques)) == 4
    assert all("one to three short sentences" in technique for technique in task.techniques)
    assert not any("<ans>" in technique for technique in task.techniques)
    for rows in (task.seed, task.validation, task.load_test()):
        intents = [row.target.split(",")[0] if task.answer.kind == "json" else row.target for row in rows]
        counts = Counter(intent.split("(")[0] or intent for intent in intents)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_every_shipped_task_has_a_generator(capsys: Capture) -> None:
    assert sorted(GENERATORS) == NAMES and len(NAMES) >= 5
    assert main(["nothing"]) == 2
    assert "known: boolean_expressions" in capsys.readouterr().out


SEEDS = [Example(f"Is the number {n} even or odd?", "odd" if n % 2 else "even") for n in range(5)]
STEPS = "Look at the last digit of the number and decide by it."
HALVE = "Halve the number in your head and see whether something is left over."
RULE = "Recall which digits are even, then compare the ending. Use two sentences."
PAIRS = "Imagine as many socks as the number says, pair them up, look for a single one."


class Teacher:
    """An engine that answers from a list and records its requests."""

    chat_template = None
    special_tokens: dict[str, str] = {}  # noqa: RUF012
    supports_grammar = False

    def __init__(self, *answers: Completion | str) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[Request, Sampling]] = []

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.requests += [(request, sampling) for request in requests]
        answer = self.answers[(len(self.requests) - 1) % len(self.answers)]
        return [answer if isinstance(answer, Completion) else Completion(answer, "stop")]


def tagged(*techniques: str) -> str:
    """What a model writes after the tag that was started for it."""
    parts = [f"<Technique_{n}>{text}</Technique_{n}>" for n, text in enumerate(techniques, start=1)]
    return "\n".join(parts).removeprefix("<Technique_1>")


def test_four_good_techniques_take_one_greedy_call() -> None:
    teacher: Any = Teacher(tagged(STEPS, HALVE, RULE, PAIRS))
    techniques = scaffold.propose_techniques(teacher, "Even or odd?", SEEDS)
    brief = " Use one to three short sentences."
    assert techniques == (STEPS + brief, HALVE + brief, RULE, PAIRS + brief)
    [(request, sampling)] = teacher.requests
    assert sampling.temperature == 0
    assert request.prompt.endswith("<Technique_1>")
    assert "Even or odd?" in request.prompt
    assert all(seed.input in request.prompt for seed in SEEDS[:3])


def test_unusable_techniques_are_regenerated_with_other_seeds() -> None:
    quoting = f"Since {SEEDS[0].input} is about zero, think of it as an even number."
    teacher: Any = Teacher(
        tagged(STEPS, "...", "Think.", quoting),
        tagged(STEPS + "!", HALVE.upper(), "<b>Write the number down in bold letters.</b>"),
        tagged(RULE, PAIRS, "Ask a friend who is good at numbers what they think."),
    )
    techniques = scaffold.propose_techniques(teacher, "Even or odd?", SEEDS)
    kept = (STEPS, HALVE.upper(), RULE, PAIRS)
    assert all(text.startswith(start) for text, start in zip(techniques, kept, strict=True))
    prompts = {request.prompt for request, _ in teacher.requests}
    assert len(prompts) == 3
    assert [sampling.temperature > 0 for _, sampling in teacher.requests] == [False, True, True]


def test_a_teacher_that_never_writes_four_ends_in_an_error_that_counts() -> None:
    teacher: Any = Teacher(tagged(STEPS, HALVE), Completion("", "error", error="HTTP 500"))
    with pytest.raises(ArteError, match=r"2 usable technique prompts, 4 are needed \(last error: HTTP 500\)"):
        scaffold.propose_techniques(teacher, "Even or odd?", SEEDS)
    assert len(teacher.requests) == 8


def test_the_started_tag_may_or_may_not_be_repeated_and_a_cut_one_is_dropped() -> None:
    text = f"{STEPS}</Technique_1>\n<Technique_2>{HALVE}\n</Technique_2>\n<Technique_3>Recall"
    assert scaffold.parse_techniques(text) == scaffold.parse_techniques("<Technique_1>" + text) == [STEPS, HALVE]
    assert scaffold.parse_techniques("I cannot do that.") == []
