"""``arte-edge ls | show | copy | check``: what ships, and what is wrong with a run file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import Capture, Patch, cli_json

from arte_edge import api, catalog
from arte_edge.catalog import describe
from arte_edge.cli.main import main


def problems(capsys: Capture, path: Path, text: str) -> list[str]:
    path.write_text(text, encoding="utf-8")
    code = main(["check", str(path), "--json"])
    found = json.loads(capsys.readouterr().out)["problems"]
    assert code == (2 if found else 0)
    return [f"{problem['what']} {problem['hint']}".strip() for problem in found]


def test_ls_names_every_preset_with_a_sentence_task_and_models(capsys: Capture) -> None:
    presets = {row["name"]: row for row in cli_json(capsys, "ls")}
    assert sorted(presets) == catalog.names("presets")
    assert all(row["description"].endswith(".") for row in presets.values())
    assert presets["quickstart"]["task"] == "home_intents"
    assert presets["quickstart"]["student"] == "smollm2-135m-instruct"
    assert main(["ls"]) == 0
    printed = capsys.readouterr().out
    assert presets["quickstart"]["description"] in printed
    assert presets["paper"]["teacher"] in printed


def test_a_description_is_the_first_sentence_of_the_first_paragraph() -> None:
    header = "# arte-edge distill x\n#\n# One thing\n# and another. A second.\n#\n# More.\n[a]\n# no\n"
    assert describe(header) == "One thing and another."
    assert describe("[a]\n# A table's comment.\n") == ""


def test_show_keeps_the_comments_and_json_resolves_every_key(capsys: Capture) -> None:
    assert main(["show", "quickstart"]) == 0
    text = catalog.find("presets", "quickstart").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == text.strip()
    config = cli_json(capsys, "show", "quickstart")
    assert f"questions = {config['tailor']['questions']}\n" in text
    assert config["tailor"]["label"] == "vote"  # a default that the file does not set


def test_copy_writes_the_same_text_and_never_overwrites(tmp_path: Path, capsys: Capture) -> None:
    dest = tmp_path / "mine.toml"
    assert cli_json(capsys, "copy", "quickstart", str(dest)) == {"preset": "quickstart", "file": str(dest)}
    assert dest.read_bytes() == catalog.find("presets", "quickstart").read_bytes()
    dest.write_text("mine", encoding="utf-8")
    assert main(["copy", "paper", str(dest)]) == 2
    assert dest.read_text(encoding="utf-8") == "mine"
    assert main(["copy", "paper", str(tmp_path / "mine.tml")]) == 2
    assert main(["copy", "paper", str(tmp_path / "none" / "mine.toml")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


@pytest.mark.parametrize("name", catalog.names("presets"))
def test_every_shipped_preset_passes_its_check(name: str, capsys: Capture) -> None:
    assert cli_json(capsys, "check", name)["problems"] == []


def test_check_lists_all_problems_at_once(tmp_path: Path, capsys: Capture) -> None:
    text = """
    [task]
    ref = "home_intent"
    [teacher]
    model = "qwen2.5-coder-0.5b-instrct"
    [student]
    model = "./nowhere.gguf"
    [align]
    learning_rat = 1e-6
    beta = -1
    """
    found = problems(capsys, tmp_path / "run.toml", text)
    assert len(found) == 5
    joined = "\n".join(found)
    assert "unknown key 'align.learning_rat' Did you mean 'learning_rate'?" in joined
    assert "align.beta" in joined
    assert "Did you mean 'home_intents'?" in joined
    assert "Did you mean 'qwen2.5-coder-0.5b-instruct'?" in joined
    assert "student.model: ./nowhere.gguf: no such file" in joined
    assert main(["check", str(tmp_path / "run.toml")]) == 2
    assert "5 problems" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[teacher]\nmodel = "openai:m@http://127.0.0.1:1/v1"', "alignment needs the teacher's weights"),
        ('[student]\nmodel = "openai:m@http://127.0.0.1:1/v1"', "the student is trained locally"),
        ('data = "original-teacher"\n[teacher]\nmodel = "openai:m"', "names no server"),
        ("[evaluate]\nshots = []", "evaluate.shots: "),
        ('[calibrate]\nmodels = ["smollm"]', "calibrate.models: No model is named 'smollm'"),
        ("[teacher]\nshots = 2", "teacher.model: Field required"),
        ("task = 3", "task: Input should be"),
    ],
)
def test_check_finds_what_would_stop_the_run(text: str, why: str, tmp_path: Path, capsys: Capture) -> None:
    found = problems(capsys, tmp_path / "run.toml", text)
    assert [why in problem for problem in found] == [True], found


def test_check_takes_a_hub_id_and_an_existing_gguf(tmp_path: Path, capsys: Capture, make_gguf: Any) -> None:
    text = f'[teacher]\nmodel = "org/name:Q4_K_M"\n[student]\nmodel = "{make_gguf()}"'
    assert problems(capsys, tmp_path / "run.toml", text) == []
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"nothing")
    found = problems(capsys, tmp_path / "run.toml", f'[student]\nmodel = "{damaged}"')
    assert len(found) == 1
    assert "damaged.gguf" in found[0]


def test_a_run_s_folder_resumes_that_run(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text("seed = 3\ncluster.address = 'auto'\n")
    for ref in (str(folder), f"{folder}/"):
        config, found = api.plan_run(ref, set=["tune.epochs=2"])
        assert (config.seed, config.tune.epochs, found) == (3, 2, folder)
    monkeypatch.chdir(tmp_path / "runs")
    assert api.plan_run("mine")[1] == Path("mine")
    where = {ray: api.plan_run("mine", ray=ray)[0].cluster.address for ray in (None, "", "local")}
    assert where == {None: "auto", "": "", "local": "local"}
    assert cli_json(capsys, "show", str(folder))["seed"] == 3
    assert main(["distill", str(folder), "--name", "other"]) == 2
