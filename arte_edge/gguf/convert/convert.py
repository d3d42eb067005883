"""Turn a transformers checkpoint into a GGUF file, in this process and without torch, or by llama.cpp's own script.

The family's TOML maps its settings and rows, GGML's `gguf` has the tensors' names, and the weights stream from file to
file a few megabytes at a time, so memory does not grow with the model. The numbers are bit for bit those of llama.cpp's
own converter; see benchmarks/gguf_conversion.py and the tests.

For models without a family file, `convert_with_llama_cpp` runs ``convert_hf_to_gguf.py`` of the user's own
checkout of llama.cpp with this Python; it needs torch, transformers and what its requirements file lists.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from arte_edge.cache import atomic_file
from arte_edge.checkpoint import Weight
from arte_edge.errors import ArteError, InputError
from arte_edge.extras import need
from arte_edge.gguf.convert.metadata import (
    OTHER_CONVERTER,
    Checkpoint,
    general_metadata,
    hyper_parameters,
    open_checkpoint,
    rope_tensors,
)
from arte_edge.gguf.convert.tokenizer import read_tokenizer, vocabulary
from arte_edge.gguf.names import BLOCK, name_for_llama_cpp, tensor_position, weight_tensor
from arte_edge.gguf.reader import FULL_WIDTH, QUANT_TYPES, STRING, Field, read_model_header
from arte_edge.gguf.writer import Tensor, write_gguf

__all__ = ["SCRIPT", "convert", "convert_with_llama_cpp"]

SCRIPT = "convert_hf_to_gguf.py"
_SHOWN_LINES = 3
_NOT_WEIGHTS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
# The tensors that llama.cpp cannot do without, whatever the family
_NEEDED = ("token_embd.weight", "output_norm.weight")
_PHI3_TOKENS = {b"</s>", b"<unk>", b"<s>", b"<|endoftext|>"}


def convert(
    checkpoint: Path,
    out: Path,
    dtype: Literal["F16", "BF16", "F32"] = "F16",
    *,
    extra_fields: Mapping[str, Field] = MappingProxyType({}),
) -> Path:
    """Write the model in the folder `checkpoint` to the GGUF file `out`; return `out`.

    Norms, biases and rotary factors stay F32, as llama.cpp requires. The file appears whole or not at all.

    Args:
        dtype: the type of the matrices.
        extra_fields: metadata that overrides the checkpoint's.

    Raises:
        InputError: no whole checkpoint with a tokenizer, a family or a tokenizer we do not know, or
            settings that llama.cpp does not have for the family; says which file and key.
        ArteError: a package is missing, the disk is full, or a weight does not fit `dtype`.
    """
    need("gguf", "Writing GGUF")
    _check_dtype(dtype)
    source = open_checkpoint(checkpoint)
    files = read_tokenizer(checkpoint, source.config)
    tensors = rope_tensors(source) + _tensors(source, dtype)
    fields = {
        **general_metadata(source, tensors, dtype),
        **hyper_parameters(source),
        **vocabulary(files, source.family, source.n_vocab),
        **extra_fields,
    }
    strips = any(token.strips_right and token.special for token in files.added.values())
    is_phi3 = strips and set(fields["tokenizer.ggml.tokens"].value) >= _PHI3_TOKENS
    fields["general.name"] = Field(STRING, name_for_llama_cpp(fields["general.name"].value, is_phi3))
    return write_gguf(out, source.family.arch, fields, tensors)


def _tensors(source: Checkpoint, dtype: str) -> list[Tensor]:
    """Return the tensors of the weights, block by block."""
    layout = source.layout
    named: dict[str, Weight] = {}
    for name, weight in source.weights.items():
        if name.endswith(_NOT_WEIGHTS):
            continue
        if (target := layout.gguf_name(name)) is None:
            what = f"{weight.path}: {name} has no place in a {source.family.title} GGUF"
            raise InputError(what, OTHER_CONVERTER)
        named[target] = weight
    _check_whole(source, named)
    return [weight_tensor(layout, name, named[name], dtype) for name in sorted(named, key=tensor_position)]


def _check_whole(source: Checkpoint, named: dict[str, Weight]) -> None:
    """Raise for a tensor that is missing or does not fit the settings: a runtime would not name it."""
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, weight in named.items():
        if match := BLOCK.fullmatch(name):
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


def _check_dtype(dtype: str) -> None:
    if dtype not in FULL_WIDTH:
        raise InputError(f"'{dtype}' is not a type to convert to", f"Choose from {', '.join(FULL_WIDTH)}.")


def convert_with_llama_cpp(llama_cpp: Path, checkpoint: Path, out: Path, dtype: str = "F16") -> Path:
    """Write the model in `checkpoint` to the GGUF file `out` by the converter in `llama_cpp`; return `out`.

    Raises:
        InputError: `llama_cpp` has no converter, or `checkpoint` is no folder.
        ArteError: the converter failed, or what it wrote is not a GGUF of type `dtype`.
    """
    script = llama_cpp / SCRIPT
    if not script.is_file():
        raise InputError(f"{llama_cpp}: no {SCRIPT} there", "Give the folder of a checkout of llama.cpp.")
    _check_dtype(dtype)
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: no such folder", "Give a transformers checkpoint.")
    # The script fills {…} in names itself, and adds nothing to a name without one.
    partial = out.with_name(f".{out.name}.partial".replace("{", "_").replace("}", "_"))
    command = [sys.executable, str(script.absolute()), str(checkpoint.absolute())]
    command += ["--outfile", str(partial.absolute()), "--outtype", dtype.lower()]
    with atomic_file(out, partial):
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "errors": "replace"}
        done = subprocess.run(command, **pipes, env=environment, check=False)
        if done.returncode != 0 or not partial.is_file():
            raise _failure(script, done)
        _check_written(script, partial, dtype)
    return out


def _failure(script: Path, done: subprocess.CompletedProcess[str]) -> ArteError:
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    output = " / ".join(lines[-_SHOWN_LINES:])[:500] or "no message"
    hint = f"Run it by hand to see its whole output: python {script.name} CHECKPOINT."
    if "ModuleNotFoundError" in output or "ImportError" in output:
        hint = f"Install what it needs: pip install -r {script.parent / 'requirements.txt'}"
    return ArteError(f"{script} ended with code {done.returncode}: {output}", hint)


def _check_written(script: Path, partial: Path, dtype: str) -> None:
    """Raise unless the file is a whole GGUF whose matrices are of type `dtype`."""
    try:
        header = read_model_header(partial)
    except InputError as error:
        raise ArteError(f"{script} wrote no usable GGUF: {error.message}", error.hint) from error
    if header.metadata.get("general.file_type") != QUANT_TYPES[dtype].number:
        raise ArteError(f"{script} wrote {header.quantization} instead of {dtype}", "Update the checkout.")
