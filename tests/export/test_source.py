"""Sources of an export: their checkpoint, lineage, texts, and the metadata that the lineage becomes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import Make, Patch, change_json, edited_json
from transformers import AutoTokenizer

from arte_edge.asking.form import FORMS, Form, instruction, with_instruction
from arte_edge.checkpoint import write_chat_template
from arte_edge.distill.config import build, load_toml
from arte_edge.distill.train.lora_merge import merge
from arte_edge.errors import InputError
from arte_edge.export.chat import read_chat
from arte_edge.export.source import PAPER, gguf_fields, open_source, parent_of, private_fields, public_name
from arte_edge.gguf.convert import convert
from arte_edge.gguf.reader import ARRAY, STRING, Field, read_model_header
from arte_edge.gguf.writer import rewrite
from arte_edge.results.student_json import Data, Lineage, Parent, Student
from arte_edge.tasks.loaders import load_task

SUM = "cd" * 32
STUDENT = Student(name="tiny", sha256=SUM, architecture="llama", dtype="F16", parameter_count=9)


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("/home/me/models/secret.gguf", "secret.gguf"),
        ("./models/mine/", "mine"),
        ("~/x/y", "y"),
        ("models/deep/er", "er"),
        ("C:\\Users\\me\\m.gguf", "m.gguf"),
        ("model.gguf", "model.gguf"),
        ("org/name", "org/name"),
        ("org/name@main:Q4_K_M", "org/name@main:Q4_K_M"),
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("openai:gpt-x@http://10.0.0.7:8000/v1", "gpt-x"),
        ("openai:org/m@https://host/v1", "org/m"),
    ],
)
def test_a_public_name_has_no_folder_and_no_address(ref: str, name: str) -> None:
    assert public_name(ref) == name


def test_a_folder_that_looks_like_a_hub_id_loses_its_parent(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "private" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("private/model") == "model"


def test_a_registry_model_has_its_hub_id_licence_and_checksum() -> None:
    parent = parent_of("smollm2-135m-instruct")
    assert "/" in parent.name and parent.license == "Apache-2.0" and len(parent.sha256) == 64


def test_the_keys_of_a_run_s_student() -> None:
    lineage = Lineage(
        source="run",
        base=Parent(name="org/base@abc", license="MIT"),
        teacher=Parent(name="teach", sha256=SUM),
        task="parity",
        task_sha256=SUM,
        method="arte",
        seed=7,
        data=Data(file="train.jsonl", rows=40, sha256=SUM),
    )
    keys = {key: field.value for key, field in gguf_fields(STUDENT, lineage, SUM).items()}
    assert keys["general.base_model.count"] == 1
    assert keys["general.base_model.0.repo_url"] == b"https://huggingface.co/org/base"
    assert keys["general.base_model.0.organization"] == b"org"
    assert keys["general.dataset.count"] == 1 and b"40 rows" in keys["general.dataset.0.description"]
    assert keys["general.license"] == b"MIT" and keys["general.name"] == b"tiny"
    assert keys["arte_edge.seed"] == 7 and keys["arte_edge.teacher.name"] == b"teach"
    assert keys["arte_edge.student.sha256"] == SUM.encode()
    assert (keys["arte_edge.method"], keys["arte_edge.paper"]) == (b"arte", PAPER.encode())


def test_what_is_not_known_is_not_written() -> None:
    keys = gguf_fields(STUDENT, Lineage(source="checkpoint", base=Parent(name="folder")), "")
    assert not [key for key in keys if key.startswith(("general.dataset", "general.license", "arte_edge.teacher"))]
    assert "general.base_model.0.repo_url" not in keys
    assert all(field.value != b"" for field in keys.values())


def test_a_path_in_the_metadata_is_found(make_gguf: Make) -> None:
    path = make_gguf(quantize__imatrix__file="/home/me/imatrix.gguf", general__name="clean")
    assert private_fields(path, ["/home/me/"]) == ["quantize.imatrix.file"]
    rewrite(path, {"general.tags": Field(ARRAY, [b"lora", b"base:/gpfs/you/x"], STRING)})
    assert private_fields(path, ["/gpfs/you/"]) == ["quantize.imatrix.file", "general.tags"]
    rewrite(path, {"general.url": Field(STRING, b"https://me:hush@example.org")}, ["general.tags", "quantize."])
    assert private_fields(path, []) == ["general.url"]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(tiny_run, tmp_path / "tiny"))


def test_a_run_has_its_task_texts_and_lineage(tiny_run: Path) -> None:
    source = open_source(str(tiny_run), n_training=8, n_prompt=5)
    assert source.name == "tiny" and source.checkpoint == tiny_run / "tune" / "student"
    assert source.task is not None and source.task.name == "home_intents"
    assert len(source.training) == 8
    assert all(text.rpartition("assistant\n")[2] in source.task.answer.choices for text in source.training)
    assert len(source.prompts) == 5
    lineage = source.lineage
    assert lineage.source == "run" and lineage.method == "arte" and lineage.seed == 0
    assert lineage.base is not None and lineage.base.license == "Apache-2.0"
    assert lineage.teacher is not None and "/" in lineage.teacher.name
    assert lineage.data is not None and (lineage.data.file, lineage.data.rows) == ("rows.jsonl", 12)
    assert lineage.tuning is not None and lineage.tuning.method == "lora"


def test_the_teacher_of_a_student_of_an_aligned_one_is_its_base(run: Path, tmp_path: Path) -> None:
    told = {"base": "smollm2-360m-instruct", "base_sha256": SUM, "adapters": {}}
    (tmp_path / "aligned").mkdir()
    (tmp_path / "aligned" / "teacher.json").write_text(json.dumps(told))
    text = (run / "run.toml").read_text("utf-8")
    teacher = build("run.toml", load_toml(run / "run.toml")).teacher.model
    assert text.count(f'model = "{teacher}"') == 1
    text = text.replace(f'model = "{teacher}"', f'model = "{tmp_path / "aligned"}"')
    (run / "run.toml").write_text(text, "utf-8")
    found, base = open_source(str(run)).lineage.teacher, parent_of("smollm2-360m-instruct")
    assert found is not None and (found.name, found.license, found.sha256) == (base.name, base.license, SUM)


def test_the_closing_table_travels_with_the_student_it_is_of(run: Path) -> None:
    assert open_source(str(run)).comparison == ()
    row = {
        "model": "tuned student",
        "setting": "as asked",
        "n": 10,
        "right": 5,
        "accuracy": 0.5,
        "low": 0.2,
        "high": 0.8,
    }
    change_json(run / "tune" / "manifest.json", lambda tuned: tuned["summary"].update(student_sha256=SUM))
    (run / "evaluate").mkdir()
    for sha256, n in ((SUM, 1), ("0" * 64, 0)):  # the second: evaluated before it was tuned again
        summary = {"rows": [row], "paired": [], "partial": False, "tuned": sha256}
        (run / "evaluate" / "manifest.json").write_text(json.dumps({"summary": summary}))
        assert len(open_source(str(run)).comparison) == n


def test_a_run_of_the_original_teacher_is_not_labelled_arte(run: Path) -> None:
    text = (run / "run.toml").read_text("utf-8")
    (run / "run.toml").write_text(text.replace('data = "arte"', 'data = "original-teacher"'), "utf-8")
    lineage = open_source(str(run)).lineage
    assert lineage.method == "original-teacher" and not lineage.is_arte
    assert "arte_edge.paper" not in gguf_fields(STUDENT, lineage, SUM)


@pytest.mark.parametrize("form", FORMS)
def test_how_a_run_s_student_is_asked_is_in_its_template(run: Path, tiny_student: Path, form: Form) -> None:
    task, chat = load_task("home_intents"), read_chat(tiny_student)
    template = with_instruction(chat.chat_template, instruction(task, form), chat.special_tokens)
    write_chat_template(run / "tune" / "student", template)
    source = open_source(str(run))
    assert source.asking is not None and source.notes == ()
    assert (source.asking.form, source.asking.instruction) == (form, instruction(task, form))
    longest = max(len(AutoTokenizer.from_pretrained(tiny_student)(x).input_ids) for x in task.answer.choices)
    assert source.asking.answer_tokens >= (longest if form == "answer" else 96)
    assert source.asking.answer_tokens < longest + 8 or form != "answer"


def test_a_student_that_does_not_hold_its_instruction_is_noted(run: Path, tiny_student: Path) -> None:
    write_chat_template(run / "tune" / "student", read_chat(tiny_student).chat_template or "")
    source = open_source(str(run))
    assert source.asking is None and "does not hold the task's instruction" in source.notes[0]


def test_a_tuned_checkpoint_with_its_task_is_asked_as_in_its_run(tiny_run: Path) -> None:
    source = open_source(str(tiny_run / "tune" / "student"), task="home_intents")
    assert source.asking == open_source(str(tiny_run)).asking is not None
    assert source.training[0] == open_source(str(tiny_run)).training[0]


def test_no_text_of_the_test_split_is_read(tiny_run: Path, monkeypatch: Patch) -> None:
    def fail(self: object) -> None:
        raise AssertionError("the test split was opened")

    monkeypatch.setattr("arte_edge.tasks.task.Task.load_test", fail)
    source = open_source(str(tiny_run), n_prompt=10_000)
    validation = {example.input for example in load_task("home_intents").validation}
    assert len(source.prompts) == len(validation)
    assert not [text for text in source.training if any(f"user\n{v}<" in text for v in validation)]


def test_a_run_is_found_by_its_name(tiny_run: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    shutil.copytree(tiny_run, tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()  # a task of that name, as `arte-edge tasks new` makes one
    (tmp_path / "mine" / "task.toml").touch()
    assert open_source("mine").lineage.source == "run"
    with pytest.raises(InputError, match="runs/nowhere: no such run"):  # nor looked for on the Hub
        open_source("runs/nowhere")


def test_a_run_without_a_tuned_student_says_how_to_resume(run: Path) -> None:
    (run / "tune" / "manifest.json").unlink()
    with pytest.raises(InputError, match="no tuned student") as error:
        open_source(str(run))
    assert "arte-edge distill" in error.value.hint


def test_weights_that_changed_since_the_run_are_noticed(run: Path) -> None:
    path = run / "tune" / "student" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="changed since the run"):
        open_source(str(run))


def test_a_task_that_changed_since_the_run_is_noticed(run: Path) -> None:
    text = (run / "run.toml").read_text()
    (run / "run.toml").write_text(text.replace('task_sha256 = "', 'task_sha256 = "' + "0" * 64 + '" # "'))
    with pytest.raises(InputError, match="changed after the run"):
        open_source(str(run))
    assert open_source(str(run), task="home_intents").task is not None


def test_a_checkpoint_without_a_task_is_compared_on_the_built_in_texts(tiny_student: Path) -> None:
    source = open_source(str(tiny_student))
    assert source.name == "tiny-student" and source.lineage.source == "checkpoint"
    assert source.lineage.base is not None and source.lineage.base.name == "tiny-student"
    assert source.task is None and source.training == () and source.asking is None
    assert len(source.prompts) >= 8 and "built-in" in source.prompts_from


def test_a_task_brings_training_texts_and_held_out_prompts(tiny_student: Path) -> None:
    source = open_source(str(tiny_student), task="home_intents", n_training=6, n_prompt=7)
    task = load_task("home_intents")
    assert len(source.training) == 6 and len(source.prompts) == 7
    # It is verified on this task; it was not tuned for it.
    assert source.task is not None and source.task.sha256 == task.sha256 and source.lineage.task == ""
    assert all(any(seed.input in text for seed in task.seed) for text in source.training)
    # Its template does not hold the instruction, so it comes as system text.
    assert source.asking is None
    assert all(f"system\n{task.description.strip()}" in text for text in source.training)


def test_an_adapter_of_a_four_bit_base_is_rejected(tiny_adapter: Path, tiny_student: Path, tmp_path: Path) -> None:
    four = edited_json(tiny_student, tmp_path / "four", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(InputError, match="quantized"):
        open_source(str(tiny_adapter), base=str(four))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "adapter_config.json: peft_type is 'IA3'"),
        ({"peft_type": ["LORA"]}, "peft_type is"),
        ({"base_model_name_or_path": None}, "adapter_config.json: names no base"),
        ({"base_model_name_or_path": {"x": 1}}, "names no base"),
        ({"base_model_name_or_path": "/data/elsewhere/SmolLM2"}, "/data/elsewhere/SmolLM2: no such.*\n.*--base"),
        ({"base_model_name_or_path": "models/mine"}, "base_model_name_or_path.*\n.*--base"),
        ({"base_model_name_or_path": "C:\\models\\mine"}, "base_model_name_or_path.*\n.*--base"),
        ({"base_model_name_or_path": "x" * 5000}, "base_model_name_or_path.*\n.*--base"),
    ],
)
def test_an_adapter_that_cannot_be_merged_says_why(
    tiny_adapter: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = edited_json(tiny_adapter, tmp_path / "odd", "adapter_config.json", **change)
    with pytest.raises(InputError, match=message):
        open_source(str(folder), offline=True)


def test_an_adapters_folder_is_told_by_its_weights_and_brings_its_tokenizer(
    tiny_adapter: Path, tiny_student: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    shutil.copy(tiny_student / "config.json", folder)  # as some trainers leave it
    before = open_source(str(folder))
    assert before.adapter is not None and before.checkpoint == tiny_student.absolute()
    assert before.lineage.source == "adapter" and before.chat == open_source(str(tiny_student)).chat
    assert before.lineage.base is not None and before.lineage.base.name == "tiny-student"
    sums = before.adapter.files_sha256
    tokenizer = AutoTokenizer.from_pretrained(tiny_student)
    tokenizer.chat_template, tokenizer.eos_token = "{{ messages[-1].content }}§", "<|im_start|>"
    tokenizer.save_pretrained(folder)
    source = open_source(str(folder))
    assert source.adapter is not None and source.chat.chat_template == "{{ messages[-1].content }}§"
    assert "§" in source.prompts[0] and source.chat.stops[0] == "<|im_start|>"
    assert source.adapter.files_sha256 != sums
    merge(source.adapter, source.checkpoint, tmp_path / "merged", ["light"])
    assert read_chat(tmp_path / "merged") == source.chat
    fields = read_model_header(convert(tmp_path / "merged", tmp_path / "x.gguf")).metadata
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    (folder / "adapter_model.bin").touch()
    unread, no_template = open_source(str(folder)).notes
    assert "adapter_model.bin" in unread and "no chat template" in no_template


def test_base_is_for_adapters_only(tiny_student: Path, tiny_run: Path) -> None:
    for ref in (tiny_student, tiny_run):
        with pytest.raises(InputError, match="--base"):
            open_source(str(ref), base="x")
