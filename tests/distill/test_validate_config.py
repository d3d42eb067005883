"""What cannot run is refused before the first call: a split too small, a family or a layer that cannot be converted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import Capture, Make, write_safetensors

from arte_edge.distill.config import RunConfig
from arte_edge.distill.stages.calibrate import calibrate
from arte_edge.distill.stages.check import check
from arte_edge.distill.stages.elicit import elicit
from arte_edge.distill.stages.evaluate import evaluate
from arte_edge.distill.validate_config import fewer_shown, find_problems, refuse_models, refuse_run
from arte_edge.errors import InputError
from arte_edge.models.resolve import LocalModel
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Answer, FewShotExample

SIZES = {"llama__block_count": 1, "llama__attention__head_count": 1}


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(("split", "n"), [("validation", 3), ("validation", 0), ("seed", 0), ("test", 0)])
def test_a_split_that_is_too_small_is_refused(house: Any, split: str, n: int, dry: list[str], capsys: Capture) -> None:
    change = {"test_inputs": frozenset()} if split == "test" else {split: getattr(house.task, split)[:n]}
    house.task = replace(house.task, **change)
    assert house.distill(*dry) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{n} {split} examples are too few" in said and f"{split}.jsonl" in said
    assert house.calls == 0


def test_soft_labels_need_the_probabilities_of_a_closed_set(house: Any, capsys: Capture) -> None:
    soft = ["--set", "tune.soft_labels=0.5"]
    assert house.distill(*soft, "--set", "elicit.opinion_shots=0") == 2
    house.task = replace(house.task, answer=Answer(kind="text"))
    assert house.distill(*soft) == 2
    assert capsys.readouterr().err.count("tune.soft_labels: ") == 2 and house.calls == 0


def test_a_task_with_one_seed_runs_with_what_there_is_and_results_say_so(house: Any) -> None:
    house.task = replace(house.task, seed=house.task.seed[:1])
    run = house.run(evaluate={"shots": [0, 3]})
    run.engine_with = lambda *_, **__: house.student
    check(run, force=True)
    elicit(run)
    calibrate(run)
    tuned = LocalModel("tuned", "sha256 of tuned", Path("t.gguf"), None, "F16")
    rows = evaluate(run, tuned)["rows"]
    settings = [row["setting"] for row in rows]
    assert settings == ["as asked"] * 4 + ["1-shot"] * 2 + ["constrained"] * 2 + ["1-shot"]
    assert max(row["shots"] for row in run.read("calibrate", "matrix.jsonl")) == 1
    run.close()
    told = [sentence.split(" = ")[0] for sentence in fewer_shown(run.config, house.task)]
    assert told == ["elicit.shown", "teacher.shots", "calibrate.shots", "evaluate.shots"]
    many = replace(house.task, seed=house.task.validation)
    assert not list(fewer_shown(house.config(), many))
    worked = FewShotExample(input="7?", reasoning="It ends in 7.", target="odd")
    few = replace(many, worked=(worked,))  # seeds are not shown beside it
    assert not list(fewer_shown(house.config(), few))
    (told,) = fewer_shown(house.config(teacher={"model": "m", "shots": 5}), few)
    assert told.startswith("teacher.shots = 5") and "has 1 examples" in told


def model(path: Path) -> LocalModel:
    gguf, folder = (path, None) if path.is_file() else (None, path)
    return LocalModel("m", "0" * 64, gguf, folder, "F16")


def test_a_family_that_cannot_be_converted_is_refused_where_the_run_needs_it(
    house: Any, make_gguf: Make, tmp_path: Path
) -> None:
    known, other = model(make_gguf("k.gguf", **SIZES)), model(make_gguf("o.gguf", arch="mamba"))
    with pytest.raises(InputError, match=r"student\.model: .*'mamba'.*cannot be written as GGUF") as caught:
        refuse_models(house.config(), known, other)
    assert "original checkpoint" in caught.value.hint and "llama" in caught.value.hint
    with pytest.raises(InputError, match=r"teacher\.model: .*'mamba'.*adapter"):
        refuse_models(house.config(), other, known)
    refuse_models(house.config(data="original-teacher"), other, known)
    refuse_models(house.config(), None, known)
    refuse_models(house.config(teacher={"model": "m", "engine": "transformers"}), other, known)
    checkpoint = model(write_safetensors(tmp_path / "c", {"a": ("F16", [2, 2])}, model_type="mamba"))
    refuse_models(house.config(), known, checkpoint)
    device = {"device": "raspberry-pi-5", "file": "Q4_K_M"}
    with pytest.raises(InputError, match=r"'mamba'.*Q4_K_M"):
        refuse_models(house.config(deploy=device), known, checkpoint)
    refuse_models(house.config(deploy=device | {"file": "int4"}), known, checkpoint)


@pytest.mark.parametrize("kind", ["gguf", "checkpoint"])
def test_layers_that_no_adapter_can_change_are_refused(house: Any, kind: str, make_gguf: Make, tmp_path: Path) -> None:
    names = {"model.layers.0.self_attn.q_proj.weight": ("F16", [4, 4]), "model.norm.weight": ("F16", [4])}
    file, folder = make_gguf("k.gguf", **SIZES), write_safetensors(tmp_path / "c", names, model_type="llama")
    teacher, student = model(file if kind == "gguf" else folder), model(file)
    refuse_models(house.config(align={"lora_targets": ["q_proj"]}), teacher, student)
    for wrong in ("q_prj", "norm", "proj"):
        with pytest.raises(InputError, match=rf"align\.lora_targets: .*'{wrong}'"):
            refuse_models(house.config(align={"lora_targets": ["q_proj", wrong]}), teacher, student)


def test_steps_that_processes_cannot_share_are_found_before_any_call() -> None:
    task = load_task("home_intents")
    config = RunConfig.model_validate({"train": {"processes": 4}, "tune": {"batch_size": 6}})
    with pytest.raises(InputError, match=r"tune\.batch_size = 6") as caught:
        refuse_run(config, task)
    assert "align" not in str(caught.value)
    with pytest.raises(InputError, match=r"train\.shard_teacher"):
        refuse_run(RunConfig.model_validate({"train": {"shard_teacher": True}}), task)
    spread: dict[str, Any] = {"train": {"shard_teacher": True, "processes": 4}}
    teacher = {"model": RunConfig().teacher.model, "server": "vllm"}
    for without in (spread, {**spread, "teacher": teacher}):
        with pytest.raises(InputError, match=r"without addresses in teacher\.server"):
            refuse_run(RunConfig.model_validate(without), task, models=False)
    teacher["server"] = "http://127.0.0.1:1/v1"
    refuse_run(RunConfig.model_validate({**spread, "teacher": teacher}), task)
    four = {**spread, "teacher": teacher, "align": {"weights": "nf4"}}
    with pytest.raises(InputError, match=r"align\.weights"):
        refuse_run(RunConfig.model_validate(four), task)
    refuse_run(RunConfig.model_validate({"train": {"processes": 4}}), task)


def test_a_run_and_its_check_find_the_same() -> None:
    task, base = load_task("home_intents"), {"task": {"ref": "home_intents"}}
    for tables in (
        {"data": "one-technique", "train": {"processes": 3}},
        {"tune": {"soft_labels": 0.5}, "elicit": {"opinion_shots": 0}},
        {"teacher": {"model": RunConfig().teacher.model, "role": "inputs"}, "elicit": {"by_label": False}},
    ):
        with pytest.raises(InputError) as caught:
            refuse_run(RunConfig.model_validate(base | tables), task)
        found = find_problems(base | tables)
        assert found and caught.value.message == "; ".join(what for what, _ in found)


def test_a_teacher_that_cannot_write_for_a_given_answer_is_given_no_role_of_it(house: Any, capsys: Capture) -> None:
    assert house.distill("--set", "teacher.role=inputs") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "teacher.role" in said and "elicit.by_label to true" in said and house.calls == 0
    house.by_label = True
    refuse_run(house.config(teacher={"model": house.teacher.name, "role": "inputs"}), house.task)


def test_one_respondent_cannot_calibrate_and_is_found_before_any_call(house: Any) -> None:
    tables: dict[str, Any] = {"data": "best-of-n", "calibrate": {"shots": [0]}}
    tables["teacher"] = {"model": "openai:m@http://127.0.0.1:1/v1"}
    with pytest.raises(InputError, match=r"calibrate: .* 0 shots alone") as caught:
        refuse_run(house.config(**tables), house.task)
    assert "calibrate.shots" in caught.value.hint
    refuse_run(house.config(**tables | {"data": "original-teacher"}), house.task)  # which calibrates nothing
    refuse_run(house.config(**tables | {"calibrate": {"shots": [0, 1]}}), house.task)
    refuse_run(house.config(**tables | {"calibrate": {"shots": [0], "models": [house.teacher.name]}}), house.task)
    refuse_run(house.config(**tables), replace(house.task, answer=Answer(kind="text")))


@pytest.mark.parametrize(
    "keys",
    [
        {"server": "vllm", "server_model": "m"},
        {"server": "vllm", "server_folder": "/mnt"},
        {"server": "http://127.0.0.1:1/v1", "server_args": ["--enforce-eager"]},
    ],
)
def test_keys_for_the_other_kind_of_server_are_found(house: Any, keys: dict[str, Any]) -> None:
    config = house.config(teacher={"model": house.config().teacher.model, **keys})
    with pytest.raises(InputError, match=rf"teacher\.{list(keys)[1]} has no meaning with"):
        refuse_run(config, house.task, models=False)


def test_the_weights_of_servers_are_no_server(house: Any) -> None:
    server = "http://127.0.0.1:1/v1"
    refuse_run(house.config(teacher={"model": house.config().teacher.model, "server": server}), house.task)
    both = {"model": f"openai:m@{server}", "server": server}
    with pytest.raises(InputError, match=r"teacher\.server: teacher\.model names a server as well"):
        refuse_run(house.config(teacher=both, data="original-teacher"), house.task)
    with pytest.raises(InputError, match=r"teacher\.engine: .*teacher\.server"):
        refuse_run(house.config(teacher={**both, "model": "scripted-teacher", "engine": "int8"}), house.task)
