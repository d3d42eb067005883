"""The one list of names of other packages that are private or undocumented, and what is done without them.

A new version may move or change such a name without notice. So `pyproject.toml` bounds the packages, a test
checks every row against the installed versions, and a module that uses such names calls `missing` first and
takes the plain path where one is gone. A private name that is not listed here fails a test.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class PrivateName:
    """One name of another package.

    Attributes:
        module: where the name is imported from.
        name: dotted, inside `module`.
        used_in: the module of ours that uses it.
        without: what happens where the name is missing.
        parameters: those that we pass, separated by spaces: of a function, or of a class's constructor.
    """

    module: str
    name: str
    used_in: str
    without: str
    parameters: str = ""


_PACK = "arte_edge.runtimes.transformers.onednn_prepack"
_INT8 = "arte_edge.runtimes.transformers.onednn_int8"
_ROWS = "arte_edge.runtimes.transformers.packed_kv_cache"
_HEAD = "arte_edge.distill.train.completion_head"
_SLIM = "arte_edge.onnx.simplify"
_PLAIN_LINEAR = "ordinary Linear layers"
_NO_INT8 = "llama.cpp, or ordinary Linear layers"
_PLAIN_CACHE = "the library's own cache, one sequence a row"
_PLAIN_HEAD = "TRL's own scoring of all tokens"
_NO_TRAINING = "an error before training: TRL would tokenize the ids again"
_AS_EXPORTED = "the exported graph stays as it is"

_MKLDNN, _SDPA = "ops.mkldnn.", "transformers.integrations.sdpa_attention"
_SHAPES = "onnxruntime.tools.symbolic_shape_infer"

PRIVATE_NAMES = (
    PrivateName("torch", f"{_MKLDNN}_is_mkldnn_bf16_supported", _PACK, _PLAIN_LINEAR),
    PrivateName("torch", f"{_MKLDNN}_reorder_linear_weight", _PACK, _PLAIN_LINEAR, "self batch_size"),
    PrivateName("torch", f"{_MKLDNN}_linear_pointwise", _PACK, _PLAIN_LINEAR, "X W B attr scalars algorithm"),
    PrivateName("torch", "ops.onednn.qlinear_prepack", _INT8, _NO_INT8, "weight x_shape"),
    PrivateName(
        "torch",
        "ops.onednn.qlinear_pointwise",
        _INT8,
        _NO_INT8,
        "qx x_scale x_zero_point qw w_scale w_zero_point bias output_scale output_zero_point output_dtype",
    ),
    PrivateName("transformers", "PreTrainedConfig._attn_implementation", _ROWS, _PLAIN_CACHE),
    PrivateName("transformers", "DynamicCache.update", _ROWS, _PLAIN_CACHE, "key_states value_states layer_idx"),
    PrivateName(_SDPA, "sdpa_attention_forward", _ROWS, _PLAIN_CACHE, "module query key value attention_mask scaling"),
    PrivateName("transformers.masking_utils", "AttentionMaskInterface.register", _ROWS, _PLAIN_CACHE),
    PrivateName("transformers.masking_utils", "sdpa_mask", _ROWS, _PLAIN_CACHE),
    PrivateName(
        "trl.trainer.utils",
        "FusedCausalLMOutput",
        _HEAD,
        _PLAIN_HEAD,
        "loss log_probs entropy mean_logits is_top1 label_mask",
    ),
    PrivateName("transformers", "PreTrainedConfig._attn_implementation", _HEAD, _PLAIN_HEAD),
    PrivateName("trl", "DPOTrainer._prepare_dataset", "arte_edge.distill.train.dpo", _NO_TRAINING, "dataset"),
    PrivateName(
        "ray._private.worker",
        "print_to_stdstream",
        "arte_edge.cluster.connect",
        "Ray writes its messages to stdout, among the data",
        "data ignore_prefix",
    ),
    PrivateName(_SHAPES, "SymbolicShapeInference._preprocess", _SLIM, _AS_EXPORTED, "in_mp"),
    PrivateName(_SHAPES, "SymbolicShapeInference._infer_impl", _SLIM, _AS_EXPORTED),
    PrivateName(_SHAPES, "get_shape_from_value_info", _SLIM, _AS_EXPORTED),
)


@cache
def missing(used_in: str) -> tuple[str, ...]:
    """Return what is wrong with the names that a module of ours uses; empty where its fast path can be taken."""
    rows = [row for row in PRIVATE_NAMES if row.used_in == used_in]
    if not rows:
        raise ValueError(f"{used_in} uses no listed name")
    return tuple(text for row in rows if (text := problem(row)))


def problem(row: PrivateName) -> str:
    """Return a sentence if the installed version lacks the name or one of its parameters, else ""."""
    try:
        found: Any = importlib.import_module(row.module)
        for part in row.name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return f"{row.module} has no {row.name} any more"
    lost = [name for name in row.parameters.split() if name not in _parameters(found)]
    return f"{row.module}: {row.name} has no parameter {', '.join(lost)} any more" if lost else ""


def _parameters(found: Any) -> list[str]:
    if hasattr(found, "overloads"):  # an operator of torch
        return [argument.name for argument in found.default._schema.arguments]
    return list(inspect.signature(found).parameters)
