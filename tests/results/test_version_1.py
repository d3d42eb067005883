"""What the version before wrote is still read: student.json, bench.jsonl, an export folder."""

import json
import shutil
from pathlib import Path

import pytest

from arte_edge.publish.card.card import card
from arte_edge.publish.recommend.pick import recommend
from arte_edge.results.merge import merge_into
from arte_edge.results.rows import QualityRow, SpeedRow, read_rows
from arte_edge.results.student_json import read_student, write_student

OLD = Path(__file__).resolve().parents[1] / "data" / "version_1"


@pytest.fixture
def export_1(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD / "export", tmp_path / "old" / "export"))


def test_a_student_json_is_read_and_written_as_the_current_version(export_1: Path) -> None:
    assert json.loads((export_1 / "student.json").read_bytes())["schema_version"] == 1
    student = read_student(export_1)
    assert [one.quantization for one in student.artifacts] == ["F16", "Q8_0", "Q4_K_M"]
    for artifact in student.artifacts:
        assert artifact.fidelity.metrics is not None and artifact.fidelity.metrics.n_prompts == 24
        assert artifact.accuracy is not None and artifact.accuracy.n == 40
        assert artifact.accuracy.difference is not None and artifact.accuracy.lost is None
    speed = student.artifacts[1].speeds[0]
    assert [test.test for test in speed.tests] == ["pp16", "tg8"] and speed.decode_tokens_per_s
    evaluation = student.artifacts[1].evaluations[0]
    assert (evaluation.n, evaluation.right, evaluation.partial) == (4, 0, True)
    write_student(export_1, student)
    assert json.loads((export_1 / "student.json").read_bytes())["schema_version"] == 2
    assert read_student(export_1) == student


def test_rows_are_read_and_are_those_already_merged(export_1: Path) -> None:
    rows = read_rows(export_1 / "bench.jsonl")
    assert [row.test for row in rows if isinstance(row, SpeedRow)] == ["pp16", "tg8"] * 2
    assert [(row.right, row.n, row.accuracy) for row in rows if isinstance(row, QualityRow)] == [(0, 4, 0.0)] * 2
    student = read_student(export_1)
    merged = merge_into(student, rows)
    assert merged.student == student and merged.notes == ()


def test_an_export_folder_keeps_its_card_and_can_be_asked(export_1: Path) -> None:
    before = (export_1 / "README.md").read_text()
    done = card(export_1, gguf_keys=False)
    assert set(done.changed) <= {"README.md", "student.json"}
    assert done.text.count("arte-edge:files:start") == before.count("arte-edge:files:start") == 1
    assert card(export_1, gguf_keys=False).changed == ()
    found = recommend(export_1, device="generic-x86")
    assert found.pick is not None and len(found.candidates) == 3
