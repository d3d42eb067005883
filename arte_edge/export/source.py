"""The source of an export: a run, a checkpoint folder, a LoRA adapter, a Hub id or a GGUF, as one `Source`.

A source has a 16-bit checkpoint, its lineage, and two sets of texts that must not be mixed: *training texts*
for the importance matrix (what the student was tuned on), and *held-out prompts* for verification (the
task's validation examples). The test split is in neither. A run records its task and data, and its files
are checked against their checksums; for other sources ``--task`` names a task. Without a task, verification
uses built-in dialogues and there is no importance matrix.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from arte_edge.cache import Progress, slug
from arte_edge.checkpoint import reject_quantized
from arte_edge.distill.config import RunConfig, build, load_toml
from arte_edge.distill.prompts import STEP_BY_STEP, student_messages, tagged
from arte_edge.errors import InputError
from arte_edge.export.chat import Chat, read_chat
from arte_edge.export.lora_merge import Adapter, is_adapter, read_adapter
from arte_edge.export.ollama import Prompting
from arte_edge.export.provenance import parent_of, public_name
from arte_edge.models.resolve import from_folder, resolve
from arte_edge.results.student_json import Data, Lineage, Tuning
from arte_edge.store import file_sha256, read_jsonl
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Task
from arte_edge.verify.prompts import built_in_prompts, task_prompts

__all__ = ["Source", "open_source"]

_NOT_QUANTIZED = ("F16", "BF16", "F32", "")


@dataclass(frozen=True)
class Source:
    """The source. For an adapter, `checkpoint` is its base until it is merged."""

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
    prompting: Prompting | None = None  # of a run's student
    plain: bool = False  # prompted without its chat template
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
    """Open a run's folder or name, a checkpoint or adapter folder, a Hub id, or a GGUF.

    Args:
        task: a task, for a source that is not a run (or instead of the run's).
        base: an adapter's base, instead of the one it names.
        n_training: largest number of training texts for the importance matrix.
        n_prompt: largest number of held-out prompts for verification.
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
            raise InputError("--base is for adapters", f"{ref} is a run, and its student is merged.")
        return _open_run(folder, task, n_training, n_prompt)
    if folder.is_dir() and is_adapter(folder):
        source = _adapter(read_adapter(folder, base, offline=offline, progress=progress), progress)
    elif base:
        raise InputError("--base is for adapters", f"{ref} is not one.")
    else:
        source = _model(ref, offline, progress)
    if task is None:
        prompts = tuple(built_in_prompts(source.chat))
        return replace(source, prompts=prompts, prompts_from="arte-edge's built-in dialogues")
    loaded = load_task(task)
    return replace(
        source,
        task=loaded,
        training=_seed_texts(loaded, source.chat, n_training),
        training_from=f"{loaded.name} seed examples",
        prompts=tuple(task_prompts(source.chat, loaded, n_prompt)),
        prompts_from=f"validation examples of {loaded.name}",
    )


def _model(ref: str, offline: bool, progress: Progress | None) -> Source:
    model = resolve(ref, offline=offline, progress=progress)
    checkpoint = model.checkpoint(progress)
    reject_quantized(checkpoint, "the checkpoint")
    notes: tuple[str, ...] = ()
    if model.quantization not in _NOT_QUANTIZED:
        notes = (
            f"{public_name(ref)} is itself quantized ({model.quantization}). Files are compared with its "
            "dequantized weights; its own loss is not in the metrics.",
        )
    parent = parent_of(ref, model.sha256, model.quantization)
    name = Path(public_name(model.name).partition("@")[0].partition(":")[0]).name
    return Source(
        name=slug(name.removesuffix(".gguf")),
        checkpoint=checkpoint,
        chat=read_chat(checkpoint),
        lineage=Lineage(source="gguf" if model.gguf else "checkpoint", base=parent),
        notes=notes,
    )


def _adapter(adapter: Adapter, progress: Progress | None) -> Source:
    checkpoint = adapter.base.checkpoint(progress)
    reject_quantized(checkpoint, "the adapter's base")
    from_folder(checkpoint)  # complete, and no pickles
    notes: tuple[str, ...] = ()
    if adapter.base.quantization not in _NOT_QUANTIZED:
        notes = (
            f"The adapter's base is a {adapter.base.quantization} GGUF: it is dequantized to 16 bits and merged "
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


_TASK_SHA256 = re.compile(r'task_sha256 = "([0-9a-f]{64})"')
_RESUME = "Run the same `arte-edge distill` command again to resume the run."


def _open_run(folder: Path, task_ref: str | None, n_training: int, n_prompt: int) -> Source:
    """Return the tuned student of the run in `folder`.

    Raises:
        InputError: the run is not tuned yet, its files changed since, or its task is missing.
    """
    config = build(str(folder / "run.toml"), load_toml(folder / "run.toml"))
    checkpoint = folder / "tune" / "student"
    evaluated = _check_tuned(folder, checkpoint)
    task = _task(folder, config, task_ref)
    chat = read_chat(checkpoint)
    plain = config.student.template == "none"
    rendering = replace(chat, chat_template=None) if plain else chat
    return Source(
        name=slug(config.name or folder.resolve().name),
        checkpoint=checkpoint,
        chat=chat,
        lineage=_lineage(folder, config, task),
        task=task,
        training=_training_texts(folder / "tune" / "rows.jsonl", n_training),
        training_from=f"{task.name} training texts",
        prompts=tuple(task_prompts(rendering, task, n_prompt)),
        prompts_from=f"validation examples of {task.name}",
        prompting=_prompting(task),
        plain=plain,
        evaluated=evaluated,
    )


def _check_tuned(folder: Path, checkpoint: Path) -> Path | None:
    """Raise unless the tuning is finished and its files are unchanged; return its F16 GGUF if it still exists."""
    manifest = folder / "tune" / "manifest.json"
    if not manifest.is_file() or not (checkpoint / "config.json").is_file():
        raise InputError(f"{folder}: this run has no tuned student yet", _RESUME)
    try:
        files: dict[str, str] = json.loads(manifest.read_text("utf-8"))["files"]
        changed = [name for name, sha in files.items() if file_sha256(manifest.parent / name) != sha]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{manifest}: not a manifest", _RESUME) from error
    # The F16 GGUF may be deleted to save space: the converter writes the same tensors again.
    if broken := [name for name in changed if not name.endswith(".gguf")]:
        raise InputError(f"{folder / 'tune' / broken[0]}: missing or changed since the run wrote it", _RESUME)
    ggufs = [name for name in files if name.endswith(".gguf") and name not in changed]
    return manifest.parent / ggufs[0] if ggufs else None


def _task(folder: Path, config: RunConfig, ref: str | None) -> Task:
    if ref is not None:
        return load_task(ref)
    try:
        task = load_task(config.task.ref, bbh=Path(config.task.bbh) if config.task.bbh else None)
    except InputError as error:
        raise InputError(
            f"{folder}: the run's task '{config.task.ref}' was not found: {error.message}",
            "Run the command in the folder where the run was made, or name the task with --task.",
        ) from error
    recorded = _TASK_SHA256.search((folder / "run.toml").read_text("utf-8"))
    if recorded and recorded[1] != task.sha256:
        raise InputError(
            f"{folder}: the examples of task '{task.name}' changed after the run",
            "Held-out examples may be training data now. Restore them, or name a task with --task.",
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


def _prompting(task: Task) -> Prompting:
    system, question = student_messages(task, "")
    return Prompting(
        system=system["content"], before=question["content"], prefill=STEP_BY_STEP, stops=("\nQuestion:",)
    )


def _training_texts(rows: Path, n: int) -> tuple[str, ...]:
    """Return a sample of up to `n` of a run's training texts, prompt and completion.

    Args:
        rows: ``tune/rows.jsonl`` of the run, rendered as in training.

    Raises:
        InputError: the file is missing, or not a run's.
        ArteError: a line of it is damaged.
    """
    if not rows.is_file():
        raise InputError(f"{rows}: no such file", _RESUME)
    texts = []
    for row in read_jsonl(rows):
        prompt, completion = row.get("prompt"), row.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise InputError(f"{rows}: a row has no prompt and completion", _RESUME)
        texts.append(prompt + completion)
    return _sample(texts, n)


def _seed_texts(task: Task, chat: Chat, n: int) -> tuple[str, ...]:
    """Return a sample of up to `n` seed examples of `task` with their answers."""
    texts = [
        f"{chat.render(student_messages(task, seed.input), STEP_BY_STEP)} {tagged(seed.target)}"
        for seed in task.seed
    ]
    return _sample(texts, n)


def _sample(texts: Sequence[str], n: int) -> tuple[str, ...]:
    """Return `n` of `texts` in their order, always the same ones."""
    if len(texts) <= n:
        return tuple(texts)
    return tuple(texts[i] for i in sorted(random.Random(0).sample(range(len(texts)), n)))
