"""The rates behind [deploy]: measured on the device if anybody did, else predicted and marked so."""

from pathlib import Path
from typing import Any

import pytest

from arte_edge.distill.config import Deploy
from arte_edge.distill.latency import device_rates
from arte_edge.errors import InputError
from arte_edge.models.local import LocalModel
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
