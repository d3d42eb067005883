"""The estimate of a run: counts follow the settings, tokens a short probe, cost the prices."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import Capture, Make, Patch

from arte_edge.cli.main import main
from arte_edge.console import Reporter
from arte_edge.distill.config import ModelConfig, RunConfig, TeacherConfig
from arte_edge.distill.estimate import (
    Call,
    Lengths,
    Sizes,
    StageEstimate,
    estimate,
    parse_prices,
    probe,
    stage_work,
)
from arte_edge.distill.run_context import RunContext
from arte_edge.errors import InputError
from arte_edge.models.resolve import LocalModel
from arte_edge.runtimes.completion import Completion, Request, Sampling
from arte_edge.runtimes.openai.client import Prices
from arte_edge.tasks.loaders import load_task

DRAFT = "Dim the lamp by the {0} sofa</input><target>light_on</target></Question_4>"
SIZES = Sizes(
    n_validation=100,
    n_test=200,
    n_techniques=4,
    closed=True,
    server=False,
)
STAGES = ["check", "elicit", "calibrate", "prefer", "align", "tailor", "tune", "evaluate"]


def config(**tables: Any) -> RunConfig:
    return RunConfig.model_validate(tables)


def lines(run: RunConfig, sizes: Sizes = SIZES, prices: Prices | None = None) -> dict[str, StageEstimate]:
    lengths = {work.call: Lengths(prompt=60, completion=20) for work in stage_work(run, sizes, 1.0)}
    return {line.stage: line for line in estimate(run, sizes, lengths, 2.0, prices)}


def test_every_stage_has_a_line_in_order() -> None:
    assert list(lines(config())) == STAGES


def test_counts_are_those_of_the_stages() -> None:
    run = config(
        check={"examples": 40},
        elicit={"questions": 12},
        calibrate={"k": 16, "items": 32, "shots": [0, 1, 2, 3]},
        align={
            "question_pairs": 2,
            "rationale_pairs": 10,
            "batch_size": 4,
            "probe_every": 3,
            "probe_prompts": 2,
        },
        tailor={"questions": 72},
        evaluate={"shots": [0]},
    )
    assert {stage: line.calls for stage, line in lines(run).items()} == {
        "check": 3 * 40,
        "elicit": 6 + 4 * 12 + 12,
        "calibrate": 2 * 4 * 32,
        "prefer": 4 * 12 * 16,
        "align": (1 + 1) * 2,
        "tailor": 36 + 72 + 72,
        "tune": 0,
        "evaluate": 2 * 200 + 2 * 200 + 200,
    }


@pytest.mark.parametrize(
    ("section", "stage"), [("elicit", "elicit"), ("elicit", "prefer"), ("tailor", "tailor")]
)
def test_calls_and_tokens_grow_linearly_with_the_questions(section: str, stage: str) -> None:
    # Multiples of 32, or the last group of calls would be a part.
    once, thrice = (lines(config(**{section: {"questions": n}}))[stage] for n in (64, 192))
    assert thrice.calls == 3 * once.calls
    assert thrice.prompt_tokens == pytest.approx(3 * once.prompt_tokens)
    assert thrice.completion_tokens == pytest.approx(3 * once.completion_tokens)


def test_fewer_valid_drafts_a_prompt_mean_more_prompts() -> None:
    run = config(tailor={"questions": 100})

    def n_prompts(rate: float) -> int:
        tailored = [w.n for w in stage_work(run, SIZES, rate) if w.stage == "tailor"]
        return tailored[0]

    assert (n_prompts(2.0), n_prompts(0.5), n_prompts(1000.0)) == (50, 200, 4)


def test_the_original_teacher_skips_what_only_alignment_needs() -> None:
    assert list(lines(config(data="original-teacher"))) == ["check", "tailor", "tune", "evaluate"]


def test_splits_bound_what_is_asked() -> None:
    few = lines(config(), replace(SIZES, n_validation=20, n_test=50))
    assert few["check"].calls == 3 * 20
    assert few["calibrate"].calls == 2 * 4 * 20
    assert lines(config(evaluate={"limit": 1000}))["evaluate"].calls == lines(config())["evaluate"].calls


def test_open_answers_and_servers_have_no_votes_by_probability() -> None:
    closed = lines(config())["elicit"].calls
    assert lines(config(), replace(SIZES, closed=False))["elicit"].calls == closed - 40
    server = lines(config(data="original-teacher"), replace(SIZES, server=True))["tailor"].calls
    assert server == lines(config(data="original-teacher"))["tailor"].calls - 150


def test_tokens_are_calls_times_their_mean_length() -> None:
    line = lines(config(check={"examples": 32}))["check"]
    assert line.prompt_tokens == 3 * 32 * 60
    assert line.completion_tokens == 3 * 32 * 20


def test_only_the_calls_of_a_teacher_behind_a_server_cost() -> None:
    run, prices = config(data="original-teacher", check={"examples": 10}), Prices(100.0, 1000.0)
    check = lines(run, replace(SIZES, server=True), prices)["check"]
    assert check.cost_usd == pytest.approx((10 * 60 * 100 + 10 * 20 * 1000) / 1e6)
    assert lines(run, SIZES, prices)["check"].cost_usd == 0


class WordEngine:
    """Answers by a script and counts its calls; a token is a word."""

    chat_template = None
    supports_grammar = False

    def __init__(self) -> None:
        self.special_tokens: dict[str, str] = {}
        self.calls: list[int] = []

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls.append(len(requests))
        return [self._answer(request, sampling.max_tokens) for request in requests]

    def _answer(self, request: Request, limit: int) -> Completion:
        text = "They ask for light. <ans>light_on</ans>"
        if request.prompt.endswith("<Question_4><input>"):
            text = DRAFT.format(("green", "leather old")[request.sample]) + "\n<Question_5><input>cut"
        words = text.split()[:limit]
        return Completion(" ".join(words), "stop", self.count_tokens(request.prompt), len(words))

    def close(self) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: Patch, make_gguf: Make) -> WordEngine:
    words = WordEngine()
    gguf = make_gguf(rows=1024)
    monkeypatch.setattr(RunContext, "engine", lambda run, config: words)
    monkeypatch.setattr(
        RunContext, "local", lambda run, config: LocalModel("m", "0" * 64, gguf, None, "Q8_0")
    )
    monkeypatch.setattr("arte_edge.distill.estimate.need", lambda extra, why: None)
    return words


def test_the_probe_finds_the_lengths(engine: WordEngine, tmp_path: Path) -> None:
    run = RunContext(RunConfig(), load_task("home_intents"), tmp_path, Reporter(quiet=True))
    calls = [Call("teacher", "rationale"), Call("student", "generated", 3), Call("student", "constrained", 1)]
    lengths, drafts_per_prompt = probe(run, calls)
    run.close()
    assert lengths[calls[0]].completion == 5
    assert lengths[calls[1]].prompt > lengths[calls[2]].prompt  # three shots against one
    assert lengths[calls[2]].completion == 0  # closed answers are compared, not generated
    assert drafts_per_prompt == 0.5  # the second repeats the first, and the last of each is truncated
    assert engine.calls == [2] * 3


def test_a_plan_leaves_nothing_behind(
    engine: WordEngine, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["distill", "quickstart", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    first_words = [line.split()[0] for line in printed.splitlines() if line.strip()]
    assert first_words[2:5] == ["check", "elicit", "calibrate"]
    assert "total" in first_words
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_json_holds_the_stages_and_their_sum(engine: WordEngine, capsys: Capture) -> None:
    assert main(["distill", "quickstart", "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["event"] == "plan"
    assert [row["stage"] for row in document["stages"]][-2:] == ["tune", "evaluate"]
    for key in ("calls", "prompt_tokens", "completion_tokens"):
        assert document["total"][key] == pytest.approx(sum(row[key] for row in document["stages"]), abs=8)
    assert document["total"]["cost_usd"] is None


SERVER = ["--teacher", "openai:m@http://127.0.0.1:1/v1", "--dry-run"]


def test_a_teacher_behind_a_server_costs_what_its_prices_say(engine: WordEngine, capsys: Capture) -> None:
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
        (["--dry-run", "--prices", "1,2"], "runs locally and costs nothing"),
        (["--prices", "1,2"], "needs --dry-run"),
        (["--dry-run", "--prices", "cheap"], "not two prices"),
    ],
)
def test_what_cannot_be_planned_is_exit_2(
    argv: list[str], why: str, engine: WordEngine, capsys: Capture
) -> None:
    assert main(["distill", "quickstart", *argv]) == 2
    assert why in " ".join(capsys.readouterr().err.split())


def test_prices_are_two_amounts_of_dollars() -> None:
    assert parse_prices("0.15, 0.6") == Prices(0.15, 0.6)
    for text in ("1", "1,2,3", "-1,2", "nan,1", "inf,1"):
        with pytest.raises(InputError, match="not two prices"):
            parse_prices(text)


def test_a_model_that_answers_nothing_is_an_error(
    engine: WordEngine, monkeypatch: Patch, capsys: Capture
) -> None:
    def fail(requests: Sequence[Any], sampling: Sampling) -> list[Completion]:
        return [Completion("", "error", error="too long") for _ in requests]

    monkeypatch.setattr(engine, "complete", fail)
    assert main(["distill", "quickstart", "--dry-run"]) == 1
    assert "too long" in capsys.readouterr().err


def test_the_student_is_not_the_teacher(engine: WordEngine, tmp_path: Path) -> None:
    config = RunConfig(teacher=TeacherConfig(model="a", shots=8), student=ModelConfig(model="b"))
    run = RunContext(config, load_task("home_intents"), tmp_path, Reporter(quiet=True))
    calls = [Call("teacher", "rationale"), Call("student", "generated")]
    lengths, _ = probe(run, calls)
    run.close()
    assert lengths[calls[0]].prompt > lengths[calls[1]].prompt  # eight few-shot examples against none
