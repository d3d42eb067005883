"""A run folder belongs to one run: another one is refused by name, unless it is an update."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import Capture, Patch

import arte_edge.distill.run_context as run_module
from arte_edge.console import Reporter
from arte_edge.distill.config import build, load_toml
from arte_edge.distill.run_context import RunContext, open_folder
from arte_edge.errors import InputError
from arte_edge.models.resolve import LocalModel
from arte_edge.runtimes.completion import Completion, EngineIdentity, Request, Sampling
from arte_edge.runtimes.prompt_render import CHAT_JSON_NEW_TURN


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


@pytest.mark.parametrize("machine", [{"cluster": {"address": "head:6379", "workers": 8}}, {"train": {"processes": 4}}])
def test_a_run_goes_on_elsewhere_and_is_still_that_run(house: Any, machine: dict[str, Any]) -> None:
    here = opened(house)
    assert opened(house, **machine) != here, "resumed by its folder it goes on there"
    assert opened(house) == here
    with pytest.raises(InputError, match="holds another run: seed differs"):
        opened(house, seed=7, **machine)


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


REF = "openai:m@http://one:8000/v1"


def test_how_a_server_takes_prompts_is_found_out_once_in_a_run(house: Any, monkeypatch: Patch) -> None:
    asked = []
    identity = EngineIdentity("openai", "m", address="http://one:8000/v1")
    remote = SimpleNamespace(chat_template=CHAT_JSON_NEW_TURN, identity=identity, close=lambda: None)

    def open_remote(ref: str, *, limits: Any, **_: Any) -> Any:
        asked.append(limits.continues)
        return remote

    monkeypatch.setattr(run_module, "open_engine", open_remote)
    for _ in range(2):
        run = house.run(teacher={"model": REF}, data="original-teacher")
        teacher = run.config.teacher
        turn: list[Any] = [{"role": "user", "content": "Q"}]
        prompt = run.render(run.engine(teacher), turn, "<q>", teacher)
        run.close()
    assert asked == [None, False] and json.loads(prompt)["prefill"] == "<q>"
    assert not (house.folder / "events.jsonl").exists(), "no call came before, so there is no warning"
    # Only a teacher is kept from reasoning.
    remote.chat_template, remote.special_tokens = "{% if enable_thinking is false %}off{% endif %}", {}
    models = (teacher, run.config.student)
    assert [run.render(remote, turn, "", model) for model in models] == ["off", ""]


def test_a_stages_line_says_which_calls_failed_and_what_reasoning_cost(house: Any, capsys: Capture) -> None:
    done = [Completion("<think>x</think>a", "stop", 1, 50), Completion("", "error", error="too long")]
    house.teacher.complete = lambda requests, _: done
    run = house.run()
    run.reporter = Reporter()
    for _ in range(2):  # the second time from the manifest
        with run.stage("check", {}, lambda _: "done") as stage:
            if stage.todo:
                asked = [Request("0"), Request("1")]
                run.calls.complete(house.teacher, asked, Sampling(), "x", budget="a key")
                stage.finish({"labels": {"outside_options": 3}})
        line = " ".join(capsys.readouterr().err.split())
        assert "1 answers held reasoning" in line and "1 calls failed: too long" in line and "3 answers out" in line


def test_the_engine_that_a_run_began_with_stays_whatever_the_next_machine_would_choose(
    house: Any, monkeypatch: Patch
) -> None:
    choice = ["llamacpp"]
    monkeypatch.setattr(run_module, "teacher_kind", lambda model, kind: choice[0])

    def kind() -> str:
        run = house.run()
        found = run.kind(run.config.teacher)
        run.close()
        return str(found)

    assert kind() == "llamacpp"
    choice[0] = "int8"
    assert kind() == "llamacpp"


def test_a_run_from_before_engines_were_stored_keeps_the_usual_one(house: Any, monkeypatch: Patch) -> None:
    monkeypatch.setattr(run_module, "teacher_kind", lambda model, kind: "int8")
    (house.folder / "check").mkdir(parents=True)
    (house.folder / "check" / "manifest.json").write_text("{}", encoding="utf-8")
    run = house.run()
    assert run.kind(run.config.teacher) == "auto"
    run.close()


def test_a_damaged_check_is_made_again_and_a_sibling_with_one_lends_nothing(house: Any) -> None:
    sibling = house.folder.with_name("sibling")
    for folder in (house.folder, sibling):
        (folder / "check").mkdir(parents=True)
        (folder / "check" / "manifest.json").write_text("{")
    run = house.run()
    run.siblings = (sibling,)
    for name in ("elicit", "check"):
        with run.stage(name, {}, lambda _: "done") as stage:
            assert stage.todo
            stage.finish({})
    run.close()
