"""The source of an export: a run, a checkpoint folder, a LoRA adapter, a Hub id or a GGUF, as one `Source`.

A source has a 16-bit checkpoint, its lineage, and two sets of texts that must not be mixed: *training texts* for the
importance matrix, and *held-out prompts* for verification (the task's validation examples). The test split is in
neither. A run records its task; for other sources ``--task`` names one. Without a task, verification uses built-in
dialogues and there is no importance matrix.

The lineage becomes GGUF metadata: standard keys are those of ggml/docs/gguf.md (``general.base_model.*``,
``general.dataset.*``, ``general.license``); others begin with ``arte_edge.``. Files hold nothing about the
machine: model paths lose their folders, servers their address, and `private_fields` checks the result.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from arte_edge.asking.form import Asking, asking_of
from arte_edge.cache import Progress, slug
from arte_edge.checkpoint import reject_quantized
from arte_edge.distill.aligned import aligned_teacher
from arte_edge.distill.config import RunConfig, build, load_toml
from arte_edge.distill.train.lora_merge import Adapter, read_adapter
from arte_edge.errors import InputError
from arte_edge.export.chat import Chat, read_chat
from arte_edge.files import json_loads, user_path
from arte_edge.gguf.reader import FULL_WIDTH, STRING, UINT32, Field, read_model_header
from arte_edge.model_folder import chat_templates, look, tokenizer_files
from arte_edge.models.resolve import resolve
from arte_edge.pii_scan import Machine
from arte_edge.results.accuracy import SCHEMA_VERSION
from arte_edge.results.comparison import ComparisonRow, comparison_of
from arte_edge.results.student_json import MODEL_MARKS, Alignment, Data, Lineage, Parent, Student, Tuning, find_folder
from arte_edge.store import file_sha256, read_jsonl
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Task
from arte_edge.verify.logits import built_in_prompts, task_prompts

PAPER = "arXiv:2406.19227"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?(:[\w.-]+)?")


def public_name(ref: str) -> str:
    """Return a model reference without folders and server addresses."""
    if ref.startswith("openai:"):
        return ref.removeprefix("openai:").partition("@http")[0]
    looks_local = ref.startswith((".", "/", "~")) or "\\" in ref or ref.endswith(".gguf")
    if looks_local or ("/" in ref and (Path(ref).exists() or not _HUB_ID.fullmatch(ref))):
        return PurePath(ref.replace("\\", "/").rstrip("/")).name or "model"
    return ref


def parent_of(ref: str, sha256: str = "", quantization: str = "") -> Parent:
    """Return what may be published about the model `ref`; a registry entry adds its licence and checksum."""
    known = None
    if "/" not in ref:  # a path or a Hub id is not in the registry
        from arte_edge.models.registry import entries

        known = entries().get(ref)
    if known is None:
        return Parent(name=public_name(ref), sha256=sha256, quantization=quantization)
    return Parent(
        name=known.hub.id if known.hub else known.name,
        sha256=sha256 or known.sha256,
        quantization=quantization,
        license=known.license,
    )


def gguf_fields(student: Student, lineage: Lineage, template_sha256: str) -> dict[str, Field]:
    """Return the metadata of every GGUF of this student, apart from what runtimes need."""
    texts: dict[str, str] = {"general.name": student.name}
    numbers: dict[str, int] = {"arte_edge.schema_version": SCHEMA_VERSION}
    if lineage.base:
        numbers["general.base_model.count"] = 1
        texts |= _parent_fields("general.base_model.0", lineage.base)
        texts["general.license"] = lineage.base.license
    if lineage.data:
        numbers["general.dataset.count"] = 1
        texts["general.dataset.0.name"] = f"{lineage.task} {lineage.data.file}"
        texts["general.dataset.0.description"] = f"{lineage.data.rows} rows, sha256 {lineage.data.sha256}"
        texts["arte_edge.data.sha256"] = lineage.data.sha256
    if lineage.teacher:
        texts["arte_edge.teacher.name"] = lineage.teacher.name
        texts["arte_edge.teacher.sha256"] = lineage.teacher.sha256
    if lineage.is_arte:
        texts["arte_edge.paper"] = PAPER
    if lineage.seed is not None:
        numbers["arte_edge.seed"] = lineage.seed
    texts |= {
        "arte_edge.source": lineage.source,
        "arte_edge.task.name": lineage.task,
        "arte_edge.task.sha256": lineage.task_sha256,
        "arte_edge.method": lineage.method,
        "arte_edge.student.sha256": student.sha256,
        "arte_edge.template.sha256": template_sha256,
    }
    fields = {key: Field(STRING, text.encode()) for key, text in texts.items() if text}
    return fields | {key: Field(UINT32, number) for key, number in numbers.items()}


def _parent_fields(prefix: str, parent: Parent) -> dict[str, str]:
    keys = {f"{prefix}.name": parent.name}
    if _HUB_ID.fullmatch(parent.name):
        repository = parent.name.partition("@")[0].partition(":")[0]
        keys[f"{prefix}.organization"] = repository.partition("/")[0]
        keys[f"{prefix}.repo_url"] = f"https://huggingface.co/{repository}"
    return keys


def private_fields(gguf: Path, private: Iterable[str]) -> list[str]:
    """Return the metadata keys of a GGUF file whose texts hold one of the `private` ones, a path or a secret.

    Raises InputError: not a GGUF.
    """
    texts, machine = [text for text in private if text], Machine(frozenset(), ())

    def is_private(key: str, value: object) -> bool:
        if isinstance(value, list):
            return any(is_private(key, item) for item in value)
        if not isinstance(value, str) or any(text in value for text in texts):
            return isinstance(value, str)
        about = key.startswith(("general.", "quantize.", "arte_edge."))
        return about and any(f.kind in ("a path", "a secret") for f in machine.findings(value, gguf.name, key))

    return [key for key, value in read_model_header(gguf).metadata.items() if is_private(key, value)]


_NOT_QUANTIZED = (*FULL_WIDTH, "")


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
    n_prompt: int = 24  # largest number of held-out prompts
    asking: Asking | None = None  # of a student whose chat template holds the task's instruction
    comparison: tuple[ComparisonRow, ...] = ()  # the closing table of a run; empty: not evaluated
    evaluated: Path | None = None  # the F16 GGUF that the run evaluated, if it is still there
    gguf: Path | None = None  # the file that `checkpoint` was unpacked from
    notes: tuple[str, ...] = ()

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """The held-out prompts of verification, rendered when it needs them."""
        task = self.task
        return tuple(task_prompts(self.chat, task, self.n_prompt) if task else built_in_prompts(self.chat))

    @property
    def prompts_from(self) -> str:
        return f"validation examples of {self.task.name}" if self.task else "arte-edge's built-in dialogues"


class _Asked:
    """A model's tokenizer and template, without its weights."""

    def __init__(self, checkpoint: Path, chat: Chat) -> None:
        self._checkpoint, self.render = checkpoint, chat.render

    @cached_property
    def _tokenizer(self) -> Any:
        from arte_edge.transformers_load import load_tokenizer

        return load_tokenizer(self._checkpoint)

    def tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


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
    folder = user_path(ref, recorded=True)
    if ((run := find_folder(ref, "run.toml", *MODEL_MARKS)) / "run.toml").is_file():
        folder = run
    if folder.parts[:1] == ("runs",) and not folder.exists():  # no repository of the Hub's user "runs"
        hint = "List the folders below runs/, or run `arte-edge distill` first."
        raise InputError(f"{ref}: no such run", hint)
    if (folder / "run.toml").is_file():
        if base:
            raise InputError("--base is for adapters", f"{ref} is a run, and its student is merged.")
        return _open_run(folder, task, n_training, n_prompt)
    if folder.is_dir() and look(folder).kind == "adapter":
        source = _adapter(read_adapter(folder, base, offline=offline, progress=progress), progress)
    elif base:
        raise InputError("--base is for adapters", f"{ref} is not one.")
    else:
        source = _model(ref, offline, progress)
    if task is None:
        return source
    loaded = load_task(task)
    asking, front = asking_of(_Asked(source.checkpoint, source.chat), loaded)
    texts = [
        source.chat.render([*front, *asking.messages(seed.input)]) + asking.completion(seed.target)
        for seed in loaded.seed
    ]
    return replace(
        source,
        task=loaded,
        asking=None if front else asking,
        training=_sample(texts, n_training),
        training_from=f"{loaded.name} seed examples",
        n_prompt=n_prompt,
    )


def _model(ref: str, offline: bool, progress: Progress | None) -> Source:
    model = resolve(ref, offline=offline, progress=progress)
    checkpoint = model.checkpoint(progress)
    reject_quantized(checkpoint, "the checkpoint")
    notes = _not_read(checkpoint)
    if model.quantization not in _NOT_QUANTIZED:
        notes += (
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
        gguf=model.gguf,
        notes=notes,
    )


def _not_read(folder: Path) -> tuple[str, ...]:
    """Return a note about other weights in a model's folder."""
    found = look(folder)
    names, used = ", ".join(found.others), found.weights[0].name
    return (f"{names} in {public_name(str(folder))} is not read; the weights are {used}.",) if names else ()


def _adapter(adapter: Adapter, progress: Progress | None) -> Source:
    checkpoint = adapter.base.checkpoint(progress)
    reject_quantized(checkpoint, "the adapter's base")
    notes = _not_read(checkpoint) + _not_read(adapter.folder)
    if adapter.base.quantization not in _NOT_QUANTIZED:
        notes += (
            f"The adapter's base is a {adapter.base.quantization} GGUF: it is dequantized to 16 bits and merged "
            "there. If the adapter was trained on the original, name that with --base.",
        )
    own = read_chat(checkpoint, adapter.folder)
    if own.chat_template is None and chat_templates(tokenizer_files(checkpoint)):
        notes += (
            "The tokenizer in the adapter's folder has no chat template, so its base's is not used. If it was trained "
            f"with that, copy it to {adapter.folder}.",
        )
    parent = parent_of(adapter.base_ref, adapter.base.sha256, adapter.base.quantization)
    return Source(
        name=slug(adapter.folder.resolve().name),
        checkpoint=checkpoint,
        chat=own,
        lineage=Lineage(source="adapter", base=parent),
        adapter=adapter,
        notes=notes,
    )


_TASK_SHA256 = re.compile(r'task_sha256 = "([0-9a-f]{64})"')
_RESUME = "Run the same `arte-edge distill` command again to resume the run."
_NOT_HELD = (
    "The chat template of this student does not hold the task's instruction: an older version tuned it, or for another "
    "task. It has to be given the instruction as system text; run the same `arte-edge distill` command again."
)


def _open_run(folder: Path, task_ref: str | None, n_training: int, n_prompt: int) -> Source:
    """Return the tuned student of the run in `folder`.

    Raises InputError: the run is not tuned yet, its files changed since, or its task is missing.
    """
    config = build(str(folder / "run.toml"), load_toml(folder / "run.toml"))
    checkpoint = folder / "tune" / "student"
    evaluated = _check_tuned(folder, checkpoint)
    task = _task(folder, config, task_ref)
    chat = read_chat(checkpoint)
    asking, front = asking_of(_Asked(checkpoint, chat), task, config.evaluate.answer_tokens)
    return Source(
        name=slug(config.name or folder.resolve().name),
        checkpoint=checkpoint,
        chat=chat,
        lineage=_lineage(folder, config, task),
        task=task,
        training=_training_texts(folder / "tune" / "rows.jsonl", n_training),
        training_from=f"{task.name} training texts",
        n_prompt=n_prompt,
        asking=None if front else asking,
        comparison=_comparison(folder),
        evaluated=evaluated,
        notes=(_NOT_HELD,) if front else (),
    )


def _check_tuned(folder: Path, checkpoint: Path) -> Path | None:
    """Raise unless the tuning is finished and its files are unchanged; return its F16 GGUF if it still exists."""
    manifest = folder / "tune" / "manifest.json"
    if not manifest.is_file() or not (checkpoint / "config.json").is_file():
        raise InputError(f"{folder}: this run has no tuned student yet", _RESUME)
    try:
        files: dict[str, str] = json_loads(manifest.read_text("utf-8"))["files"]
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


def _summary(folder: Path, stage: str) -> dict[str, Any]:
    """Return the summary of a run's stage, empty where it is not finished."""
    try:
        summary = json_loads((folder / stage / "manifest.json").read_bytes())["summary"]
        return summary if isinstance(summary, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _comparison(folder: Path) -> tuple[ComparisonRow, ...]:
    """Return what the run's evaluation says of this very student; nothing where it is not finished or of another."""
    found = _summary(folder, "evaluate")
    if found.get("tuned") not in (None, _summary(folder, "tune").get("student_sha256")):
        return ()
    try:
        return comparison_of(found)
    except ValueError:  # a run of an older version compared with the base student alone
        return ()


def _lineage(folder: Path, config: RunConfig, task: Task) -> Lineage:
    teacher = parent_of(config.teacher.model)
    if aligned := aligned_teacher(config.teacher.model):  # the name of its folder tells no licence
        teacher = parent_of(aligned.base, aligned.base_sha256)
    train = folder / "tune" / "rows.jsonl"  # what was trained on: tailored rows of every round, own labels
    data = None
    if train.is_file():
        n_row = len(train.read_bytes().splitlines())
        data = Data(file=train.name, rows=n_row, sha256=file_sha256(train))
    return Lineage(
        source="run",
        base=parent_of(config.student.model),
        teacher=teacher,
        task=task.name,
        task_sha256=task.sha256,
        method=config.data,
        seed=config.seed,
        alignment=Alignment.of(_summary(folder, "align")) if config.aligned else None,
        tuning=Tuning(
            method=config.tune.method,
            data=config.data,
            learning_rate=config.tune.learning_rate,
            epochs=config.tune.epochs,
        ),
        data=data,
    )


def _training_texts(rows: Path, n: int) -> tuple[str, ...]:
    """Return a sample of up to `n` of a run's training texts, prompt and completion.

    Args:
        rows: ``tune/rows.jsonl`` of the run, rendered as in training.

    Raises InputError: the file is missing, or not a run's; ArteError: a line of it is damaged.
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


def _sample(texts: Sequence[str], n: int) -> tuple[str, ...]:
    """Return `n` of `texts` in their order, always the same ones."""
    if len(texts) <= n:
        return tuple(texts)
    return tuple(texts[i] for i in sorted(random.Random(0).sample(range(len(texts)), n)))
