"""``arte-edge distill --dry-run --gpus 8xA100-80GB``: hours, memory and money of a run on GPUs, from formulas.

Nothing is loaded: sizes come from ``config.json``, lengths of prompts from the tokenizer, calls from the stages' rules
(`estimate`). Rates are those of vLLM with each model replicated as often as it fits.

* Reading a prompt takes ``2 N`` floating-point operations a token for N parameters (Kaplan et al. 2020, arXiv
  2001.08361), at `_PREFILL_SHARE` of the GPU's peak in 16 bits. Measured with vLLM 0.11.0 on one A100-80GB: 2,521
  tokens/s of Qwen3-32B are 53 %, 5,967 of Qwen3-14B 57 % (prompts of 2,000 tokens; GPUStack's performance lab).
* Decoding a token for a batch reads all weights and the batch's keys and values once, at `_BANDWIDTH_SHARE` of the
  memory's bandwidth (measured: 77 % for Llama-3.1-8B on an A100-40GB with vLLM 0.23.0, johnmusgrave.com), and computes
  as above; both times are added. docs/cluster.md compares the sum with measurements of batches.
* Training takes ``6 N`` operations a token; with LoRA the frozen weights need no gradient (``4 N``), and DPO's
  reference another ``2 N``. `_TRAINING_SHARE` of the peak: the lowest of the 1B and 3B models with 512 to 2,048 tokens
  on eight H100 in MosaicML's benchmarks of llm-foundry. They pack sequences, TRL pads short ones: a run is slower.
* Memory of training: 16 bytes a parameter that is trained (weights, gradient and two moments of Adam in 32 bits; cf.
  Rajbhandari et al. 2020, arXiv 1910.02054), 4 more for the gradient buckets of several processes, 2 a frozen one.
  Activations without checkpointing: ``34 s b h`` bytes a layer for s b tokens of width h in 16 bits (Korthikanti et
  al. 2022, arXiv 2205.05198, without the attention matrix, which the kernels do not store), and the logits twice in
  32 bits. Where no server does, the checks of an alignment hold a second copy of the teacher on the first GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from arte_edge import transformers_load as hf
from arte_edge.cache import is_offline
from arte_edge.console import out
from arte_edge.device.model_size import ModelSize
from arte_edge.errors import InputError, nearest
from arte_edge.files import user_path
from arte_edge.models.resolve import LocalModel
from arte_edge.runtimes.completion import Completion, EngineIdentity, Request, Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

_PREFILL_SHARE = 0.53
_BANDWIDTH_SHARE = 0.77
_TRAINING_SHARE = 0.42
_USED = 0.9  # of the memory: vLLM's gpu_memory_utilization; trainings leave as much
_WEIGHT = 2  # bytes, 16 bits
NF4 = 0.516  # bytes, with quantized scales of blocks of 64: QLoRA, arXiv 2305.14314, section 3
_TRAINED, _BUCKETS, _ACTIVATION, _LOGITS = 16, 4, 34, 8  # bytes, see above
_GB = 1e9


@dataclass(frozen=True)
class _Kind:
    """NVIDIA's data sheets: dense 16-bit operations and memory bandwidth a second."""

    memory_gb: float
    peak_tflops: float
    bandwidth_gb_per_s: float


_KINDS = {
    "A100-40GB": _Kind(40, 312, 1555),
    "A100-80GB": _Kind(80, 312, 2039),
    "L40S": _Kind(48, 362, 864),
    "H100-80GB": _Kind(80, 989, 3350),
    "H200": _Kind(141, 989, 4800),
    "B200": _Kind(180, 2250, 8000),
}


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a plan, all of one kind, and what one costs for an hour (None: not stated)."""

    n: int
    kind: str
    usd_per_hour: float | None = None

    @classmethod
    def parse(cls, text: str, usd_per_hour: float | None = None) -> Gpus:
        """Read ``8xA100-80GB``. Raises InputError: not of this form, or an unknown kind."""
        found = re.fullmatch(r"(\d{1,5})x([\w-]+)", text.strip())
        if not found or not int(found[1]):
            raise InputError(f"--gpus {text}: not of the form NxKIND", "For example: --gpus 8xA100-80GB.")
        kind = next((name for name in _KINDS if name.lower() == found[2].lower()), "")
        if not kind:
            raise InputError(f"--gpus {text}: unknown kind '{found[2]}'", nearest(found[2], _KINDS))
        if usd_per_hour is not None and not 0 <= usd_per_hour < float("inf"):
            raise InputError(f"--gpu-price {usd_per_hour}: not a price", "Dollars an hour for one GPU.")
        return cls(int(found[1]), kind, usd_per_hour)

    @property
    def facts(self) -> _Kind:
        return _KINDS[self.kind]

    @property
    def room_gb(self) -> float:
        """What models and trainings may take of one GPU."""
        return _USED * self.facts.memory_gb

    def usd(self, hours: float) -> float | None:
        """Return what all GPUs cost for so many hours."""
        return None if self.usd_per_hour is None else hours * self.n * self.usd_per_hour


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide its memory and speed."""

    name: str
    n_param: int
    n_layer: int
    width: int
    n_vocab: int
    kv_bytes_per_token: int  # keys and values of one token in 16 bits
    linear_sides: int  # inputs and outputs of all linear layers: times its rank, the parameters of a LoRA adapter

    @classmethod
    def of(cls, ref: str) -> Shape:
        """Return the shape of a checkpoint folder or a Hub model, of which only ``config.json`` is needed.

        Raises InputError: there is none, or transformers does not know the family.
        """
        import torch
        from transformers import AutoModelForCausalLM

        config = _loaded(ref, "AutoConfig")
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError) as error:
            raise InputError(f"{ref}: {error}", "A plan needs a text model that transformers knows.") from error
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            ref,
            sum(weight.numel() for weight in model.parameters()),
            text.num_hidden_layers,
            text.hidden_size,
            text.vocab_size,
            2 * text.num_hidden_layers * heads * dim * _WEIGHT,
            sum(
                module.in_features + module.out_features
                for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
            ),
        )

    @classmethod
    def of_file(cls, model: LocalModel) -> Shape:
        """Return the shape of a model on disk, whose weights count as unpacked to 16 bits."""
        size = ModelSize.of(model.path)
        sides = size.n_layer * (4 * 2 * size.n_embd + 3 * (size.n_embd + size.n_ff))
        kv = size.kv_values * _WEIGHT
        return cls(model.name, size.n_params, size.n_layer, size.n_embd, size.n_vocab, kv, sides)


@dataclass(frozen=True)
class Placement:
    """How one model answers calls on the GPUs: `replicas` of it, each on `gpus_each`, and their rates together."""

    shape: Shape
    gpus_each: int
    replicas: int
    parallel: int  # sequences that a replica decodes together
    weights_gb: float  # a GPU
    kv_gb: float  # a GPU
    prefill_tokens_per_s: float
    decode_tokens_per_s: float

    @property
    def memory_gb(self) -> float:
        return self.weights_gb + self.kv_gb


def place(shape: Shape, gpus: Gpus, parallel: int, tokens: float) -> Placement:
    """Return how a model is spread: over as few GPUs as hold its weights and `parallel` sequences of `tokens` tokens.

    Raises InputError: all GPUs together do not hold them.
    """
    weights, kv = _WEIGHT * shape.n_param, parallel * tokens * shape.kv_bytes_per_token
    room, each = gpus.room_gb * _GB, 1
    while weights + kv > each * room:
        each *= 2
    if each > gpus.n:
        raise InputError(
            f"{shape.name}: weights of {weights / _GB:.0f} GB and {kv / _GB:.0f} GB of keys and values do not fit into "
            f"{gpus.n} × {gpus.kind} at {_USED:.0%}",
            "Take more GPUs, a smaller model, or a lower teacher.parallel.",
        )
    replicas = gpus.n // each
    flops = each * gpus.facts.peak_tflops * 1e12 * _PREFILL_SHARE / (2 * shape.n_param)
    bandwidth = each * gpus.facts.bandwidth_gb_per_s * _GB * _BANDWIDTH_SHARE
    step_s = (weights + kv) / bandwidth + parallel / flops
    return Placement(
        shape,
        each,
        replicas,
        parallel,
        weights / each / _GB,
        kv / each / _GB,
        replicas * flops,
        replicas * parallel / step_s,
    )


def call_hours(placed: Placement, prompt_tokens: float, completion_tokens: float) -> float:
    """Return the hours of some calls; a prompt's shared beginning counts each time."""
    seconds = prompt_tokens / placed.prefill_tokens_per_s + completion_tokens / placed.decode_tokens_per_s
    return seconds / 3600


@dataclass(frozen=True)
class Training:
    """What a training needs in GB on each of `processes` GPUs, at most, and how long it takes."""

    stage: str
    model: str
    processes: int
    tokens: float  # of all steps
    weights_gb: float
    optimizer_gb: float  # gradient, moments, buckets
    activations_gb: float
    hours: float

    @property
    def memory_gb(self) -> float:
        return self.weights_gb + self.optimizer_gb + self.activations_gb

    def as_row(self) -> dict[str, Any]:
        return {**asdict(self), "memory_gb": self.memory_gb}


def training(
    stage: str,
    shape: Shape,
    gpus: Gpus,
    processes: int,
    *,
    tokens: float,
    at_once: float,
    lora_rank: int | None,
    reference: bool = False,
    spread: bool = False,
    probed: bool = False,
    four_bits: bool = False,
) -> Training:
    """Return what a training takes.

    Args:
        tokens: of all its steps.
        at_once: tokens in one forward pass of one process.
        lora_rank: of an adapter on every linear layer; None: all weights are trained.
        reference: a second forward pass without the adapter, as in DPO.
        spread: each process holds a part of the weights (FSDP), two layers whole, and of the activations only what
            goes into a layer: each is computed twice.
        probed: checks hold a second copy of the weights on the first GPU.
        four_bits: the frozen weights are held in NF4.
    """
    full = lora_rank is None
    trained = shape.n_param if lora_rank is None else lora_rank * shape.linear_sides
    frozen = 0 if full else shape.n_param
    per_token = (6 if full else 4) + 2 * reference + 2 * spread
    rate = processes * gpus.facts.peak_tflops * 1e12 * _TRAINING_SHARE
    parts = processes if spread else 1
    buckets = _BUCKETS if processes > parts else 0
    gathered = 2 * _WEIGHT * shape.n_param / shape.n_layer if spread else 0
    layers = _WEIGHT * shape.n_layer + _ACTIVATION if spread else _ACTIVATION * shape.n_layer
    held = layers * shape.width + _LOGITS * shape.n_vocab
    return Training(
        stage,
        shape.name,
        processes,
        tokens,
        ((4 * trained + (NF4 if four_bits else _WEIGHT) * frozen) / parts + gathered + probed * _WEIGHT * shape.n_param)
        / _GB,
        (_TRAINED - 4 + buckets) * trained / parts / _GB,
        held * at_once / _GB,
        per_token * shape.n_param * tokens / rate / 3600,
    )


@dataclass
class GpuPlan:
    """Hours of each stage (calls and training), where the models run, what a training needs."""

    gpus: Gpus
    call_hours: Mapping[str, float]
    placed: Mapping[str, Placement]
    trainings: list[Training]
    notes: list[str] = field(default_factory=list)

    def hours_of(self, stage: str) -> float:
        """Return the hours of a stage, or of all: ``total``."""
        calls = sum(hours for name, hours in self.call_hours.items() if stage in (name, "total"))
        return calls + sum(each.hours for each in self.trainings if stage in (each.stage, "total"))

    def usd_of(self, stage: str) -> float | None:
        usd = self.gpus.usd(self.hours_of(stage))
        return None if usd is None else round(usd, 2)

    def as_row(self) -> dict[str, Any]:
        return {
            "n": self.gpus.n,
            "kind": self.gpus.kind,
            "usd_per_hour": self.gpus.usd_per_hour,
            "models": {who: {**asdict(one), "memory_gb": one.memory_gb} for who, one in self.placed.items()},
            "trainings": [each.as_row() for each in self.trainings],
        }

    def print(self) -> None:
        """Print where the models run and what a training needs, on stdout."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, justify in (("GB a GPU", "left"), ("GPUs", "right"), ("weights", "right")):
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for name in ("optimizer", "cache or activations", "sum", "tokens/s read, written"):
            table.add_column(name, justify="right")
        for who, one in self.placed.items():
            rates = f"{one.prefill_tokens_per_s:,.0f}, {one.decode_tokens_per_s:,.0f}"
            numbers = (one.weights_gb, 0.0, one.kv_gb, one.memory_gb)
            table.add_row(who, f"{one.replicas} × {one.gpus_each}", *(f"{gb:.1f}" for gb in numbers), rates)
        for each in self.trainings:
            numbers = (each.weights_gb, each.optimizer_gb, each.activations_gb, each.memory_gb)
            table.add_row(each.stage, f"{each.processes} × 1", *(f"{gb:.1f}" for gb in numbers), "")
        out.print(table)


def takes_no_weights(ref: str) -> bool:
    """Return whether a plan reads only the configuration and the tokenizer of `ref`: a checkpoint, or on the Hub."""
    path = user_path(ref)
    return (path / "config.json").is_file() or ("/" in ref and not path.exists() and ":" not in ref)


class TokenizerOnly:
    """An engine that counts tokens and renders prompts; it has no weights and answers nothing."""

    supports_grammar = True

    def __init__(self, ref: str) -> None:
        from arte_edge.runtimes.transformers.tokenizer import Text

        path = user_path(ref)
        tokenizer = hf.load_tokenizer(path) if path.is_dir() else _loaded(ref, "AutoTokenizer")
        self._text = Text(tokenizer, None)
        self.identity = EngineIdentity("transformers", ref)
        self.chat_template: str | None = tokenizer.chat_template
        self.special_tokens = {"bos_token": self._text.bos, "eos_token": self._text.eos}

    def count_tokens(self, text: str) -> int:
        return len(self._text.tokens(text))

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        raise NotImplementedError("a plan makes no calls")

    def choose_each(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        raise NotImplementedError("a plan makes no calls")

    def close(self) -> None:
        return


def _loaded(ref: str, kind: str) -> Any:
    """Return transformers' configuration or tokenizer of a folder or a Hub model, without its weights."""
    import transformers

    path = user_path(ref)
    known: Mapping[str, Any] = {} if path.is_dir() else {"local_files_only": is_offline()}
    try:
        return getattr(transformers, kind).from_pretrained(str(path) if path.is_dir() else ref, **known)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{ref}: no configuration or tokenizer: {str(error).splitlines()[0]}",
            "A plan needs a Hub id, or a folder with config.json and the tokenizer; weights are not needed.",
        ) from error
