"""A dry run with engines of known speed: what the probe measures, what is printed, what is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from arte_edge.cli.main import main
from arte_edge.console import Reporter
from arte_edge.distill import probe
from arte_edge.distill.config import ModelConfig, RunConfig, TeacherConfig
from arte_edge.distill.dry_run import parse_prices
from arte_edge.distill.plan import Kind
from arte_edge.distill.run import Run
from arte_edge.errors import InputError
from arte_edge.models.local import LocalModel
from arte_edge.runtimes.completion import Completion, Request, Sampling
from arte_edge.runtimes.openai.client import Prices
from arte_edge.tasks.loaders import load_task

Capture = pytest.CaptureFixture[str]
READS, WRITES = 1000.0, 50.0  # tokens a second
DRAFT = "Dim the lamp by the {0} sofa</input><target>light_on</target></Question_4>"


class PacedEngine:
    """Reads and writes at a fixed pace on a clock of its own; a token is a word."""

    chat_template = None
    supports_grammar = False

    def __init__(self) -> None:
        self.special_tokens: dict[str, str] = {}
        self.now_s = 0.0
        self.calls: list[int] = []
        self._read = ""

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls.append(len(requests))
        prompts = [request.prompt for request in requests]
        shared = self.count_tokens(probe._common_start(prompts))
        own = sum(self.count_tokens(prompt) - shared for prompt in prompts)
        answers = [self._answer(request, sampling.max_tokens) for request in requests]
        # Like llama.cpp: what the last batch began with is still there.
        self.now_s += (own + (shared if self._read != prompts[0] else 0)) / READS
        self.now_s += sum(a.completion_tokens for a in answers if sampling.max_tokens > 1) / WRITES
        self._read = prompts[0]
        return answers

    def _answer(self, request: Request, limit: int) -> Completion:
        text = "They ask for light. <ans>light_on</ans>"
        if request.prompt.endswith("<Question_4><input>"):
            text = DRAFT.format(("green", "leather old")[request.sample]) + "\n<Question_5><input>cut"
        words = text.split()[:limit]
        return Completion(" ".join(words), "stop", self.count_tokens(request.prompt), len(words))

    def close(self) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, make_gguf: Callable[..., Path]) -> PacedEngine:
    paced = PacedEngine()
    gguf = make_gguf(rows=1024)
    monkeypatch.setattr(probe.time, "perf_counter", lambda: paced.now_s)
    monkeypatch.setattr(Run, "engine", lambda run, config: paced)
    monkeypatch.setattr(Run, "local", lambda run, config: LocalModel("m", "0" * 64, gguf, None, "Q8_0"))
    monkeypatch.setattr("arte_edge.distill.dry_run.need", lambda extra, why: None)
    return paced


def test_the_probe_finds_the_speeds_and_lengths(engine: PacedEngine, tmp_path: Path) -> None:
    run = Run(RunConfig(), load_task("home_intents"), tmp_path, Reporter(quiet=True))
    kinds = [Kind("teacher", "rationale"), Kind("student", "written", 3), Kind("student", "forced", 1)]
    measured = probe.measure(run, kinds)
    run.close()
    for speed in measured.speeds.values():
        assert speed.read == pytest.approx(READS, rel=0.02)
        assert speed.write == pytest.approx(WRITES, rel=0.02)
    assert measured.shapes[kinds[0]].written == 5
    assert measured.shapes[kinds[1]].shared > measured.shapes[kinds[2]].shared  # three shots against one
    assert measured.shapes[kinds[2]].written == 0  # closed answers are compared, not written
    assert measured.drafts_per_prompt == 0.5  # the second repeats the first, and the last of each is cut off
    assert engine.calls == [2] * 6


def test_a_plan_leaves_nothing_behind(
    engine: PacedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["distill", "quickstart", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    first_words = [line.split()[0] for line in printed.splitlines() if line.strip()]
    assert first_words[2:5] == ["check", "elicit", "calibrate"]
    assert "total" in first_words
    assert "rough" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_json_holds_the_stages_and_their_sum(engine: PacedEngine, capsys: Capture) -> None:
    assert main(["distill", "quickstart", "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["event"] == "plan"
    assert [row["stage"] for row in document["stages"]][-2:] == ["tune", "evaluate"]
    for key in ("calls", "prompt_tokens", "completion_tokens"):
        assert document["total"][key] == pytest.approx(sum(row[key] for row in document["stages"]), abs=8)
    assert document["total"]["cost_usd"] is None


SERVER = ["--teacher", "openai:m@http://127.0.0.1:1/v1", "--dry-run"]


def test_a_teacher_behind_a_server_costs_what_its_prices_say(engine: PacedEngine, capsys: Capture) -> None:
    argv: list[str] = ["distill", "quickstart", *SERVER, "--set", "data=original-teacher", "--prices", "1,2"]
    assert main([*argv, "--json"]) == 0
    stages = {row["stage"]: row for row in json.loads(capsys.readouterr().out)["stages"]}
    assert list(stages) == ["check", "tailor", "tune", "evaluate"]
    tailor = stages["tailor"]  # all of it is the teacher's
    cost = (tailor["prompt_tokens"] + 2 * tailor["completion_tokens"]) / 1e6
    assert tailor["cost_usd"] == pytest.approx(cost, abs=1e-4)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (SERVER, "alignment needs the teacher's weights"),
        (["--dry-run", "--prices", "1,2"], "runs here and costs nothing"),
        (["--prices", "1,2"], "goes with --dry-run"),
        (["--dry-run", "--prices", "cheap"], "not two prices"),
    ],
)
def test_what_cannot_be_planned_is_exit_2(
    argv: list[str], why: str, engine: PacedEngine, capsys: Capture
) -> None:
    assert main(["distill", "quickstart", *argv]) == 2
    assert why in " ".join(capsys.readouterr().err.split())


def test_prices_are_two_amounts_of_dollars() -> None:
    assert parse_prices("0.15, 0.6") == Prices(0.15, 0.6)
    for text in ("1", "1,2,3", "-1,2", "nan,1", "inf,1"):
        with pytest.raises(InputError, match="not two prices"):
            parse_prices(text)


def test_a_model_that_answers_nothing_is_an_error(
    engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(requests: Sequence[Any], sampling: Sampling) -> list[Completion]:
        return [Completion("", "error", error="too long") for _ in requests]

    monkeypatch.setattr(engine, "complete", fail)
    assert main(["distill", "quickstart", "--dry-run"]) == 1
    assert "too long" in capsys.readouterr().err


def test_the_student_is_not_the_teacher(engine: PacedEngine, tmp_path: Path) -> None:
    config = RunConfig(teacher=TeacherConfig(model="a", shots=8), student=ModelConfig(model="b"))
    run = Run(config, load_task("home_intents"), tmp_path, Reporter(quiet=True))
    shapes = probe.measure(run, [Kind("teacher", "rationale"), Kind("student", "written")]).shapes
    run.close()
    teacher, student = shapes.values()
    assert teacher.shared > student.shared  # eight worked examples against none
