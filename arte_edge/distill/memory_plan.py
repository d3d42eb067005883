"""The memory that a run on a CPU needs, stage by stage, from the models' shapes, before anything is loaded.

* Models that write or score: the file, which is mapped; a copy of the weights that llama.cpp repacks; the cache of
  `parallel` sequences. Teacher and student stay open together.
* Training all weights: 16 bytes a parameter (weights, gradient and two averages of Adam in 32 bits).
* Training an adapter: the frozen weights as they are stored (`frozen_weights`), one layer widened, 16 bytes for each
  parameter of the adapter. While an alignment is checked, between two steps, the teacher's engine is open beside it;
  frozen weights in the file's own 16 bits are then given back.
* Activations that the backward pass needs: a layer of a Llama keeps eleven vectors of the model's width and four of
  the feed-forward layer's for each token (both norms, queries, keys and values, attention, gate, up and their
  products), counted in transformers' code. Where they would take a run beyond `_ROOM` of the memory, only what goes
  into a layer is kept, and the layer is computed again: the numbers are the same, a step has one more forward
  pass.
* Logits of the completions' tokens, `_LOGITS` times in 32 bits: themselves, their exponentials, two gradients; of a
  frozen output layer in bfloat16 `_ROUNDED_LOGITS` times (`train.completion_head`).
* Converting a GGUF file: the checkpoint, beside it the largest matrix in 32 bits; it runs in a process of its own.

docs/runs.md has what was measured beside what this says. Lengths are those that the settings allow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from arte_edge.cache import megabytes
from arte_edge.device.detect import detect
from arte_edge.device.memory_estimate import repacked_types
from arte_edge.device.model_size import ModelSize
from arte_edge.distill.gpu_plan import NF4
from arte_edge.errors import InputError
from arte_edge.gguf.to_hf import checkpoint_folder
from arte_edge.machine import available_bytes, total_bytes
from arte_edge.runtimes.llamacpp.engine import widens
from arte_edge.runtimes.loader import Kind, is_server, teacher_kind
from arte_edge.runtimes.prefix_tree import MAX_LEVELS

if TYPE_CHECKING:
    from arte_edge.distill.config import RunConfig
    from arte_edge.distill.run_context import RunContext
    from arte_edge.tasks.task import Task

_PROGRAM, _TRAINER = (250_000_000, 500_000_000)  # interpreter and libraries without and with torch, TRL: measured
_TRAINED, _HELD, _F32 = 16, 2, 4  # bytes a parameter
_WIDE, _NARROW = 4, 11  # vectors a token and layer, see above
_LOGITS, _ROUNDED_LOGITS = 4, 2.5
_SPARE = 1.3  # of the activations: fitted to the one alignment that was measured
# Parts that may turn out smaller: they grow with texts and sequences, or are files' pages, which Linux can take back.
_AT_MOST = ("cache", "logits", "activations", "engine", "file", "checkpoint")
# Bytes a parameter in 8-bit integers, some features in 16 bits; and of the output matrix while it is rounded, last:
# measured 2.9 GB at most and 2.2 GB then (1.5B), 1.5 and 1.1 GB (0.5B), program and tokenizer with them
_INT8, _INT8_READ = 1.15, 3
_WIDENED = 1 << 26  # values: see `frozen_weights`
_UBATCH, _CTX_STEP, _WATCHED, _WATCHED_PAIRS = 512, 256, 128, 4
_CACHE_ROWS = 5  # of `packed_generate`: four in which sequences are written, and the prefixes
_ROOM = 0.6  # of the memory: a training that needs more computes layers twice
_LONGEST_ROW, _FAR = 1024, 1 << 20  # tokens; a longer row is not trained on: `SftSettings`
_CHARACTERS = 3.5  # a token, of English


@dataclass(frozen=True)
class Tokens:
    """The longest prompt with its answer, of the teacher and of the student; and a pair, which has two answers.

    Of the teacher's prompts `draft` is the longest that others need not begin with. Of the rows that a student is tuned
    on `instruction` is what they share, computed once a step, and `row` the rest.
    """

    teacher: int
    draft: int
    student: int
    pair: int
    instruction: int
    row: int

    @classmethod
    def most(cls, config: RunConfig, task: Task) -> Tokens:
        """Return what the task's examples and the settings allow, counted in characters of English."""
        examples = [*task.seed, *task.validation]
        lengths = sorted((len(each.input) + len(each.target) for each in examples), reverse=True)
        about = len(task.description)
        elicit, written = config.elicit, longest_answer(config)

        def prompt(shown: int) -> int:
            return int((about + sum(lengths[: shown + 1])) / _CHARACTERS)

        drafts = prompt(max(config.teacher.shots, elicit.shown))
        votes = prompt(elicit.opinion_shots if task.answer.closed else 0)
        asked = prompt(max(config.student.shots, *config.calibrate.shots, *config.evaluate.shots))
        answer = config.evaluate.answer_tokens
        shared = int(about / _CHARACTERS)
        return cls(
            max(drafts + written, votes),
            drafts + written,
            asked + answer,
            min(drafts + written, config.align.max_length or _FAR) + written,
            shared,
            min(prompt(0) - shared + answer, _LONGEST_ROW),
        )


def longest_answer(config: RunConfig) -> int:
    """Return the most tokens that the teacher may write to a prompt."""
    return max(config.elicit.question_tokens, config.elicit.rationale_tokens)


@dataclass(frozen=True)
class Need:
    """What one stage needs, in bytes, by part."""

    stage: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def least(self) -> int:
        """Return the bytes without the parts that may turn out smaller."""
        return sum(n for part, n in self.parts.items() if not part.endswith(_AT_MOST))

    def as_row(self) -> dict[str, Any]:
        return {"stage": self.stage, "bytes": self.total, "parts": dict(self.parts)}


@dataclass(frozen=True)
class MemoryPlan:
    """What all stages need, and what there is."""

    needs: tuple[Need, ...]
    total_bytes: int
    available_bytes: int

    @property
    def most(self) -> Need:
        return max(self.needs, key=lambda need: need.total)

    @property
    def fits(self) -> bool:
        return self.most.total <= self.total_bytes or not self.total_bytes  # 0: unknown

    @property
    def impossible(self) -> Need | None:
        """Return the stage whose weights alone are more than the memory: texts may be shorter than they might be."""
        need = max(self.needs, key=lambda need: need.least)
        return need if 0 < self.total_bytes < need.least else None

    def __str__(self) -> str:
        return (
            f"{megabytes(self.most.total)} at most, in {self.most.stage}; {megabytes(self.available_bytes)} of "
            f"{megabytes(self.total_bytes)} are free"
        )

    def as_row(self) -> dict[str, Any]:
        found = {"total_bytes": self.total_bytes, "available_bytes": self.available_bytes}
        return found | {"most": self.most.as_row(), "stages": [need.as_row() for need in self.needs]}


@dataclass(frozen=True)
class Models:
    """The models of a run by shape. A teacher without weights here is None; `kind` is its engine."""

    teacher: ModelSize | None
    student: ModelSize
    kind: Kind = "auto"
    converted: frozenset[str] = frozenset()  # names of those whose checkpoint is made already
    bfloat16: bool = False  # whether the processor multiplies it: a frozen teacher then stays in 16 bits


def models_of(run: RunContext) -> Models | None:
    """Return the models of a run whose memory is this machine's; None: a cluster or a GPU holds them."""
    from arte_edge.runtimes.transformers.placement import multiplies_bfloat16, pick_device

    if run.cluster is not None or pick_device().type != "cpu":
        return None
    local = {"student": run.local(run.config.student)}
    if not is_server(run.config.teacher.model):
        local["teacher"] = run.local(run.config.teacher)
    sizes = {who: ModelSize.of(model.path) for who, model in local.items()}
    made = {sizes[who].name for who, model in local.items() if checkpoint_folder(model.name, model.sha256).is_dir()}
    kind = teacher_kind(local["teacher"], run.config.teacher.engine) if "teacher" in local else "auto"
    return Models(sizes.get("teacher"), sizes["student"], kind, frozenset(made), multiplies_bfloat16())


def memory_plan(config: RunConfig, tokens: Tokens, models: Models, room: int | None = None) -> MemoryPlan:
    """Return the plan of a run. `room`: the memory, if not this machine's."""
    total = total_bytes() if room is None else room
    free = min(available_bytes(), total)
    return MemoryPlan(tuple(_needs(config, tokens, models, total)), total, free)


def refuse_too_large(config: RunConfig, tokens: Tokens, models: Models) -> MemoryPlan:
    """Return the plan. Raises InputError: it cannot fit; names the stage, what it needs, and what would fit."""
    plan = memory_plan(config, tokens, models)
    if (need := plan.impossible) is None:
        return plan
    parts = ", ".join(f"{name} {megabytes(size)}" for name, size in need.parts.items() if size)
    fits = would_fit(config, tokens, models)
    raise InputError(
        f"{need.stage} needs {megabytes(need.total)} of memory, there are {megabytes(plan.total_bytes)} ({parts})",
        f"This would fit: {'; '.join(fits)}." if fits else "Take smaller models, or a larger machine.",
    )


def would_fit(config: RunConfig, tokens: Tokens, models: Models) -> list[str]:
    """Return what a user could change so that the run fits into this machine's memory, each alone."""
    return [
        text
        for text, other, teacher in _alternatives(config, models.teacher, models.kind)
        if memory_plan(other, tokens, replace(models, teacher=teacher)).fits
    ]


def _alternatives(
    config: RunConfig, teacher: ModelSize | None, kind: Kind
) -> Iterator[tuple[str, RunConfig, ModelSize | None]]:
    """Yield what a user could change, with the run and the teacher that it makes."""

    def changed(**tables: Any) -> RunConfig:
        made = {
            key: getattr(config, key).model_copy(update=value) if isinstance(value, dict) else value
            for key, value in tables.items()
        }
        return config.model_copy(update=made)

    lora, few = {"method": "lora"}, {"batch_size": 1}
    if config.tune.method == "full":
        yield 'tune.method = "lora"', changed(tune=lora), teacher
    if config.tune.batch_size > 1:
        yield "tune.batch_size = 1", changed(tune=few), teacher
    if teacher is None:
        return
    for n in (16, 8, 4, 1):
        if n < config.teacher.parallel and kind in ("auto", "llamacpp"):  # others batch by themselves
            yield f"teacher.parallel = {n}", changed(teacher={"parallel": n}), teacher
    if config.aligned:
        yield 'data = "original-teacher", without an alignment', changed(data="original-teacher"), teacher
        yield 'a teacher on a server and data = "original-teacher"', changed(data="original-teacher"), None
    for part in (0.75, 0.5, 0.33, 0.25, 0.1):
        text = f"a teacher of {part * teacher.n_params / 1e9:.1f}B parameters or less"
        yield text, config, _scaled(teacher, part)


def _scaled(size: ModelSize, part: float) -> ModelSize:
    """Return the shape of a model with a part of the layers."""
    return replace(
        size,
        name="the smaller teacher",
        n_layer=max(1, int(part * size.n_layer)),
        n_params=int(part * size.n_params),
        weight_bytes=int(part * size.weight_bytes),
        kv_values=int(part * size.kv_values),
        token_bytes_by_type={kind: int(part * n) for kind, n in size.token_bytes_by_type.items()},
    )


def _needs(config: RunConfig, tokens: Tokens, models: Models, room: int) -> Iterator[Need]:
    teacher, student = models.teacher, models.student
    writer = None if config.teacher.addresses else teacher
    for size, aligned in ((teacher, config.aligned), (student, True)):
        if size is not None and aligned and size.format == "gguf" and size.name not in models.converted:
            yield Need(f"the conversion of {size.name}", conversion_bytes(size))
    open_student = engine_bytes(student, config.student.parallel, tokens.student, held=True)
    open_teacher = (
        engine_bytes(writer, config.teacher.parallel, tokens.teacher, own=tokens.draft, kind=models.kind)
        if writer
        else {}
    )
    parts = {f"teacher's {key}": n for key, n in open_teacher.items()}
    yield Need(
        "drafts and scores", parts | {f"student's {key}": n for key, n in open_student.items()} | {"program": _TRAINER}
    )
    if teacher is not None and config.aligned:
        need = training_bytes(
            teacher,
            at_once=tokens.pair,
            labelled=2 * longest_answer(config),
            lora=(config.align.lora_rank, config.align.lora_targets),
            pairs=True,
            four_bits=config.align.weights == "nf4",
            bfloat16=models.bfloat16,
            room=room,
        )
        yield _trained("align", need, config)
        if writer:  # between two steps
            probe = engine_bytes(writer, config.align.probe_prompts, tokens.draft, kind=models.kind)
            base = {key: need[key] for key in ("weights", "adapter", "program")}
            mapped = models.bfloat16 or keeps_16_bits(teacher.n_params, room)
            if mapped and _is_bfloat16(teacher) and config.align.weights != "nf4":
                base["weights"] = need["weights"] * (config.train.processes - 1)
            watched = _F32 * _WATCHED * _WATCHED_PAIRS * teacher.n_vocab
            yield Need("the checks of align", base | {"logits": watched, "engine": sum(probe.values())})
    need = training_bytes(
        student,
        at_once=tokens.instruction + -(-config.tune.batch_size // config.train.processes) * tokens.row,
        labelled=config.tune.batch_size * config.elicit.rationale_tokens,
        lora=(config.tune.lora_rank, ()) if config.tune.method == "lora" else None,
        bfloat16=models.bfloat16,
        room=room,
    )
    yield _trained("tune", need, config)


def _trained(stage: str, need: Mapping[str, int], config: RunConfig) -> Need:
    return Need(stage, {key: n * config.train.processes for key, n in need.items()})


def conversion_bytes(size: ModelSize) -> dict[str, int]:
    """Return what converting a GGUF file takes: of its matrices the largest is unpacked last."""
    largest = _F32 * size.n_vocab * size.n_embd
    parts = {"checkpoint": _HELD * size.n_params, "largest matrix": largest}
    return parts | {"file": size.weight_bytes, "program": _PROGRAM}


def engine_bytes(
    size: ModelSize, parallel: int, tokens: int, *, own: int = 0, kind: Kind = "auto", held: bool = False
) -> dict[str, int]:
    """Return what an open model takes that decodes `parallel` sequences of `tokens` tokens; `held`: from 16 bits.

    The longest sequences may share all but `own` tokens, which transformers then keeps once a row of its cache.
    """
    if size.format != "gguf" or kind in ("transformers", "int8"):
        cells = parallel * (own or tokens) + _CACHE_ROWS * tokens
        head = size.n_vocab * size.n_embd  # packed, beside an embedding that may be the same matrix
        weights, cache = _F32 * (size.n_params + head), 2 * size.kv_bytes(cells)  # in float32
        parts = {"checkpoint": _HELD * size.n_params}  # mapped while it is read
        if kind == "int8":  # while it is read there is no cache yet
            weights, cache = int(_INT8 * size.n_params) + head, max(cache, _INT8_READ * head)
            if not _is_bfloat16(size):  # read, not mapped
                weights = max(weights, _HELD * size.n_params)
            parts = {}
        return {"weights": weights, "cache": cache} | parts
    facts = detect()
    repacked = repacked_types(facts.arch, facts.features)
    copies = 0 if held else sum(size.token_bytes_by_type.get(kind, 0) for kind in repacked)
    cells, n_seq = -(-tokens // _CTX_STEP) * _CTX_STEP, parallel + MAX_LEVELS
    heads = max(1, size.n_embd // max(1, size.head_dim))
    batch = 2 * _UBATCH * (max(4 * size.n_embd, size.n_ff) + cells * heads)  # activations, attention scores
    return {
        "weights": (_F32 if widens(size.n_params) else _HELD) * size.n_params if held else size.weight_bytes,
        "repacked copy": copies,
        "cache": size.kv_bytes(n_seq * cells) + _F32 * (n_seq * size.n_vocab + batch),
    }


def _is_bfloat16(size: ModelSize) -> bool:
    """Return whether the checkpoint of a model is bfloat16: it is mapped then, and pages can be given back."""
    return size.quantization == "BF16" or (size.format == "gguf" and size.quantization not in ("F16", "F32"))


def activation_bytes(size: ModelSize, tokens: int, wide: int = _WIDE, *, twice: bool = False) -> int:
    """Return the activations of a forward pass; if layers are computed `twice`, of one, and what goes into each."""
    layer = int(_SPARE * _F32 * tokens * (_NARROW * size.n_embd + wide * size.n_ff))
    return layer + size.n_layer * _F32 * tokens * size.n_embd if twice else size.n_layer * layer


def training_bytes(
    size: ModelSize,
    *,
    at_once: int,
    labelled: int,
    lora: tuple[int, tuple[str, ...]] | None,
    pairs: bool = False,
    four_bits: bool = False,
    bfloat16: bool = False,
    room: int = 0,
) -> dict[str, int]:
    """Return what a training takes, by part.

    Args:
        at_once: tokens in one forward pass; `labelled`: of them those that a loss is computed on.
        lora: rank, and the layers of a block that it adapts, empty: all seven; None: all weights are trained.
        pairs: DPO, whose divergence from the original is measured on watched pairs.
        bfloat16: the processor multiplies it.
        room: the memory of the machine, which decides whether layers are computed twice; 0: they are not.
    """
    if lora is None:
        # The tied matrix has two gradients until they are added.
        fixed = {"weights and optimizer": _TRAINED * size.n_params + _F32 * size.n_vocab * size.n_embd}
    else:
        sides = size.n_layer * (4 * 2 * size.n_embd + 3 * (size.n_embd + size.n_ff))
        share = len(lora[1]) / 7 if lora[1] else 1.0
        widened = min(_WIDENED, size.n_vocab * size.n_embd)
        held = _HELD * size.n_params if size.format == "gguf" else size.weight_bytes
        if not bfloat16 and not keeps_16_bits(size.n_params, room):
            held = _F32 * size.n_params
        if four_bits:  # of all but the embedding
            held = int(NF4 * size.n_params) + _F32 * size.n_vocab * size.n_embd
        fixed = {"weights": held + _F32 * widened}
        fixed["adapter"] = int(_TRAINED * lora[0] * sides * share)
    rows = labelled + (_WATCHED * _WATCHED_PAIRS // _LOGITS if pairs else 0)
    copies = _ROUNDED_LOGITS if pairs and bfloat16 else _LOGITS
    fixed |= {"logits": int(copies * _F32 * rows * size.n_vocab), "program": _TRAINER}
    # A frozen layer without an adapter does not need what goes into it.
    wide = _WIDE - bool(lora and lora[1] and "down_proj" not in lora[1])
    kept = activation_bytes(size, at_once, wide)
    if room and sum(fixed.values()) + kept > _ROOM * room:
        return fixed | {"activations": activation_bytes(size, at_once, wide, twice=True)}
    return fixed | {"activations": kept}


def keeps_16_bits(n_params: int, room: int = 0) -> bool:
    """Return whether a frozen teacher stays in 16 bits on a CPU that computes in float32; `room`: the memory, bytes.

    Widening every layer for each product costs 40 % of a step (0.5B, 150 tokens) and changes no number: it is done
    where the weights in float32 would be more than a third of the memory.
    """
    return 3 * _F32 * n_params > (room or total_bytes())


def computes_twice(
    size: ModelSize,
    at_once: int,
    labelled: int,
    lora: tuple[int, tuple[str, ...]] | None,
    pairs: bool,
    bfloat16: bool = False,
) -> bool:
    """Return whether a training in this process computes layers twice to fit: see `training_bytes`."""
    found, kept = (
        training_bytes(size, at_once=at_once, labelled=labelled, lora=lora, pairs=pairs, bfloat16=bfloat16, room=room)
        for room in (total_bytes(), 0)
    )
    return found["activations"] < kept["activations"]
