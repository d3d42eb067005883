"""Writing task folders: what is written loads, and nothing that is there is overwritten."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from arte_edge.errors import InputError
from arte_edge.tasks.folder import load_folder, read_folder
from arte_edge.tasks.table import Record, task_from_table
from arte_edge.tasks.write import set_techniques, write_skeleton, write_task

RECORDS = [Record(f"t:{n}", f"Is {n} “even”?\n", "no" if n % 2 else "yes") for n in range(80)]


def test_a_skeleton_is_toml_and_its_check_says_what_to_fill_in(tmp_path: Path) -> None:
    write_skeleton(tmp_path / "mine", "mine")
    task, problems = read_folder(tmp_path / "mine")
    assert task is None
    assert [problem.where for problem in problems] == [
        *("task.toml: description", "task.toml: techniques"),
        *("seed.jsonl", "validation.jsonl", "test.jsonl"),
    ]


def test_a_table_written_as_a_folder_is_the_same_task(tmp_path: Path) -> None:
    table = task_from_table("even", RECORDS, description='Is it "even"? Say \\ yes or no.')
    write_task(tmp_path / "even", table)
    folder = load_folder(tmp_path / "even")
    assert folder.sha256 == table.sha256
    assert (folder.answer, folder.techniques) == (table.answer, table.techniques)


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    for target in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError, match="exists already"):
            write_skeleton(target, "x")
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_new_techniques_leave_the_rest_of_the_file_alone(parity: Path) -> None:
    path = parity / "task.toml"
    path.write_text("# mine\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    before = tomllib.loads(path.read_text(encoding="utf-8"))
    set_techniques(parity, ['Say "why".', "Halve it."])
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# mine\n")
    assert tomllib.loads(text) == before | {"techniques": ['Say "why".', "Halve it."]}
