"""The device's time becomes tokens of an answer; without a device nothing of a run changes."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Patch

from arte_edge.distill.config import Deploy
from arte_edge.distill.latency import (
    FILE_NAME,
    Budget,
    Rates,
    budget_tokens,
    device_rates,
    penalize_length,
)
from arte_edge.distill.pipeline import run_budget
from arte_edge.distill.run_context import RunContext, quantized_student
from arte_edge.distill.stages.calibrate import calibrate
from arte_edge.distill.stages.check import check
from arte_edge.distill.stages.elicit import elicit
from arte_edge.distill.stages.prefer import prefer
from arte_edge.distill.stages.tailor import tailor
from arte_edge.errors import InputError, StoppedEarly
from arte_edge.models.resolve import LocalModel
from arte_edge.results.rows import DeviceFacts, SpeedRow
from arte_edge.results.student_json import (
    Artifact,
    Fidelity,
    Lineage,
    Speed,
    Student,
    StudentFile,
    write_student,
)
from arte_edge.runtimes.completion import Completion, Request, Sampling
from arte_edge.store import content_key

RATES = Rates(20.0, 200.0, "measured", "llama_cpp, 4 threads")
DEVICE = {"deploy": {"device": "raspberry-pi-5", "max_answer_seconds": 2.0}}


def settle(run: RunContext, rates: Rates = RATES, *, update: bool = False) -> Budget:
    """Decide the budget of a run whose device has these rates."""
    with Patch.context() as patch:
        patch.setattr("arte_edge.distill.latency.device_rates", lambda deploy, student: rates)
        return run_budget(run, update=update)


def test_the_budget_is_what_reading_the_prompt_leaves() -> None:
    assert budget_tokens(2.0, 100, RATES) == 30  # (2 s - 100/200 s) · 20/s


def test_a_time_that_leaves_no_answer_is_refused_and_says_what_would_do() -> None:
    with pytest.raises(
        InputError, match=r"max_answer_seconds = 0\.6: prefill of 100 prompt tokens"
    ) as caught:
        budget_tokens(0.6, 100, RATES)
    assert "0.9 s or more" in caught.value.hint
    assert budget_tokens(0.9, 100, RATES) == 8


@given(st.floats(0.1, 60), st.integers(1, 2000), st.floats(0.5, 500), st.floats(1, 5000))
def test_an_answer_within_the_budget_is_given_in_time(
    seconds: float, prompt: int, decode: float, prefill: float
) -> None:
    rates = Rates(decode, prefill, "predicted", "")
    try:
        tokens = budget_tokens(seconds, prompt, rates)
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
    assert penalize_length(-1.0, 90, 30, log=True) < penalize_length(-1.0, 60, 30, log=True)


def start(house: Any, **tables: Any) -> RunContext:
    run: RunContext = house.run(**{"check": {"examples": 20}, "calibrate": {"items": 20, "k": 8}, **tables})
    if run.config.deploy.device:
        run.budget = settle(run)
    return run


def test_the_budget_is_decided_once(house: Any) -> None:
    run = start(house, **DEVICE)
    assert run.budget is not None
    assert json.loads((house.folder / FILE_NAME).read_text())["budget"]["rates"]["evidence"] == "measured"
    faster = Rates(40.0, 400.0, "measured", "")
    assert settle(run, faster, update=False) == run.budget
    again = settle(run, faster, update=True)
    assert again is not None and again.answer_tokens > run.budget.answer_tokens
    (house.folder / FILE_NAME).write_text("{")  # damaged: decided again
    assert settle(run) == run.budget
    run.close()


def test_without_a_device_there_is_no_budget_and_no_trace_of_one(house: Any) -> None:
    run = start(house)
    assert run.budget is None and not (house.folder / FILE_NAME).exists()
    assert run.most_tokens(96) == 96
    check(run, force=True)
    elicit(run)
    calibrate(run)
    prefer(run)
    rows = run.read("prefer", "scores.jsonl")
    assert "student_tokens" not in rows[0]
    manifest = json.loads((house.folder / "prefer" / "manifest.json").read_text())
    # The inputs of a run from before there was a [deploy]: what was paid for is kept.
    older = {
        "stage": "prefer",
        "seed": 0,
        "prefer": {"score": "likelihood", "bias_free": True, "length_free": True, "answer_tokens": 96},
        "student": run.identity(run.config.student),
        "data": run.outputs("elicit", "calibrate"),
    }
    assert manifest["inputs"] == content_key(older)
    run.close()


@dataclass
class Wordy:
    """The scripted teacher of `conftest`, whose first technique takes 60 words and the others 6."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def complete(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
        done = self.inner.complete(requests, sampling)
        return [
            Completion("so it goes on " * 15 + c.text, c.finish, 9, 67)
            if "Look at the last digit" in r.prompt
            else c
            for r, c in zip(requests, done, strict=True)
        ]


def test_a_draft_that_is_too_long_pays_and_is_what_the_teacher_unlearns(house: Any) -> None:
    house.teacher = Wordy(house.teacher)
    run = start(house, **DEVICE)
    run.budget = Budget(20, 10, RATES)
    check(run, force=True)
    elicit(run)
    calibrate(run)
    summary = prefer(run)
    rows = run.read("prefer", "scores.jsonl")
    long = [row for row in rows if row["over_budget"]]
    short = [row for row in rows if not row["over_budget"]]
    assert {row["technique"] for row in long} == {0} and {row["technique"] for row in short} == {1, 2, 3}
    assert summary["over_budget"] == len(long) > 0
    assert all(row["score"] == row["bias_free"] for row in short)
    for row in long:
        assert row["score"] == pytest.approx(row["bias_free"] * 20 / row["student_tokens"], abs=1e-6)
    assert max(row["score"] for row in long) < min(row["score"] for row in short)
    run.close()


def test_a_student_that_writes_is_cut_off_at_the_budget(house: Any, monkeypatch: Patch) -> None:
    run = start(house, prefer={"score": "accuracy"}, **DEVICE)
    run.budget = Budget(11, 10, RATES)
    seen: list[int] = []
    complete = house.student.complete

    def watch(requests: list[Request], sampling: Sampling) -> list[Completion]:
        seen.append(sampling.max_tokens)
        return list(complete(requests, sampling))

    check(run, force=True)
    elicit(run)
    calibrate(run)
    monkeypatch.setattr(house.student, "complete", watch)
    prefer(run)
    assert set(seen) == {11}
    row = run.read("prefer", "scores.jsonl")[0]
    assert row["score"] == row["bias_free"]  # cut off, it does not pay a second time
    run.close()


def test_what_the_device_has_no_time_for_trains_nobody(house: Any) -> None:
    def train(budget: int) -> list[dict[str, Any]]:
        run = start(house, tailor={"questions": 8}, **DEVICE)
        run.budget = Budget(budget, 10, RATES)
        tailor(run, lambda: house.teacher, "")
        rows = run.read("tailor", "train.jsonl")
        run.close()
        return rows

    longest = max(house.student.count_tokens(row["rationale"]) for row in train(96))
    assert longest == 6
    assert len(train(6)) == 8
    with pytest.raises(StoppedEarly, match="over the latency budget"):
        train(5)


def test_a_student_file_is_made_once_and_kept(
    tmp_path: Path, model_cache: Path, make_gguf: Any, monkeypatch: Patch
) -> None:
    made: list[str] = []

    def quantize(source: Path, out: Path, kind: str) -> None:
        made.append(kind)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(source.read_bytes() + b"!")

    base = LocalModel("m", "ab" * 32, make_gguf(), None, "F16")
    monkeypatch.setattr("arte_edge.gguf.quantize.quantize", quantize)
    first = quantized_student(base, "Q4_K_M")
    assert quantized_student(base, "Q4_K_M") == first
    assert made == ["Q4_K_M"] and first.quantization == "Q4_K_M" and first.sha256 != base.sha256
    assert quantized_student(base, "F16") is base
    checkpoint = LocalModel("m", "ab" * 32, None, tmp_path, "BF16")
    with pytest.raises(InputError, match=r"prefer\.student_file = 'Q8_0': m is a checkpoint"):
        quantized_student(checkpoint, "Q8_0")


def test_the_number_of_draws_is_no_part_of_a_budget_that_was_decided(house: Any) -> None:
    run = house.run(**DEVICE)
    first = settle(run)
    run.close()
    more = house.run(deploy={**DEVICE["deploy"], "draws": 3})
    assert settle(more, Rates(90.0, 900.0, "measured", "")) == first
    more.close()


def test_a_deploy_table_without_a_device_is_inert() -> None:
    assert Deploy().device == ""


PI = "raspberry-pi-5"


@pytest.fixture
def student(make_gguf: Any) -> LocalModel:
    return LocalModel("m", "ab" * 32, make_gguf(), None, "F16")


def row(rate: float, n_gen: int, **more: Any) -> SpeedRow:
    known = {"quantization": "Q4_K_M", "profile": PI, **more}
    device = DeviceFacts(
        profile=known.pop("profile"), fingerprint="0" * 16, cpu="c", arch="aarch64", cores=4, memory_bytes=1
    )
    return SpeedRow(
        test="t", model_filename="m-Q4_K_M.gguf", model_size=1, format="gguf", n_threads=4, runtime="llama_cpp 1",
        n_prompt=0 if n_gen else 512, n_gen=n_gen, median_ts=rate, device=device, **known,
    )  # fmt: skip


def bench(folder: Path, *rows: SpeedRow) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "bench.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in rows))
    return str(folder)


def test_measured_rows_of_the_file_on_the_device_count(tmp_path: Path, student: LocalModel) -> None:
    rows = [row(200, 0), row(40, 128), row(90, 128, quantization="Q8_0"), row(95, 128, profile="orange-pi-5")]
    folder = bench(tmp_path / "b", *rows, row(99, 128, throttled=True))
    for rates in (folder, f"{folder}/bench.jsonl"):
        found = device_rates(Deploy(device=PI, rates=rates), student)
        assert (found.decode_tokens_per_s, found.prefill_tokens_per_s, found.evidence) == (
            40,
            200,
            "measured",
        )
        assert found.source == "llama_cpp 1, 4 threads"
    by_print = device_rates(Deploy(device="0" * 16, rates=folder), student)
    assert by_print.evidence == "measured"


def test_merged_speeds_of_an_earlier_round_count(tmp_path: Path, student: LocalModel) -> None:
    speed = Speed(device=PI, runtime="r", threads=2, decode_tokens_per_s=33, prefill_tokens_per_s=150)
    artifact = Artifact(
        file="m-Q4_K_M.gguf", format="gguf", quantization="Q4_K_M", status="ok", size_bytes=1, sha256="a" * 64,
        tensor_sha256="a" * 64, bits_per_weight=5, fidelity=Fidelity(passed=True), speeds=(speed,),
    )  # fmt: skip
    document = StudentFile(
        arte_edge_version="0",
        student=Student(name="m", sha256="c" * 64, architecture="llama", dtype="F16", parameter_count=9),
        lineage=Lineage(source="run"),
        artifacts=(artifact,),
    )
    write_student(tmp_path / "round1" / "export", document)
    found = device_rates(Deploy(device=PI, rates=str(tmp_path / "round1")), student)
    assert (found.decode_tokens_per_s, found.evidence) == (33, "measured")
    named = device_rates(Deploy(device=PI, file="m-Q4_K_M.gguf", rates=str(tmp_path / "round1")), student)
    assert named == found


def test_writing_without_reading_is_no_measurement_of_an_answer(tmp_path: Path, student: LocalModel) -> None:
    found = device_rates(Deploy(device=PI, rates=bench(tmp_path / "b", row(40, 128))), student)
    assert found.evidence == "predicted" and found.prefill_tokens_per_s == pytest.approx(76)
    assert "assumed" in found.source


def test_a_device_that_nobody_knows_and_nobody_measured_is_refused(
    tmp_path: Path, student: LocalModel
) -> None:
    with pytest.raises(InputError, match="toaster"):
        device_rates(Deploy(device="toaster"), student)
    with pytest.raises(InputError, match=r"deploy\.device = 'toaster': no such profile, and not measured"):
        device_rates(Deploy(device="toaster", rates=bench(tmp_path / "b", row(40, 128))), student)


@pytest.mark.model
def test_a_file_that_nobody_made_yet_is_predicted_from_its_size(smollm2: LocalModel) -> None:
    def rate(file: str) -> float:
        found = device_rates(Deploy(device=PI, file=file), smollm2)
        assert found.evidence == "predicted" and "GB/s" in found.source
        return found.decode_tokens_per_s

    assert rate("F16") < rate("Q8_0") < rate("Q4_K_M")
    with pytest.raises(InputError, match="Q4_K_X"):
        rate("Q4_K_X")
