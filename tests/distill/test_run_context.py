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


def opened(house: Any, update: bool = False, **tables: Any) -> bytes:
    open_folder(house.config(**tables), house.folder, house.task, update=update)
    return (house.folder / "run.toml").read_bytes()


def test_the_resolved_run_is_written_once_and_opens_again(house: Any) -> None:
    assert opened(house) == opened(house)
    assert build("run.toml", load_toml(house.folder / "run.toml")) == house.config()


def test_the_folder_of_another_run_is_refused_naming_the_keys(house: Any) -> None:
    opened(house)
    with pytest.raises(InputError, match=r"holds another run: align\.learning_rate, seed differ") as caught:
        opened(house, seed=7, align={"learning_rate": 1e-3})
    assert "--name" in caught.value.hint and "--update" in caught.value.hint
    assert caught.value.exit_code == 2
    house.task = replace(house.task, validation=house.task.validation[1:])
    with pytest.raises(InputError, match=r"the task's examples differ\n"):
        opened(house)


def test_an_update_goes_on_and_is_the_run_from_then_on(house: Any) -> None:
    opened(house)
    assert opened(house, update=True, seed=7) == opened(house, seed=7)
    with pytest.raises(InputError, match="seed differs"):
        opened(house)


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
    file, younger = house.folder / "run.toml", b"timeout_s = 120.0\n"
    written = opened(house)
    assert younger in written
    file.write_bytes(written.replace(younger, b""))
    opened(house)
    file.write_bytes(written + b"\n[gone]\nkey = 1\n")
    with pytest.raises(InputError, match="another run: gone"):
        opened(house)
    file.write_text("seed = = 1\n")
    with pytest.raises(InputError, match=r"run\.toml: .*TOML: .*line 1"):
        opened(house)
