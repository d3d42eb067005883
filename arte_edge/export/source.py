"""What is exported: a run, a checkpoint folder, an adapter, a Hub id or a GGUF, as one `Source`.

A source knows its 16-bit checkpoint (an adapter's once it is merged), where it comes from, and the texts
that go with it. Only a run knows its task and training data by itself, and its files are checked against
what the run recorded. For the others ``--task`` names a task; without one the gate compares on built-in
dialogues and there is no importance matrix.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from arte_edge.cache import Progress, slug
from arte_edge.checkpoint import refuse_quantized
from arte_edge.distill.config import RunConfig, build, load_toml
from arte_edge.distill.prompts import STEPS, student_messages
from arte_edge.errors import InputError
from arte_edge.export.calibration_texts import held_out, neutral, seed_texts, training_texts
from arte_edge.export.chat import Chat, read_chat
from arte_edge.export.lora_merge import Adapter, is_adapter, read_adapter
from arte_edge.export.ollama import Asking
from arte_edge.export.provenance import parent_of, public_name
from arte_edge.models.resolve import from_folder, resolve
from arte_edge.results.student_json import Data, Lineage, Tuning
from arte_edge.store import file_sha256
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Task

__all__ = ["Source", "open_run", "open_source", "with_task"]

_FULL = ("F16", "BF16", "F32", "")


@dataclass(frozen=True)
class Source:
    """What an export starts from. `checkpoint` is the base's for an adapter, until it is merged."""

    name: str  # safe as a file name
    checkpoint: Path
    chat: Chat
    lineage: Lineage
    adapter: Adapter | None = None
    task: Task | None = None
    training: tuple[str, ...] = ()  # rendered texts for the importance matrix; empty: none can be made
    training_from: str = ""
    prompts: tuple[str, ...] = ()  # rendered and held out
    prompts_from: str = ""
    asking: Asking | None = None  # how a tailored student is asked
    plain: bool = False  # asked without its chat template
    evaluated: Path | None = None  # the F16 GGUF that the run evaluated, if it is still there
    notes: tuple[str, ...] = ()


def open_source(
    ref: str,
    *,
    task: str | None = None,
    base: str | None = None,
    n_training: int = 200,
    n_prompt: int = 24,
    offline: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Return what `ref` names: a run's folder or name, a checkpoint or adapter folder, a Hub id, a GGUF.

    Args:
        task: a task's reference, for a model that is no run (or in place of the run's).
        base: an adapter's base, in place of the one it names.
        n_training: training texts that an importance matrix may read, at most.
        n_prompt: held-out prompts that the gate compares on, at most.
        offline: use only what is on this machine.

    Raises:
        InputError: no such thing, an unfinished run, quantized weights, a task that changed.
        ArteError: it cannot be fetched or converted.
    """
    folder = Path(ref).expanduser()
    if not folder.exists() and re.fullmatch(r"[\w.-]+", ref) and (Path("runs") / ref / "run.toml").is_file():
        folder = Path("runs") / ref
    if (folder / "run.toml").is_file():
        if base:
            raise InputError("--base goes with an adapter", f"{ref} is a run, and its student is merged.")
        return open_run(folder, task, n_training, n_prompt)
    if folder.is_dir() and is_adapter(folder):
        source = _adapter(read_adapter(folder, base, offline=offline, progress=progress), progress)
    elif base:
        raise InputError("--base goes with an adapter", f"{ref} is not one.")
    else:
        source = _model(ref, offline, progress)
    return with_task(source, load_task(task) if task else None, n_training, n_prompt)


def with_task(source: Source, task: Task | None, n_training: int, n_prompt: int) -> Source:
    """Return `source` with the texts of `task`, or with the built-in ones if there is none."""
    if task is None:
        return replace(source, prompts=neutral(source.chat), prompts_from="arte-edge's built-in dialogues")
    return replace(
        source,
        task=task,
        training=seed_texts(task, source.chat, n_training),
        training_from=f"{task.name} seed examples",
        prompts=held_out(task, source.chat, n_prompt),
        prompts_from=f"validation examples of {task.name}",
    )


def _model(ref: str, offline: bool, progress: Progress | None) -> Source:
    model = resolve(ref, offline=offline, progress=progress)
    checkpoint = model.checkpoint(progress)
    refuse_quantized(checkpoint, "the checkpoint")
    notes: tuple[str, ...] = ()
    if model.quantization not in _FULL:
        notes = (
            f"{public_name(ref)} is quantized ({model.quantization}) itself. Files are compared with it as it "
            "is unpacked; what it lost before is not in the figures.",
        )
    parent = parent_of(ref, model.sha256, model.quantization)
    return Source(
        name=slug(
            Path(public_name(model.name).partition("@")[0].partition(":")[0]).name.removesuffix(".gguf")
        ),
        checkpoint=checkpoint,
        chat=read_chat(checkpoint),
        lineage=Lineage(source="gguf" if model.gguf else "checkpoint", base=parent),
        notes=notes,
    )


def _adapter(adapter: Adapter, progress: Progress | None) -> Source:
    checkpoint = adapter.base.checkpoint(progress)
    refuse_quantized(checkpoint, "the adapter's base")
    from_folder(checkpoint)  # whole, and no pickles
    notes: tuple[str, ...] = ()
    if adapter.base.quantization not in _FULL:
        notes = (
            f"The adapter's base is a {adapter.base.quantization} GGUF: it is unpacked to 16 bits and merged "
            "there. If the adapter was trained on the original, name that with --base.",
        )
    parent = parent_of(adapter.base_ref, adapter.base.sha256, adapter.base.quantization)
    return Source(
        name=slug(adapter.folder.resolve().name),
        checkpoint=checkpoint,
        chat=read_chat(checkpoint),
        lineage=Lineage(source="adapter", base=parent),
        adapter=adapter,
        notes=notes,
    )


_TASK_SUM = re.compile(r'task_sha256 = "([0-9a-f]{64})"')
_GO_ON = "Give the `arte-edge distill` command again: it goes on where it stopped."


def open_run(folder: Path, task_ref: str | None, n_training: int, n_prompt: int) -> Source:
    """Return the tuned student of the run in `folder`.

    Raises:
        InputError: the run is not tuned yet, its files changed since, or its task is not there.
    """
    config = build(str(folder / "run.toml"), load_toml(folder / "run.toml"))
    checkpoint = folder / "tune" / "student"
    evaluated = _check_tuned(folder, checkpoint)
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
        evaluated=evaluated,
    )


def _check_tuned(folder: Path, checkpoint: Path) -> Path | None:
    """Raise unless the run's tuning is done and its files are those it wrote; return its F16 file, if there."""
    manifest = folder / "tune" / "manifest.json"
    if not manifest.is_file() or not (checkpoint / "config.json").is_file():
        raise InputError(f"{folder}: this run has no tuned student yet", _GO_ON)
    try:
        files: dict[str, str] = json.loads(manifest.read_text("utf-8"))["files"]
        changed = [name for name, sha in files.items() if file_sha256(manifest.parent / name) != sha]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{manifest}: not a manifest", _GO_ON) from error
    # The F16 file may be deleted to save space: the converter then writes the same tensors again.
    if broken := [name for name in changed if not name.endswith(".gguf")]:
        raise InputError(f"{folder / 'tune' / broken[0]}: missing or changed since the run wrote it", _GO_ON)
    whole = [name for name in files if name.endswith(".gguf") and name not in changed]
    return manifest.parent / whole[0] if whole else None


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
