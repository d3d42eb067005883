"""A run folder belongs to one run: another one is refused by name, unless it is an update."""

from dataclasses import replace
from typing import Any

import pytest
from tiny import Patch

import arte_edge.distill.run_context as run_module
from arte_edge.console import Reporter
from arte_edge.distill.config import build, load_toml
from arte_edge.distill.run_context import RunContext, open_folder
from arte_edge.errors import InputError
from arte_edge.models.resolve import LocalModel


def test_the_resolved_run_is_written_once_and_opens_again(house: Any) -> None:
    config = house.config()
    open_folder(config, house.folder, house.task, update=False)
    written = (house.folder / "run.toml").read_bytes()
    open_folder(config, house.folder, house.task, update=False)
    assert (house.folder / "run.toml").read_bytes() == written
    assert build("run.toml", load_toml(house.folder / "run.toml")) == config


def test_the_folder_of_another_run_is_refused_naming_the_keys(house: Any) -> None:
    open_folder(house.config(), house.folder, house.task, update=False)
    other = house.config(seed=7, align={"learning_rate": 1e-3})
    with pytest.raises(InputError, match=r"holds another run: align\.learning_rate, seed differ") as caught:
        open_folder(other, house.folder, house.task, update=False)
    assert "--name" in caught.value.hint and "--update" in caught.value.hint
    assert caught.value.exit_code == 2


def test_the_folder_of_a_task_with_other_examples_is_refused(house: Any) -> None:
    open_folder(house.config(), house.folder, house.task, update=False)
    other = replace(house.task, validation=house.task.validation[1:])
    with pytest.raises(InputError, match=r"the task's examples differ\n"):
        open_folder(house.config(), house.folder, other, update=False)


def test_an_update_goes_on_and_is_the_run_from_then_on(house: Any) -> None:
    open_folder(house.config(), house.folder, house.task, update=False)
    other = house.config(seed=7)
    open_folder(other, house.folder, house.task, update=True)
    open_folder(other, house.folder, house.task, update=False)
    with pytest.raises(InputError, match="seed differs"):
        open_folder(house.config(), house.folder, house.task, update=False)


@pytest.mark.parametrize("first", ["teacher", "student"])
def test_a_model_that_teaches_itself_is_decoded_as_each_whoever_comes_first(
    smollm2: LocalModel, house: Any, monkeypatch: Patch, first: str
) -> None:
    monkeypatch.setattr(run_module, "open_local", lambda model, **_: model.quantization)
    config = house.config(teacher={"model": smollm2.name}, student={"model": smollm2.name})
    monkeypatch.setattr(run_module, "resolve", lambda ref, **_: smollm2)
    run = RunContext(config, house.task, house.folder, Reporter(quiet=True))
    order = [config.teacher, config.student] if first == "teacher" else [config.student, config.teacher]
    opened = {type(model).__name__: run.engine(model) for model in order}
    assert opened == {"TeacherConfig": "Q4_1", "ModelConfig": "F16"}


def test_a_folder_from_before_a_key_existed_goes_on(house: Any) -> None:
    open_folder(house.config(), house.folder, house.task, update=False)
    file = house.folder / "run.toml"
    younger = "timeout_s = 120.0\n"
    assert younger in file.read_text()
    file.write_text(file.read_text().replace(younger, ""))
    open_folder(house.config(), house.folder, house.task, update=False)
    file.write_text(file.read_text() + "\n[gone]\nkey = 1\n")
    with pytest.raises(InputError, match="another run: gone"):
        open_folder(house.config(), house.folder, house.task, update=False)


def test_a_run_file_that_is_no_toml_is_refused_with_its_line(house: Any) -> None:
    house.folder.mkdir()
    (house.folder / "run.toml").write_text("seed = = 1\n")
    with pytest.raises(InputError, match=r"run\.toml: not TOML: .*line 1"):
        open_folder(house.config(), house.folder, house.task, update=False)
