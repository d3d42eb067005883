"""A run folder of ``arte-edge distill`` as the source of an export.

Its tuned checkpoint, its task, the texts it was trained on and its whole lineage are
there; what the run recorded is checked against what lies in the folder.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from arte_edge.cache import slug
from arte_edge.distill.config import RunConfig
from arte_edge.distill.prompts import STEPS, student_messages
from arte_edge.distill.settings import build, load_toml
from arte_edge.errors import InputError
from arte_edge.export.calibration_texts import held_out, training_texts
from arte_edge.export.chat import read_chat
from arte_edge.export.modelfile import Asking
from arte_edge.export.provenance import parent_of
from arte_edge.export.source import Source
from arte_edge.results.student_json import Data, Lineage, Tuning
from arte_edge.store import file_sha256
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Task

__all__ = ["open_run"]

_TASK_SUM = re.compile(r'task_sha256 = "([0-9a-f]{64})"')
_GO_ON = "Give the `arte-edge distill` command again: it goes on where it stopped."


def open_run(folder: Path, task_ref: str | None, n_training: int, n_prompt: int) -> Source:
    """Return the tuned student of the run in `folder`.

    Raises:
        InputError: the run is not tuned yet, its files changed since, or its task is not there.
    """
    config = build(str(folder / "run.toml"), load_toml(folder / "run.toml"))
    checkpoint = folder / "tune" / "student"
    _check_tuned(folder, checkpoint)
    task = _task(folder, config, task_ref)
    chat = read_chat(checkpoint)
    plain = config.student.template == "none"
    rows = folder / "tune" / "rows.jsonl"
    return Source(
        name=slug(config.name or folder.resolve().name),
        checkpoint=checkpoint,
        chat=chat,
        lineage=_lineage(folder, config, task),
        task=task,
        training=training_texts(rows, n_training),
        training_from=f"{task.name} training texts",
        prompts=held_out(task, chat, n_prompt, plain=plain),
        prompts_from=f"validation examples of {task.name}",
        asking=_asking(task),
        plain=plain,
    )


def _check_tuned(folder: Path, checkpoint: Path) -> None:
    """Raise unless the run's tuning is done and its files are those it wrote."""
    manifest = folder / "tune" / "manifest.json"
    if not manifest.is_file() or not (checkpoint / "config.json").is_file():
        raise InputError(f"{folder}: this run has no tuned student yet", _GO_ON)
    try:
        files: dict[str, str] = json.loads(manifest.read_text("utf-8"))["files"]
        changed = [name for name, sha in files.items() if file_sha256(manifest.parent / name) != sha]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{manifest}: not a manifest", _GO_ON) from error
    # The F16 file is the run's own evaluation's and may be deleted to save room.
    if changed := [name for name in changed if not name.endswith(".gguf")]:
        raise InputError(f"{folder / 'tune' / changed[0]}: missing or changed since the run wrote it", _GO_ON)


def _task(folder: Path, config: RunConfig, ref: str | None) -> Task:
    if ref is not None:
        return load_task(ref)
    try:
        task = load_task(config.task.ref, bbh=Path(config.task.bbh) if config.task.bbh else None)
    except InputError as error:
        raise InputError(
            f"{folder}: the run's task '{config.task.ref}' is not there: {error.message}",
            "Give the command where the run was made, or name the task with --task.",
        ) from error
    recorded = _TASK_SUM.search((folder / "run.toml").read_text("utf-8"))
    if recorded and recorded[1] != task.sha256:
        raise InputError(
            f"{folder}: the examples of task '{task.name}' changed after the run",
            "What was held out then may be training data now. Restore them, or name a task with --task.",
        )
    return task


def _lineage(folder: Path, config: RunConfig, task: Task) -> Lineage:
    train = folder / "tailor" / "train.jsonl"
    data = None
    if train.is_file():
        n_row = len(train.read_bytes().splitlines())
        data = Data(file=train.name, rows=n_row, sha256=file_sha256(train))
    return Lineage(
        source="run",
        base=parent_of(config.student.model),
        teacher=parent_of(config.teacher.model),
        task=task.name,
        task_sha256=task.sha256,
        method="arte",
        seed=config.seed,
        tuning=Tuning(
            method=config.tune.method,
            data=config.data,
            learning_rate=config.tune.learning_rate,
            epochs=config.tune.epochs,
        ),
        data=data,
    )


def _asking(task: Task) -> Asking:
    system, asked = student_messages(task, "")
    return Asking(system=system["content"], before=asked["content"], prefill=STEPS, stops=("\nQuestion:",))
