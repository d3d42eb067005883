from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arte_edge.errors import InputError
from arte_edge.results.student_json import (
    FILE_NAME,
    Artifact,
    Fidelity,
    Lineage,
    Speed,
    Student,
    StudentFile,
    read_student,
    write_student,
)

SUM = "ab" * 32


def student_file(**changes: Any) -> StudentFile:
    artifact = Artifact(
        file="m-Q8_0.gguf",
        format="gguf",
        quantization="Q8_0",
        status="ok",
        size_bytes=10,
        sha256=SUM,
        tensor_sha256=SUM,
        bits_per_weight=8.5,
        fidelity=Fidelity(passed=True),
        speeds=(Speed(device="pi5", runtime="llama.cpp", threads=4, decode_tokens_per_s=20.5),),
    )
    return StudentFile(
        arte_edge_version="0",
        student=Student(name="m", sha256=SUM, architecture="llama", dtype="F16", parameter_count=9),
        lineage=Lineage(source="run"),
        artifacts=(artifact,),
    ).model_copy(update=changes)


def test_what_is_written_is_read_back_to_the_byte(tmp_path: Path) -> None:
    path = write_student(tmp_path, student_file())
    first = path.read_bytes()
    found = read_student(tmp_path)
    assert found == student_file()
    assert found is not None
    assert write_student(tmp_path, found).read_bytes() == first


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert read_student(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not readable as JSON"),
        ('{"schema_version": 99}', "schema_version is 99"),
        ("[]", "schema_version is None"),
        ('{"schema_version": 1, "student": {}}', r"student\.json: "),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(InputError, match=said):
        read_student(tmp_path)


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    write_student(tmp_path, student_file())
    document = json.loads((tmp_path / FILE_NAME).read_text())
    document["artifacts"][0]["speed"] = 1
    (tmp_path / FILE_NAME).write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"artifacts\.0\.speed"):
        read_student(tmp_path)


def test_every_number_with_a_unit_says_it_in_its_name() -> None:
    unitless = {"top1", "accuracy", "low", "high", "difference", "difference_low", "difference_high"}
    units = ("_ms", "_per_s", "_bytes", "_c_max", "_j", "_ratio", "_ratio_error", "_mean", "_p99", "_max")
    schema = StudentFile.model_json_schema()["$defs"]
    for table in ("Speed", "SpeedTest", "FidelityMetrics", "Artifact"):
        for name, field in schema[table]["properties"].items():
            kinds = {field.get("type"), *(option.get("type") for option in field.get("anyOf", ()))}
            if "number" in kinds and name not in unitless | {"bits_per_weight", "perplexity_reference"}:
                assert name.endswith(units), f"{table}.{name}"
