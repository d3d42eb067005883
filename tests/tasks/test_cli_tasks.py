"""``arte-edge tasks`` as a person and a script use it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import Capture, Patch, cli_json

from arte_edge import catalog
from arte_edge.cli.main import main
from arte_edge.tasks.folder import load_folder
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Example

Write = Callable[[Path, list[dict[str, Any]]], Path]
ROWS = [{"q": f"Is {n} [even]?", "a": "no" if n % 2 else "yes"} for n in range(80)]


def test_ls_fits_80_columns_and_names_every_task(capsys: Capture) -> None:
    assert main(["tasks", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:]] == catalog.names("tasks")
    assert lines[1].split()[1:3] == ["boolean", "40/100/200"]


def test_ls_as_json_gives_counts_and_identity(capsys: Capture) -> None:
    tasks = {task["name"]: task for task in cli_json(capsys, "tasks", "ls")}
    assert tasks["object_counting"]["n_rows"] == {"seed": 40, "validation": 100, "test": 200}
    assert tasks["object_counting"]["sha256"] == load_task("object_counting").sha256


def test_ls_reads_a_folder_of_bigbench_hard(tmp_path: Path, capsys: Capture) -> None:
    rows = [{"input": row["q"], "target": row["a"]} for row in ROWS]
    (tmp_path / "even.json").write_text(json.dumps({"examples": rows}), encoding="utf-8")
    [task] = cli_json(capsys, "tasks", "ls", "--bbh", str(tmp_path))
    assert (task["name"], task["split_seed"], task["answer"]["choices"]) == ("even", 0, ["no", "yes"])
    assert main(["tasks", "ls", "--bbh", str(tmp_path / "none")]) == 2


def test_show_prints_description_techniques_and_seed_examples_only(capsys: Capture) -> None:
    task = load_task("home_intents")
    shown = cli_json(capsys, "tasks", "show", "home_intents", "-n", "40")
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
    lines = capsys.readouterr().out.splitlines()  # no warnings between them
    assert lines == [f"{name}: ok, 40/100/200 rows" for name in catalog.names("tasks")]


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
    for taken in (tmp_path / "My task", tmp_path / "My task" / "task.toml"):
        assert main(["tasks", "new", str(taken)]) == 2
    assert "Say it." in (tmp_path / "My task" / "task.toml").read_text(encoding="utf-8")
    assert "exists already" in capsys.readouterr().err


def test_new_splits_a_table_and_says_what_it_did(tmp_path: Path, capsys: Capture) -> None:
    path, folder = tmp_path / "even.csv", str(tmp_path / "even")
    lines = [f"{row['q']};{row['a']}" for row in [*ROWS, ROWS[0]]]
    path.write_text("\n".join(["q;a", *lines, "x;", "y;rare"]), encoding="utf-8-sig")
    argv = ["tasks", "new", folder, "--table", str(path)]
    assert main(argv) == 2  # no usual column names
    assert "Its columns: q, a" in capsys.readouterr().err
    assert not Path(folder).exists()
    assert main([*argv, "--input", "q", "--target", "a", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    words = " ".join(printed.split())
    for part in (
        "even.csv: 83 rows separated by semicolons (guessed); input 'q', answer 'a'",
        "dropped 1 row without an answer (line 83)",
        "dropped 1 row already seen (line 82)",
        "rare 0 1 0",
        "(all) 22 34 25",
        "read task.toml",
    ):
        assert part in words
    assert "fill in" not in words
    assert main(["tasks", "check", folder]) == 0
    task = load_folder(Path(folder))
    assert (task.answer.choices, len(task.validation)) == (("no", "rare", "yes"), 34)
    capsys.readouterr()
    written = cli_json(capsys, "tasks", "new", folder + "2", "--jsonl", f"{path}?input=q&target=a")
    assert written["labels"]["rare"] == {"seed": 0, "validation": 1, "test": 0}


def test_new_says_which_labels_have_no_validation_row(tmp_path: Path, capsys: Capture) -> None:
    rows = [f"text {n},label {n % 120}" for n in range(720)]  # for 100 rows in validation
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    assert main(["tasks", "new", str(tmp_path / "t"), "--table", str(tmp_path / "t.csv")]) == 0
    printed = capsys.readouterr().out
    assert "No validation row for" in printed and "and 100 more" in printed
    argv = ["tasks", "new", str(tmp_path / "u"), "--table", str(tmp_path / "t.csv"), "--rows", "600"]
    written = cli_json(capsys, *argv)
    assert sum(written["n_rows"].values()) == 600
    assert sum(not n["validation"] for n in written["labels"].values()) >= 20


def test_new_splits_a_dataset(tmp_path: Path, capsys: Capture) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    datasets.DatasetDict({"all": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    argv = ["tasks", "new", str(tmp_path / "even"), "--hub", f"{tmp_path / 'saved'}?split=all&input=q&target=a"]
    written = cli_json(capsys, *argv)
    assert (written["folder"], written["name"], written["techniques"]) == (str(tmp_path / "even"), "even", [])
    assert load_folder(tmp_path / "even").answer.choices == ("no", "yes")
    assert main([*argv, "--table", "x.jsonl"]) == 2


def test_a_teacher_replaces_the_techniques_of_an_existing_task(
    parity: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    opened: list[str] = []
    closed: list[bool] = []
    teacher = SimpleNamespace(close=lambda: closed.append(True))

    def propose(_engine: object, description: str, seeds: tuple[Example, ...]) -> tuple[str, ...]:
        return (description, *(seed.input for seed in seeds[:3]))

    module = SimpleNamespace(open_engine=lambda ref: opened.append(ref) or teacher)
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
