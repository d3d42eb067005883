"""A tiny student in every form an export starts from: a checkpoint, a run, a LoRA adapter."""

import hashlib
import json
from pathlib import Path

import pytest
import tiny
from tiny import TASK, Folders

from arte_edge.asking.form import instruction, with_instruction
from arte_edge.checkpoint import write_chat_template
from arte_edge.distill.config import RunConfig, dump_toml
from arte_edge.store import write_jsonl
from arte_edge.tasks.loaders import load_task


def write_run(folder: Path, student: Path) -> Path:
    """Write what `arte-edge distill` leaves of a finished run whose tuned student has the weights of `student`."""
    import shutil

    from arte_edge.export.chat import read_chat

    task, chat = load_task(TASK), read_chat(student)
    template = with_instruction(chat.chat_template, instruction(task, "answer"), chat.special_tokens)
    config = RunConfig.model_validate({"name": "tiny", "task": {"ref": TASK}, "tune": {"method": "lora"}})
    folder.mkdir()
    header = f'# The run as resolved. task_sha256 = "{task.sha256}"\n'
    (folder / "run.toml").write_text(header + dump_toml(config), "utf-8")
    shutil.copytree(student, folder / "tune" / "student")
    write_chat_template(folder / "tune" / "student", template)
    chat = read_chat(folder / "tune" / "student")
    rows = [
        {"prompt": chat.render([{"role": "user", "content": seed.input}]), "completion": seed.target}
        for seed in task.seed[:12]
    ]
    write_jsonl(folder / "tune" / "rows.jsonl", rows)
    names = ["rows.jsonl", "student/model.safetensors"]
    sums = {name: hashlib.sha256((folder / "tune" / name).read_bytes()).hexdigest() for name in names}
    manifest = {"inputs": "", "files": {**sums, "student-F16.gguf": "0" * 64}, "summary": {"form": "answer"}}
    (folder / "tune" / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_student: Path, tmp_path_factory: Folders) -> Path:
    """A finished run folder whose tuned student is `tiny_student`."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_student)


@pytest.fixture(scope="session")
def tiny_adapter(tiny_student: Path, tmp_path_factory: Folders) -> Path:
    """A LoRA adapter of `tiny_student` with random matrices, of the size of a short training."""
    folder = tmp_path_factory.mktemp("adapters") / "tiny-adapter"
    tiny.save_adapter(tiny_student, folder, [5, 6], target_modules="all-linear")
    return folder


def visible(out: Path) -> dict[str, bytes]:
    """Return every file that a user sees."""
    named = {path.relative_to(out): path for path in out.rglob("*") if path.is_file()}
    return {str(n): p.read_bytes() for n, p in named.items() if not any(x.startswith(".") for x in n.parts)}
