"""A transformers checkpoint, opened for conversion: its family, its settings in one form, its tensors unread.

config.json has been written in several ways: rotary settings flat, nested or by kind of layer, a head's width
given or implied, defaults left out. Here they become one flat table that the family files can name keys of,
and settings that llama.cpp computes differently from transformers are rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge.checkpoint import Weight, read_config, read_weights
from arte_edge.errors import InputError
from arte_edge.gguf.names import Family, Layout, family_of_model_type

__all__ = ["OTHER_CONVERTER", "Checkpoint", "open_checkpoint"]

OTHER_CONVERTER = "For other models give your own checkout of llama.cpp with --llama-cpp DIR."
_EMBEDDING = "model.embed_tokens.weight"
_OUTPUT = "lm_head.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose family and settings are known. `config` has `rope`, the rotary scaling, beside the rest."""

    folder: Path
    family: Family
    config: dict[str, Any]
    weights: dict[str, Weight]

    @property
    def layout(self) -> Layout:
        """Head counts and names, for laying the tensors out."""
        config = self.config
        return Layout(
            self.family.arch,
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config["num_key_value_heads"],
        )

    @property
    def n_vocab(self) -> int:
        """Rows of the embedding: how many tokens the GGUF must list."""
        return self.weights[_EMBEDDING].shape[0]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and check config.json and the tables of the weights in `folder`.

    Raises:
        InputError: not a checkpoint, a family we do not know, a setting that llama.cpp does not
            have for this family, quantized weights, or tensors that do not fit the settings.
    """
    raw = read_config(folder)
    where = str(folder / "config.json")
    try:
        family = family_of_model_type(raw.get("model_type"), where)
    except InputError as error:
        raise InputError(error.message, f"{error.hint} {OTHER_CONVERTER}") from None
    if raw.get("quantization_config"):
        raise InputError(
            f"{folder}: its weights are quantized already",
            "Give the 16-bit checkpoint that it was made from.",
        )
    config = _flat(raw, family, where)
    _check_settings(config, family, where)
    weights = _without_tied_output(folder, config, read_weights(folder))
    return Checkpoint(folder, family, config, weights)


def _flat(raw: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Return the settings under the names that family files use."""
    config = family.defaults | {key: value for key, value in raw.items() if value is not None}
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    local = rope.get("sliding_attention") or {}
    rope = dict(rope.get("full_attention") or rope)
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] == "su":  # what longrope was called first
        rope["rope_type"] = "longrope"
    config["rope"] = rope
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if key in rope:
            config[key] = rope[key]
    if theta := local.get("rope_theta") or raw.get("rope_local_base_freq"):
        config["rope_theta_local"] = theta
    try:
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
        config["hidden_per_head"] = config["hidden_size"] // config["num_attention_heads"]
        if "head_dim?" not in family.uint32.values():
            config.setdefault("head_dim", config["hidden_per_head"])
        share = config.get("partial_rotary_factor", 1.0)
        config["rotary_dim"] = int(share * config["hidden_size"]) // config["num_attention_heads"]
        config["num_hidden_layers"] = int(config["num_hidden_layers"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: {error} is missing or no number", "Give a whole checkpoint.") from error
    return config


def _check_settings(config: dict[str, Any], family: Family, where: str) -> None:
    """Raise for a setting with which llama.cpp and transformers compute different results."""

    def rejected(key: str, value: object, allowed: object) -> InputError:
        return InputError(
            f"{where}: {key} is {value!r}; llama.cpp computes {family.title} with {allowed} only",
            "The file would load and answer wrongly. Use this model through another runtime.",
        )

    for key, values in family.must.items():
        if key in config and config[key] not in values:
            raise rejected(key, config[key], " or ".join(map(repr, values)))
    for key, others in family.same.items():
        if key in config and all(config[key] != config.get(other) for other in others):
            raise rejected(key, config[key], f"the value of {' or '.join(others)}")
    for key, pattern in family.patterns.items():
        expected = pattern.expected(config["num_hidden_layers"])
        if key in config and list(config[key])[: len(expected)] != expected:
            raise rejected(key, config[key], f"{pattern.value!r} at every {pattern.every}th layer")
    if config["rope"]["rope_type"] not in family.rope_types:
        raise rejected("rope_type", config["rope"]["rope_type"], " or ".join(family.rope_types))


def _without_tied_output(
    folder: Path, config: dict[str, Any], weights: dict[str, Weight]
) -> dict[str, Weight]:
    """Return the weights less an output matrix that the model ties to its embedding and so never reads."""
    if _EMBEDDING not in weights:
        raise InputError(f"{folder}: {_EMBEDDING} is missing", "Give a whole checkpoint of a language model.")
    rows = weights[_EMBEDDING].shape[0]
    if config.get("vocab_size", rows) != rows:
        raise InputError(
            f"{folder}: vocab_size is {config['vocab_size']}, but the embedding has {rows} rows",
            "Save model and config together: model.save_pretrained(…).",
        )
    config["vocab_size"] = rows
    if config.get("tie_word_embeddings", _OUTPUT not in weights):
        return {name: weight for name, weight in weights.items() if name != _OUTPUT}
    if _OUTPUT not in weights:
        raise InputError(
            f"{folder}: {_OUTPUT} is missing and tie_word_embeddings is false", "Give a whole checkpoint."
        )
    return weights
