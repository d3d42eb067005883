from pathlib import Path

import pytest
from tiny import Patch, artifact, change_json, student_file

from arte_edge.errors import InputError
from arte_edge.results.student_json import (
    FILE_NAME,
    Speed,
    StudentFile,
    find_export,
    find_run,
    read_student,
    write_student,
)

SPEED = Speed(device="pi5", runtime="llama.cpp", threads=4, decode_tokens_per_s=20.5)
STUDENT = student_file(artifact(speeds=(SPEED,)))


def test_what_is_written_is_read_back_to_the_byte(tmp_path: Path) -> None:
    assert read_student(tmp_path) is None
    path = write_student(tmp_path, STUDENT)
    first = path.read_bytes()
    found = read_student(tmp_path)
    assert found == STUDENT
    assert write_student(tmp_path, found).read_bytes() == first


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "damaged"),
        ('{"schema_version": 99}', "schema_version is 99"),
        ("[]", "schema_version is None"),
        ('{"schema_version": 1, "student": {}}', r"student\.json: "),
    ],
)
def test_another_file_is_rejected(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(InputError, match=said):
        read_student(tmp_path)


def test_an_unknown_key_is_rejected(tmp_path: Path) -> None:
    write_student(tmp_path, STUDENT)
    change_json(tmp_path / FILE_NAME, lambda document: document["artifacts"][0].update(speed=1))
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


def test_a_run_is_found_by_its_name_beside_a_folder_of_that_name(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/tickets")
    write_student(run / "export", STUDENT)
    (run / "run.toml").touch()
    assert (find_run("tickets"), find_export("tickets")) == (run, run / "export")
    Path("tickets").mkdir()
    Path("tickets/task.toml").touch()
    assert (find_run("tickets"), find_export("tickets")) == (run, run / "export")
    with pytest.raises(InputError, match="not a run but a task"):
        find_run("./tickets")
    write_student(Path("tickets/pi"), STUDENT)
    assert find_export("tickets") == Path("tickets/pi")
    Path("tickets/run.toml").touch()
    assert find_run("tickets") == Path("tickets")
