"""``arte-edge tasks`` as a person and a script use it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny import Capture, Patch

from arte_edge import catalog
from arte_edge.cli.main import main
from arte_edge.tasks.folder import load_folder
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Example

Write = Callable[[Path, list[dict[str, Any]]], Path]
ROWS = [{"q": f"Is {n} [even]?", "a": "no" if n % 2 else "yes"} for n in range(80)]


def run_json(capsys: Capture, *argv: str) -> Any:
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_ls_fits_80_columns_and_names_every_task(capsys: Capture) -> None:
    assert main(["tasks", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:]] == catalog.names("tasks")
    assert lines[1].split()[1:3] == ["boolean", "40/100/200"]


def test_ls_as_json_gives_counts_and_identity(capsys: Capture) -> None:
    tasks = {task["name"]: task for task in run_json(capsys, "tasks", "ls")}
    assert tasks["object_counting"]["n_rows"] == {"seed": 40, "validation": 100, "test": 200}
    assert tasks["object_counting"]["sha256"] == load_task("object_counting").sha256


def test_ls_reads_a_folder_of_bigbench_hard(tmp_path: Path, capsys: Capture) -> None:
    rows = [{"input": row["q"], "target": row["a"]} for row in ROWS]
    (tmp_path / "even.json").write_text(json.dumps({"examples": rows}), encoding="utf-8")
    [task] = run_json(capsys, "tasks", "ls", "--bbh", str(tmp_path))
    assert (task["name"], task["split_seed"], task["answer"]["choices"]) == ("even", 0, ["no", "yes"])
    assert main(["tasks", "ls", "--bbh", str(tmp_path / "none")]) == 2


def test_show_prints_description_techniques_and_seed_examples_only(capsys: Capture) -> None:
    task = load_task("home_intents")
    shown = run_json(capsys, "tasks", "show", "home_intents", "-n", "40")
    assert shown["techniques"] == list(task.techniques)
    assert [Example(**row) for row in shown["examples"]] == list(task.seed)
    assert main(["tasks", "show", "home_intents", "-n", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert task.description in printed
    assert f"target {task.seed[0].target}" in printed
    assert task.seed[1].input not in printed


@pytest.mark.parametrize("verb", ["show", "check"])
def test_an_unknown_task_is_the_users_error_and_names_the_nearest(verb: str, capsys: Capture) -> None:
    assert main(["tasks", verb, "home_intent"]) == 2
    streams = capsys.readouterr()
    assert "Did you mean 'home_intents'?" in streams.out + streams.err


def test_the_shipped_tasks_pass_the_check(capsys: Capture) -> None:
    assert main(["tasks", "check"]) == 0
    assert capsys.readouterr().out.count(": ok, 40/100/200 rows") == len(catalog.names("tasks"))


def test_check_lists_every_problem_of_every_task(parity: Path, capsys: Capture) -> None:
    with (parity / "test.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"input": "Is 4 even or odd?", "target": "even"}\n{"input": "x", "target": "evn"}\n')
    assert main(["tasks", "check", str(parity), "home_intents", "--json"]) == 2
    broken, valid = json.loads(capsys.readouterr().out)
    assert [problem["where"] for problem in broken["problems"]] == ["test.jsonl:12", "test.jsonl:11"]
    assert valid["problems"] == []
    assert main(["tasks", "check", str(parity)]) == 2
    streams = capsys.readouterr()
    assert "test.jsonl:12: target 'evn' is not one of even, odd" in streams.out
    assert "Did you mean 'even'?" in streams.out
    assert "2 problems" in streams.err


def test_new_writes_a_skeleton_once(tmp_path: Path, capsys: Capture) -> None:
    assert main(["tasks", "new", str(tmp_path / "My task"), "--description", "Say it."]) == 0
    text = (tmp_path / "My task" / "task.toml").read_text(encoding="utf-8")
    assert 'name = "my_task"' in text
    assert "Say it." in text
    assert main(["tasks", "new", str(tmp_path / "My task")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_new_splits_a_labelled_file(tmp_path: Path, write_jsonl: Write, capsys: Capture) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, ROWS[0]])
    argv = ["tasks", "new", str(tmp_path / "even"), "--jsonl", str(path)]
    assert main(argv) == 2
    assert not (tmp_path / "even").exists()
    assert main([*argv, "--input", "q", "--target", "a", "--seed", "3"]) == 0
    assert "dropped 1 repeated rows" in capsys.readouterr().err
    assert main(["tasks", "check", str(tmp_path / "even")]) == 0
    assert len(load_folder(tmp_path / "even").validation) == 33


def test_new_splits_a_dataset(tmp_path: Path, capsys: Capture) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    argv = ["tasks", "new", str(tmp_path / "even"), "--hub", str(tmp_path / "saved")]
    argv += ["--input", "q", "--target", "a"]
    written = run_json(capsys, *argv)
    assert written == {"folder": str(tmp_path / "even"), "name": "even", "techniques": []}
    assert load_folder(tmp_path / "even").answer.choices == ("no", "yes")
    assert main([*argv, "--jsonl", "x.jsonl"]) == 2


def test_a_teacher_replaces_the_techniques_of_an_existing_task(
    parity: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    opened: list[str] = []
    closed: list[bool] = []

    class Teacher:
        def close(self) -> None:
            closed.append(True)

    def open_engine(ref: str) -> Teacher:
        opened.append(ref)
        return Teacher()

    def propose(_engine: Teacher, description: str, seeds: tuple[Example, ...]) -> tuple[str, ...]:
        return (description, *(seed.input for seed in seeds[:3]))

    module = ModuleType("arte_edge.runtimes.loader")
    module.open_engine = open_engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "arte_edge.runtimes.loader", module)
    monkeypatch.setattr("arte_edge.tasks.scaffold.propose_techniques", propose)
    before = load_folder(parity)
    assert main(["tasks", "new", str(parity), "--teacher", "big-model"]) == 0
    after = load_folder(parity)
    assert after.techniques == (before.description, *(seed.input for seed in before.seed[:3]))
    assert after.seed == before.seed
    assert after.sha256 != before.sha256
    assert (opened, closed) == (["big-model"], [True])
    assert "- Is 0 even or odd?" in capsys.readouterr().out
    # without a description and seeds there is nothing to propose from, and nothing is written
    assert main(["tasks", "new", str(tmp_path / "fresh"), "--teacher", "big-model"]) == 2
    assert not (tmp_path / "fresh").exists()
