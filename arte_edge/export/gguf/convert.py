"""Turn a transformers checkpoint into a GGUF file, in this process, without torch.

The family's TOML says what its settings and rows become, GGML's `gguf` carries the
tensors' names, and the weights stream from file to file a few megabytes at a time,
so memory does not grow with the model. Numbers are those that llama.cpp's own
converter writes, bit for bit; see benchmarks/gguf_conversion.py and the tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from arte_edge.errors import InputError
from arte_edge.export.gguf.checkpoint import OTHER_CONVERTER, Checkpoint, open_checkpoint
from arte_edge.export.gguf.general import general_fields
from arte_edge.export.gguf.hparams import STRING, hyper_parameters, rope_tensors
from arte_edge.export.gguf.tokenizer_files import TokenizerFiles, read_tokenizer
from arte_edge.export.gguf.vocab import vocabulary
from arte_edge.extras import need
from arte_edge.models.gguf_fields import Field
from arte_edge.models.gguf_layout import weight_tensor
from arte_edge.models.gguf_write import FILE_TYPES, Tensor, write_gguf
from arte_edge.models.weights import Weight

__all__ = ["convert"]

_NONE: Mapping[str, Field] = {}
_NOT_WEIGHTS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
# The tensors that llama.cpp cannot do without, whatever the family
_NEEDED = ("token_embd.weight", "output_norm.weight")
_PHI3 = re.compile(rb"phi-?3", re.IGNORECASE)
_PHI3_TOKENS = {b"</s>", b"<unk>", b"<s>", b"<|endoftext|>"}
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


def convert(
    checkpoint: Path,
    out: Path,
    dtype: Literal["F16", "BF16", "F32"] = "F16",
    *,
    extra_fields: Mapping[str, Field] = _NONE,
) -> Path:
    """Write the model in the folder `checkpoint` to the GGUF file `out`; return `out`.

    Norms, biases and rotary factors stay F32, as llama.cpp wants them. The file appears whole or not at all.

    Args:
        dtype: what the matrices are kept in.
        extra_fields: metadata to add, over what the checkpoint says.

    Raises:
        InputError: no whole checkpoint with a tokenizer, a family or a tokenizer we do not know, or
            settings that llama.cpp does not have for the family; says which file and key.
        ArteError: a package is missing, the disk is full, or a weight does not fit `dtype`.
    """
    need("gguf", "Writing GGUF")
    if dtype not in FILE_TYPES:
        raise InputError(f"'{dtype}' is not a type to convert to", f"Choose from {', '.join(FILE_TYPES)}.")
    source = open_checkpoint(checkpoint)
    files = read_tokenizer(checkpoint, source.config)
    tensors = rope_tensors(source) + _tensors(source, dtype)
    fields = {
        **general_fields(source, tensors, dtype),
        **hyper_parameters(source),
        **vocabulary(files, source.family, source.n_vocab),
        **extra_fields,
    }
    _mend_name(fields, files)
    return write_gguf(out, source.family.arch, fields, tensors)


def _tensors(source: Checkpoint, dtype: str) -> list[Tensor]:
    """Return the tensors of the weights, block by block."""
    layout = source.layout
    named: dict[str, Weight] = {}
    for name, weight in source.weights.items():
        if name.endswith(_NOT_WEIGHTS):
            continue
        target = layout.gguf_name(name)
        if target is None:
            raise InputError(
                f"{weight.path}: {name} has no place in a {source.family.title} GGUF", OTHER_CONVERTER
            )
        named[target] = weight
    _check_whole(source, named)
    return [weight_tensor(layout, name, named[name], dtype) for name in sorted(named, key=_position)]


def _position(name: str) -> tuple[int, int, str]:
    """Sort key: the embedding, the blocks in order, the output."""
    if match := _BLOCK.fullmatch(name):
        return 1, int(match[1]), match[2]
    return (0 if name.startswith("token_embd") else 2), 0, name


def _check_whole(source: Checkpoint, named: dict[str, Weight]) -> None:
    """Raise for a tensor that is missing or does not fit the settings: the runtime would say less about it."""
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, weight in named.items():
        if match := _BLOCK.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = weight.shape
    first = layers.get(0, {})
    missing = [name for name in _NEEDED if name not in named]
    for layer in range(source.layout.n_layer):
        missing += [f"blk.{layer}.{part}" for part in first.keys() - layers.get(layer, {}).keys()]
    if missing or not first:
        raise InputError(
            f"{source.folder}: {sorted(missing)[0] if missing else 'blk.0'} is missing in the weights",
            "Give a whole checkpoint, with every shard.",
        )
    hidden, heads = source.config["hidden_size"], source.layout
    width = source.config.get("head_dim") or source.config["hidden_per_head"]
    expected = {"attn_q.weight": heads.n_head * width, "attn_k.weight": heads.n_head_kv * width}
    for layer, parts in sorted(layers.items()):
        for part, shape in parts.items():
            rows = expected.get(part, shape[0])
            if shape != first.get(part) or shape[0] != rows or (part in expected and shape[1] != hidden):
                raise InputError(
                    f"{source.folder}: {named[f'blk.{layer}.{part}'].name} is {list(shape)}, "
                    "which does not fit config.json and the other layers",
                    "Save model and config together: model.save_pretrained(…).",
                )


def _mend_name(fields: dict[str, Field], files: TokenizerFiles) -> None:
    """Let the name say "phi-3" when, and only when, llama.cpp must treat the tokens as Phi-3's.

    By nothing but the name it drops the spaces behind special tokens, and then it does not load a
    vocabulary that lacks one of four (llama-vocab.cpp, "phi-3").
    """
    name, tokens = fields["general.name"].value, fields["tokenizer.ggml.tokens"].value
    strips = any(token.strips_right and token.special for token in files.added.values())
    if strips and set(tokens) >= _PHI3_TOKENS:
        if not _PHI3.search(name):
            fields["general.name"] = Field(STRING, name + b" (Phi-3)")
    elif _PHI3.search(name):
        fields["general.name"] = Field(STRING, _PHI3.sub(b"Phi 3", name))
