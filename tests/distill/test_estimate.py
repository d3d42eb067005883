"""The estimate of a run: the calls that its stages make, tokens from a short probe, cost from prices."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tiny import Capture, Patch

from arte_edge.distill.config import TeacherConfig
from arte_edge.distill.estimate import Call, Lengths, StageEstimate, estimate, parse_prices, probe, stage_work
from arte_edge.distill.stages.calibrate import calibrate
from arte_edge.distill.stages.check import check
from arte_edge.distill.stages.elicit import elicit
from arte_edge.distill.stages.evaluate import evaluate
from arte_edge.distill.stages.prefer import prefer
from arte_edge.distill.stages.target import target
from arte_edge.distill.stages.tune import tailor_and_tune
from arte_edge.errors import InputError
from arte_edge.runtimes.completion import Completion
from arte_edge.runtimes.openai.client import Prices
from arte_edge.tasks.task import Answer, Example

UNALIGNED: dict[str, Any] = {"data": "original-teacher", "tailor": {"questions": 16}}
BEST_OF_3 = {**UNALIGNED, "data": "best-of-n", "tailor": {"questions": 16, "best_of": 3}}
SERVER = {"data": "original-teacher", "teacher": {"model": "openai:m@http://127.0.0.1:1/v1"}}
K = {"k": 24, "items": 40}


def estimated(house: Any, prices: Prices | None = None, **tables: Any) -> dict[str, StageEstimate]:
    config = house.config(**tables)
    lengths = {work.call: Lengths(prompt=60, completion=20) for work in stage_work(config, house.task, 1.0)}
    return {line.stage: line for line in estimate(config, house.task, lengths, 5.0, prices)}


def made(house: Any, **tables: Any) -> Counter[str]:
    """Run the stages that train nothing, and return the calls of each that were not in the store already."""
    house.teacher.word = lambda prompt: hashlib.sha256(prompt.encode()).hexdigest()[:8]
    house.teacher.say = lambda request, text, _: text.replace("at once", f"at try {request.sample}")
    draft, fresh = house.teacher.drafts, count()
    house.teacher.drafts = lambda sample: draft(next(fresh))  # no stage gets what another has asked about
    house.learned = lambda rows: lambda n: n < len(rows) * 14  # each round is better than the one before
    run = house.run(**tables)
    check(run, force=True)
    target(run)
    if run.config.aligned:
        elicit(run)
        calibrate(run)
        prefer(run)
    elif run.config.data == "best-of-n":
        calibrate(run)
    evaluate(run, tailor_and_tune(run, None))
    run.close()
    found, stage = Counter[str](), ""
    for line in (house.folder / "events.jsonl").read_text("utf-8").splitlines():
        event = json.loads(line)
        stage = event["name"].removesuffix("-2") if event["event"] == "stage" else stage
        stage = "tune" if stage.startswith(("tune", "validate")) else stage
        if event["event"] == "calls":
            found[stage] += event["n"] - event["kept"]
    return found


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"prefer": {"race": "on"}, "calibrate": K},
        {"prefer": {"score": "accuracy", "race": "on"}, "calibrate": K},
        {"prefer": {"score": "forced"}, "elicit": {"questions": 33, "asked": 1, "opinion_shots": 0}},
        {"tailor": {"questions": 16, "label": "teacher"}, "evaluate": {"teacher": False, "shots": [0, 3]}},
        {**UNALIGNED, "check": {"examples": 10}, "evaluate": {"limit": 5}},
        {"data": "random", "calibrate": {"items": 15, "shots": [1]}},
        {**UNALIGNED, "check": {"examples": 10}, "rounds": 2},
        {**UNALIGNED, "check": {"own_labels": False}, "evaluate": {"shots": [3], "teacher": False}},
        {**UNALIGNED, "tune": {"target": "reasoning-first"}, "elicit": {"opinion_shots": 0}},
        {**UNALIGNED, "tune": {"target": "answer"}, "rounds": 2},
        {**UNALIGNED, "data": "best-of-n", "prefer": {"race": "off"}, "calibrate": {"k": 6}},
        {**BEST_OF_3, "prefer": {"race": "off"}, "tune": {"target": "reasoning-first"}},
        {**UNALIGNED, "data": "preferred-rationale", "tune": {"target": "reasoning-first"}},
    ],
)
@pytest.mark.parametrize("kind", ["told", "choice", "text"])
def test_counts_are_the_calls_that_the_stages_make(house: Any, kind: str, tables: dict[str, Any]) -> None:
    house.by_label = kind == "told"
    if kind == "text":
        house.task = replace(house.task, answer=Answer(kind="text"))
    calls = made(house, **tables)
    told = {stage: line.calls for stage, line in estimated(house, **tables).items()}
    raced = tables.get("prefer", {}).get("race") == "on"
    if raced:  # at most so many, and most of them
        assert 0.6 * told["prefer"] <= calls["prefer"] <= told["prefer"]
    for stage in set(told) - {"align", *(["prefer"] if raced else [])}:
        assert told[stage] == calls[stage], stage
    assert set(told) == {*calls, "tune"} | ({"align"} if "prefer" in told else set())


def test_a_trial_on_some_of_the_seeds_and_one_without_reasons_count_their_own(house: Any) -> None:
    house.by_label = True
    for n_seed in (4, 130):
        more = tuple(Example(f"Is {n} even or odd?", "odd" if n % 2 else "even") for n in range(n_seed))
        house.task = replace(house.task, seed=more)
        house.folder = house.folder.with_name(f"{n_seed} seeds")
        house.folder.mkdir()
        calls, told = made(house, **UNALIGNED), estimated(house, **UNALIGNED)
        assert told["target"].calls == calls["target"]


def test_the_probes_of_alignment_are_counted(house: Any) -> None:
    pairs = {"question_pairs": 2, "rationale_pairs": 10, "batch_size": 4, "probe_prompts": 2, "fresh_drafts": 0}
    pairs |= {"target_kl": 0.0}
    for every, n_look in ((3, 2), (2, 3), (1, 4)):  # three steps, and one before the first
        align = estimated(house, elicit={"questions": 12}, align={**pairs, "probe_every": every})["align"]
        assert align.calls == 2 * n_look


def test_an_influence_is_one_call_a_draft_after_the_alignment_too(house: Any) -> None:
    tables = {"calibrate": {"k": 6}, "prefer": {"score": "influence"}}
    align = [
        work
        for work in stage_work(house.config(**tables, align={"fresh_drafts": 4}), house.task, 1.0)
        if work.stage == "align" and work.call.who == "student"
    ]
    assert [work.n for work in align] == [2 * 4 + 6]


def test_fewer_valid_drafts_a_prompt_mean_more_prompts(house: Any) -> None:
    def n_prompts(rate: float) -> int:
        config = house.config(tailor={"questions": 100, "label": "teacher"})
        return next(w.n for w in stage_work(config, house.task, rate) if w.stage == "tailor")

    assert n_prompts(1000.0) < n_prompts(2.0) < n_prompts(0.5) == 200


def test_a_server_has_no_votes_by_probability_and_its_calls_cost(house: Any) -> None:
    local = estimated(house, data="original-teacher", tailor={"questions": 10})
    server = estimated(house, Prices(100.0, 1000.0), tailor={"questions": 10}, check={"examples": 10}, **SERVER)
    assert server["tailor"].calls == local["tailor"].calls - 16
    assert server["check"].cost_usd == pytest.approx((10 * 60 * 100 + 10 * 20 * 1000) / 1e6)
    assert (server["check"].prompt_tokens, server["check"].completion_tokens) == (40 * 60, 40 * 20)
    assert estimated(house, Prices(1.0, 1.0))["check"].cost_usd == 0


@pytest.mark.parametrize("server", [True, False])
def test_the_probe_finds_the_lengths(house: Any, server: bool, monkeypatch: Patch) -> None:
    house.teacher.drafts = lambda sample: house.student.drafts(0)  # the second answer repeats the first
    run = house.run()
    monkeypatch.setattr(TeacherConfig, "on_server", server)
    calls = [
        Call("teacher", "rationale"),
        Call("student", "generated"),
        Call("student", "generated", 3),
        Call("student", "constrained", 1),
    ]
    lengths, drafts_per_prompt = probe(run, calls)
    run.close()
    limits = run.config.elicit.rationale_tokens, run.config.evaluate.answer_tokens
    assert lengths[calls[0]].completion == (7 if server else limits[0])
    assert lengths[calls[1]].completion == limits[1]
    # The teacher has eight shots, the student none, three and one.
    assert lengths[calls[0]].prompt > lengths[calls[2]].prompt > lengths[calls[1]].prompt
    assert lengths[calls[2]].prompt > lengths[calls[3]].prompt
    assert lengths[calls[3]].completion == 0  # closed answers are compared, not generated
    assert drafts_per_prompt == (2.5 if server else run.config.elicit.asked)
    assert house.calls == (4 if server else 0)  # a model on this machine generates nothing


def test_a_server_that_answers_nothing_is_an_error(house: Any, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr("arte_edge.distill.config.TeacherConfig.on_server", True)
    house.teacher.complete = lambda requests, _: [Completion("", "error", error="too long") for _ in requests]
    assert house.distill("--dry-run") == 1
    assert "The probe failed: too long" in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_leaves_nothing_behind(house: Any, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    assert house.distill("--dry-run") == 0
    first_words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert first_words[2:5] == ["check", "elicit", "calibrate"]
    assert "total" in first_words
    assert {path.suffix for path in tmp_path.iterdir()} == {".gguf"}


def test_json_holds_the_stages_and_their_sum(house: Any, capsys: Capture) -> None:
    assert house.distill("--dry-run", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["event"] == "plan"
    assert [row["stage"] for row in document["stages"]][-2:] == ["tune", "evaluate"]
    for key in ("calls", "prompt_tokens", "completion_tokens"):
        assert document["total"][key] == pytest.approx(sum(row[key] for row in document["stages"]), abs=8)
    assert document["total"]["cost_usd"] is None


def test_a_teacher_behind_a_server_costs_what_its_prices_say(house: Any, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr("arte_edge.distill.run_context.open_engine", lambda *_, **__: house.teacher)
    flags = ["--teacher", SERVER["teacher"]["model"], "--set", "data=original-teacher", "--prices", "1,2"]
    assert house.distill("--dry-run", "--json", *flags) == 0
    stages = {row["stage"]: row for row in json.loads(capsys.readouterr().out)["stages"]}
    assert list(stages) == ["check", "tailor", "tune", "evaluate"]
    tailor = stages["tailor"]  # all of it is the teacher's
    cost = (tailor["prompt_tokens"] + 2 * tailor["completion_tokens"]) / 1e6
    assert tailor["cost_usd"] == pytest.approx(cost, abs=1e-4)
    flags[3] = "data=best-of-n"
    assert house.distill("--dry-run", "--json", *flags) == 0
    plan = json.loads(capsys.readouterr().out)
    best = {row["stage"]: row for row in plan["stages"]}
    assert list(best) == ["check", "calibrate", "tailor", "tune", "evaluate"]
    assert 2 * tailor["cost_usd"] < best["tailor"]["cost_usd"] < 4 * tailor["cost_usd"]
    assert "4 drafts for each" in " ".join(plan["notes"])


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--dry-run", "--teacher", SERVER["teacher"]["model"]], "alignment needs the teacher's weights"),
        (["--set", "data=one-technique", "--set", "elicit.by_label=true"], "chooses among rationales"),
        (["--set", "data=rationale-only", "--set", "elicit.by_label=true"], "on rationales alone"),
        (["--set", "align.question_pairs=0", "--set", "elicit.by_label=true"], "on rationales alone"),
        (["--dry-run", "--prices", "1,2"], "runs locally and costs nothing"),
        (["--prices", "1,2"], "needs --dry-run"),
        (["--dry-run", "--prices", "free"], "not two prices"),
    ],
)
def test_flags_that_do_not_fit_are_refused(house: Any, flags: list[str], why: str, capsys: Capture) -> None:
    assert house.distill(*flags) == 2
    assert why in " ".join(capsys.readouterr().err.split())
    assert house.calls == 0


@pytest.mark.parametrize("text", ["1", "1,2,3", "a,b", "-1,2", "1,nan", "inf,1", ""])
def test_prices_are_two_numbers_of_dollars(text: str) -> None:
    assert parse_prices("0.15, 0.6") == Prices(0.15, 0.6)
    with pytest.raises(InputError, match="not two prices"):
        parse_prices(text)
