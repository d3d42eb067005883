"""The device's time becomes tokens of an answer; without a device nothing of a run changes."""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Patch, artifact, facts, speed_row, student_file

from arte_edge.asking.form import instruction
from arte_edge.distill.config import Deploy
from arte_edge.distill.latency import FILE_NAME, Budget, Rates, budget_tokens, device_rates, penalize_length
from arte_edge.distill.pipeline import decide_budget
from arte_edge.distill.preference.scoring import Score
from arte_edge.distill.run_context import RunContext
from arte_edge.distill.stages.prefer import _row
from arte_edge.errors import InputError
from arte_edge.models.resolve import LocalModel, quantized_student
from arte_edge.results.rows import SpeedRow
from arte_edge.results.student_json import Speed, write_student
from arte_edge.runtimes.completion import Completion, Request, Sampling
from arte_edge.tasks.task import Answer

RATES = Rates(20.0, 200.0, "measured", "llama_cpp, 4 threads")
DEVICE = {"deploy": {"device": "raspberry-pi-5", "max_answer_seconds": 2.0}}
SMALL = {"check": {"examples": 20}, "calibrate": {"items": 20, "k": 8}}
PI = "raspberry-pi-5"


def settle(run: RunContext, rates: Rates = RATES, *, update: bool = False) -> Budget:
    """Decide the budget of a run whose device has these rates."""
    with Patch.context() as patch:
        patch.setattr("arte_edge.distill.pipeline.device_rates", lambda deploy, student: rates)
        return decide_budget(run, update=update)


def test_a_time_that_leaves_no_answer_is_refused_and_says_what_would_do() -> None:
    assert budget_tokens(2.0, 100, RATES) == 30  # (2 s - 100/200 s) · 20/s
    with pytest.raises(InputError, match=r"max_answer_seconds = 0\.6: prefill of 100 prompt tokens") as caught:
        budget_tokens(0.6, 100, RATES)
    assert "0.9 s or more" in caught.value.hint
    assert budget_tokens(0.9, 100, RATES) == 8


@given(st.floats(0.1, 60), st.integers(1, 2000), st.floats(0.5, 500), st.floats(1, 5000))
def test_an_answer_within_the_budget_is_given_in_time(
    seconds: float, prompt: int, decode: float, prefill: float
) -> None:
    try:
        tokens = budget_tokens(seconds, prompt, Rates(decode, prefill, "predicted", ""))
    except InputError:
        return
    assert prompt / prefill + tokens / decode <= seconds * (1 + 1e-6)
    assert prompt / prefill + (tokens + 1) / decode > seconds * (1 - 1e-6)


def test_only_what_is_too_long_pays_and_longer_pays_more() -> None:
    assert penalize_length(0.8, 30, 30, log=False) == 0.8
    assert penalize_length(0.8, 60, 30, log=False) == pytest.approx(0.4)
    assert penalize_length(-1.0, 30, 30, log=True) == -1.0
    # A log-probability is below zero: a factor would reward length.
    assert penalize_length(-1.0, 60, 30, log=True) == pytest.approx(-1.0 + math.log(0.5))
    assert penalize_length(-0.4, 60, 30, log=False) == -0.4  # an estimate of a probability
    assert penalize_length(-1.0, 90, 30, log=True) < penalize_length(-1.0, 60, 30, log=True)


def test_the_budget_is_decided_once(house: Any) -> None:
    run = house.run(**SMALL, **DEVICE)
    first, faster = settle(run), Rates(40.0, 400.0, "measured", "")
    file = house.folder / FILE_NAME
    document = json.loads(file.read_text())
    assert document["budget"]["rates"]["evidence"] == "measured"
    assert settle(run, faster) == first
    run.close()
    run = house.run(**SMALL, deploy={**DEVICE["deploy"], "draws": 3})  # no part of a budget
    assert settle(run, faster) == first
    assert settle(run, faster, update=True).answer_tokens > first.answer_tokens
    document["budget"]["answer_tokens"] = "many"
    for damaged in ("{", "[" * 5000, "[]", json.dumps(document)):  # decided again
        file.write_text(damaged)
        assert settle(run) == first
    run.close()


def test_the_prompt_is_that_of_the_configured_form(house: Any) -> None:
    tokens = {}
    for form in ("answer", "reasoning-first"):
        run = house.run(tune={"target": form}, **SMALL, **DEVICE)
        tokens[form] = settle(run, update=True).prompt_tokens
        run.close()
    more = instruction(house.task, "reasoning-first"), instruction(house.task, "answer")
    assert tokens["reasoning-first"] - tokens["answer"] == len(more[0].split()) - len(more[1].split()) > 0


def test_without_a_device_there_is_no_budget_and_no_trace_of_one(house: Any, scored: Any) -> None:
    assert Deploy().device == ""
    run, _, rows = scored(**SMALL)
    assert run.budget is None and not (house.folder / FILE_NAME).exists()
    assert run.most_tokens(96) == 96
    assert "student_tokens" not in rows[0]


def test_a_draft_that_is_too_long_pays_and_is_what_the_teacher_unlearns(house: Any, scored: Any) -> None:
    first = "Look at the last digit"  # the technique that takes 60 words where the others take 6
    house.teacher.say = lambda r, text, _: "so it goes on " * 15 + text if first in r.prompt else text
    _, summary, rows = scored(Budget(20, 10, RATES), "reasoning-first", **SMALL, **DEVICE)
    long = [row for row in rows if row["over_budget"]]
    short = [row for row in rows if not row["over_budget"]]
    assert {row["technique"] for row in long} == {0} and {row["technique"] for row in short} == {1, 2, 3}
    assert summary["over_budget"] == len(long) > 0
    assert all(row["score"] == row["bias_free"] for row in short)
    for row in long:
        assert row["score"] == pytest.approx(row["bias_free"] * 20 / row["student_tokens"], abs=1e-6)
    assert max(row["score"] for row in long) < min(row["score"] for row in short)


def test_the_length_fit_is_taken_out_after_the_penalty_and_an_influence_pays_none(house: Any) -> None:
    draft = {"question": "q", "technique": 0, "tokens": 7, "text": "so it goes on " * 10 + "<ans>odd</ans>"}
    run = house.run(**SMALL, **DEVICE)
    run.budget, run.form = Budget(10, 10, RATES), "reasoning-first"

    def score(plain: float, by_length: float = 0.0) -> Any:
        return _row(run, house.student, draft, Score(plain, plain, 0.0, 0.5), plain, by_length)

    n = len(draft["text"].split())
    assert score(0.3, 0.5)["score"] == pytest.approx(0.3 * 10 / n - 0.5, abs=1e-6)
    assert score(0.3, 0.5)["over_budget"]
    run.form, run.config = "answer", house.config(**SMALL, **DEVICE)
    assert score(0.3)["score"] == 0.3 and score(0.3)["student_tokens"] == 1
    run.form, run.config = "reasoning-first", house.config(prefer={"score": "influence"}, **SMALL, **DEVICE)
    house.task = run.task = replace(run.task, answer=Answer(kind="text"))
    assert score(-0.4)["score"] == -0.4 and score(7.0)["score"] == 7.0
    run.close()


def test_a_student_that_writes_is_cut_off_at_the_budget(house: Any, scored: Any, monkeypatch: Patch) -> None:
    seen: list[int] = []
    complete = house.student.complete

    def watch(requests: list[Request], sampling: Sampling) -> list[Completion]:
        seen.append(sampling.max_tokens)
        return list(complete(requests, sampling))

    monkeypatch.setattr(house.student, "complete", watch)
    _, _, rows = scored(Budget(11, 10, RATES), prefer={"score": "accuracy"}, **SMALL, **DEVICE)
    assert set(seen) == {11}
    assert rows[0]["score"] == rows[0]["bias_free"]  # cut off, it does not pay a second time


def test_a_student_file_is_made_once_and_kept_by_runs_that_start_together(
    tmp_path: Path, model_cache: Path, student: LocalModel, monkeypatch: Patch
) -> None:
    made: list[str] = []

    def quantize(source: Path, out: Path, kind: str) -> None:
        made.append(kind)
        time.sleep(0.2)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(source.read_bytes() + b"!")

    monkeypatch.setattr("arte_edge.gguf.quantize.quantize", quantize)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(quantized_student, [student] * 2, ["Q4_K_M"] * 2)
    assert first == second == quantized_student(student, "Q4_K_M")
    assert made == ["Q4_K_M"] and first.quantization == "Q4_K_M" and first.sha256 != student.sha256
    assert quantized_student(student, "F16") is student
    checkpoint = LocalModel("m", "ab" * 32, None, tmp_path, "BF16")
    with pytest.raises(InputError, match=r"prefer\.student_file = 'Q8_0': m is a checkpoint"):
        quantized_student(checkpoint, "Q8_0")


@pytest.fixture
def student(make_gguf: Any) -> LocalModel:
    return LocalModel("m", "ab" * 32, make_gguf(), None, "F16")


def row(rate: float, test: str, profile: str = PI, **more: Any) -> SpeedRow:
    known = {"quantization": "Q4_K_M", "model_filename": "m-Q4_K_M.gguf", "runtime": "llama_cpp 1"}
    device = facts(profile=profile, fingerprint="0" * 16)
    return speed_row(test, rate, device=device, **known | more)


def bench(folder: Path, *rows: SpeedRow) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "bench.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in rows))
    return str(folder)


def test_measured_rows_of_the_file_on_the_device_count(tmp_path: Path, student: LocalModel) -> None:
    others = [row(90, "tg128", quantization="Q8_0"), row(95, "tg128", "orange-pi-5")]
    rows = [row(200, "pp512"), row(40, "tg128"), *others]
    rows += [row(99, "tg128", throttled=True), row(99, "tg128", contended=True)]
    folder = bench(tmp_path / "b", *rows)
    for rates in (folder, f"{folder}/bench.jsonl"):
        found = device_rates(Deploy(device=PI, rates=rates), student)
        assert found == Rates(40, 200, "measured", "llama_cpp 1, 4 threads")
    by_print = device_rates(Deploy(device="0" * 16, rates=folder), student)
    assert by_print.evidence == "measured"


def test_merged_speeds_of_an_earlier_round_count(tmp_path: Path, student: LocalModel) -> None:
    speed = Speed(device=PI, runtime="r", threads=2, decode_tokens_per_s=33, prefill_tokens_per_s=150)
    write_student(tmp_path / "round1" / "export", student_file(artifact("Q4_K_M", speeds=(speed,))))
    found = device_rates(Deploy(device=PI, rates=str(tmp_path / "round1")), student)
    assert (found.decode_tokens_per_s, found.evidence) == (33, "measured")
    named = device_rates(Deploy(device=PI, file="m-Q4_K_M.gguf", rates=str(tmp_path / "round1")), student)
    assert named == found


def test_writing_without_reading_is_no_measurement_of_an_answer(tmp_path: Path, student: LocalModel) -> None:
    found = device_rates(Deploy(device=PI, rates=bench(tmp_path / "b", row(40, "tg128"))), student)
    assert found.evidence == "predicted" and found.prefill_tokens_per_s == pytest.approx(76)
    assert "assumed" in found.source


def test_a_rate_beside_other_work_is_not_taken_and_it_is_said(tmp_path: Path, student: LocalModel) -> None:
    half = bench(tmp_path / "a", row(200, "pp512", contended=True), row(40, "tg128"))
    found = device_rates(Deploy(device=PI, rates=half), student)
    assert found.evidence == "predicted" and found.prefill_tokens_per_s == pytest.approx(76)
    assert "1 measurement(s) left out" in found.source
    busy = bench(tmp_path / "b", row(200, "pp512", contended=True), row(40, "tg128", contended=True))
    with pytest.raises(InputError, match=r"left out.* run the same `arte-edge bench` again"):
        device_rates(Deploy(device="0" * 16, rates=busy), student)


def test_a_device_that_nobody_knows_and_nobody_measured_is_refused(tmp_path: Path, student: LocalModel) -> None:
    with pytest.raises(InputError, match="toaster"):
        device_rates(Deploy(device="toaster"), student)
    with pytest.raises(InputError, match=r"deploy\.device = 'toaster': no such profile, and not measured"):
        device_rates(Deploy(device="toaster", rates=bench(tmp_path / "b", row(40, "tg128"))), student)


@pytest.mark.model
def test_a_file_that_nobody_made_yet_is_predicted_from_its_size(smollm2: LocalModel) -> None:
    def rate(file: str) -> float:
        found = device_rates(Deploy(device=PI, file=file), smollm2)
        assert found.evidence == "predicted" and "GB/s" in found.source
        return found.decode_tokens_per_s

    assert rate("F16") < rate("Q8_0") < rate("Q4_K_M")
    with pytest.raises(InputError, match="Q4_K_X"):
        rate("Q4_K_X")
