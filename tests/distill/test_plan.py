"""The plan of a run: counts follow the settings, minutes the measured rates, cost the prices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from arte_edge.distill.config import RunConfig
from arte_edge.distill.plan import Measured, Shape, Sizes, Speed, StagePlan, plan, works
from arte_edge.runtimes.openai.client import Prices

SIZES = Sizes(
    n_validation=100,
    n_test=200,
    n_techniques=4,
    closed=True,
    server=False,
    teacher_parameters=494_000_000,
    student_parameters=134_500_000,
)
STAGES = ["check", "elicit", "calibrate", "prefer", "align", "tailor", "tune", "evaluate"]


def config(**tables: Any) -> RunConfig:
    return RunConfig.model_validate(tables)


def lines(run: RunConfig, sizes: Sizes = SIZES, prices: Prices | None = None) -> dict[str, StagePlan]:
    shapes = {work.kind: Shape(shared=50, own=10, written=20) for work in works(run, sizes, 1.0)}
    measured = Measured({"teacher": Speed(100, 10), "student": Speed(400, 40)}, shapes, drafts_per_prompt=2.0)
    return {line.stage: line for line in plan(run, sizes, measured, prices)}


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
    assert thrice.engine_minutes == pytest.approx(3 * once.engine_minutes)


def test_fewer_valid_drafts_a_prompt_mean_more_prompts() -> None:
    run = config(tailor={"questions": 100})

    def n_prompts(rate: float) -> int:
        tailored = [w.calls for w in works(run, SIZES, rate) if w.stage == "tailor"]
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


def test_minutes_are_tokens_read_and_written_at_the_measured_speed() -> None:
    line = lines(config(check={"examples": 32}))["check"]
    teacher_s = (50 + 32 * 10) / 100 + 32 * 20 / 10
    student_s = (50 + 32 * 10) / 400 + 32 * 20 / 40
    assert line.minutes == pytest.approx((teacher_s + 2 * student_s) / 60)
    assert line.prompt_tokens == 3 * 32 * 60
    assert line.completion_tokens == 3 * 32 * 20


def test_a_shared_beginning_is_read_once_for_each_rationale_in_prefer() -> None:
    run = config(elicit={"questions": 10}, calibrate={"k": 40})
    [work] = [w for w in works(run, SIZES, 1.0) if w.stage == "prefer"]
    assert (work.calls, work.groups) == (10 * 4 * 40, 10 * 4 * 2)


def test_training_takes_time_by_pairs_examples_and_weights() -> None:
    run = config(
        elicit={"questions": 12},
        align={"question_pairs": 2, "rationale_pairs": 10},
        tailor={"questions": 60},
        tune={"epochs": 2},
    )
    small = lines(run)
    assert small["align"].training_minutes == pytest.approx(150 / 60)
    assert small["tune"].training_minutes == pytest.approx(60 * 2 * 0.5 / 60)
    large = lines(run, replace(SIZES, teacher_parameters=2 * SIZES.teacher_parameters))
    assert large["align"].training_minutes == pytest.approx(2 * 150 / 60)
    assert large["tune"].training_minutes == small["tune"].training_minutes


def test_only_the_calls_of_a_teacher_behind_a_server_cost() -> None:
    run, prices = config(data="original-teacher", check={"examples": 10}), Prices(100.0, 1000.0)
    check = lines(run, replace(SIZES, server=True), prices)["check"]
    assert check.cost_usd == pytest.approx((10 * 60 * 100 + 10 * 20 * 1000) / 1e6)
    assert lines(run, SIZES, prices)["check"].cost_usd == 0
