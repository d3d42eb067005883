"""What a folder with a model holds: a checkpoint, an adapter or a GGUF file, and which of its files count.

transformers, PEFT, the ONNX builders and our converter look into a folder by themselves, each in its own order. In a
folder with two sets of weights, or with a template in two places, they would read two models. So `look` decides what
a folder is, `tokenizer_files` and `chat_templates` what its tokenizer is, everything that opens a folder asks them,
and a folder that others would read in another way is rejected. The order is that of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from arte_edge.errors import InputError, reading
from arte_edge.files import read_json

# All files that a tokenizer may consist of
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# Weights that transformers does not read where model.safetensors or its index exists
_OTHERS = re.compile(
    r"pytorch_model.*\.bin|consolidated.*|(model|adapter_model)\.[\w-]+\.safetensors|adapter_model\.bin"
    r"|tf_model\.h5|flax_model\.msgpack|.*\.gguf"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MORE_TEMPLATES = "additional_chat_templates"
_AGAIN = "Download or save the checkpoint again."


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds one model."""

    kind: Literal["checkpoint", "adapter", "gguf"]
    weights: tuple[Path, ...]
    others: tuple[str, ...] = ()  # names of weight files that nothing reads
    tensors: frozenset[str] = frozenset()  # that the weights index names, if there is one


def look(folder: Path) -> ModelFolder:
    """Return what a folder holds, or raise an `InputError`: no model, two of them, parts of one, pickles."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise InputError(f"{folder}: not a readable folder ({error.strerror})") from error
    others = tuple(name for name in names if _OTHERS.fullmatch(name))
    weight_map = _weight_map(folder / _INDEX) if _INDEX in names else {}
    weights = _full_weights(folder, names, set(weight_map.values()))
    if _ADAPTER_CONFIG in names or ADAPTER_WEIGHTS in names:
        if weights:
            hint = f"If the adapter is merged already, delete {_ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}; if not, move "
            hint += "them to a folder of their own and name this one with --base."
            raise InputError(f"{folder}: two models, the weights in {weights[0].name} and an adapter", hint)
        if ADAPTER_WEIGHTS not in names:
            hint = "Save the adapter as safetensors; pickles are never opened."
            raise InputError(f"{folder}: no {ADAPTER_WEIGHTS}{_instead(others)}", hint)
        below = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_WEIGHTS}"))
        return ModelFolder("adapter", (folder / ADAPTER_WEIGHTS,), (*others, *(f"{name}/" for name in below)))
    if weights:
        if named := read_json(folder / "config.json").get("transformers_weights"):
            what = f"{folder / 'config.json'}: transformers_weights = {named!r} is read by transformers alone"
            raise InputError(what, f"Remove the key, and name the weights {_SINGLE}.")
        indexed = weights[0].name in weight_map.values()
        return ModelFolder("checkpoint", weights, others, frozenset(weight_map if indexed else ()))
    ggufs = tuple(folder / name for name in names if name.endswith(".gguf"))
    if len(ggufs) > 1:
        hint = f"Name one of them, for example {ggufs[0]}."
        raise InputError(f"{folder}: holds {len(ggufs)} GGUF files", hint)
    if ggufs:
        return ModelFolder("gguf", ggufs)
    raise _no_model(folder, names, others)


def _full_weights(folder: Path, names: list[str], listed: set[str]) -> tuple[Path, ...]:
    """Return the weight files of a checkpoint as transformers finds them, empty if there are none."""
    shards = {name for name in names if _SHARD.fullmatch(name)}
    present = listed & set(names)
    if _SINGLE in names:
        if old := ", ".join(sorted(present - {_SINGLE})[:3]):
            hint = f"transformers would read {_SINGLE}. If that is right, delete {_INDEX} and {old}; else {_SINGLE}."
            raise InputError(f"{folder}: two sets of weights, {_SINGLE} and the files of {_INDEX}", hint)
        return (folder / _SINGLE,)
    if not shards and not listed:
        return ()
    if not listed:
        raise InputError(f"{folder}: {_INDEX} is missing, and {min(shards)} is a part of it", _AGAIN)
    if missing := sorted(listed - present):
        raise InputError(f"{folder}: {missing[0]} is missing, though {_INDEX} names it", _AGAIN)
    if unlisted := sorted(shards - listed):
        hint = f"Delete what is out of date: {', '.join(unlisted[:3])}, or {_INDEX} with its files."
        raise InputError(f"{folder}: two sets of weights, {_INDEX} does not name {unlisted[0]}", hint)
    return tuple(folder / name for name in sorted(listed))


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor -> file of a weights index."""
    weight_map = read_json(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise InputError(f"{index}: not a weights index of files in its folder", _AGAIN)
    return dict(weight_map or {})


def _no_model(folder: Path, names: list[str], others: tuple[str, ...]) -> InputError:
    """Return the error for a folder without a model: with a folder inside that has one, or what is wrong with it."""
    marks = (ADAPTER_WEIGHTS, _SINGLE, _INDEX)
    if inside := {path.parent for mark in marks for path in folder.glob(f"*/{mark}")}:
        last = max(inside, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
        return InputError(f"{folder}: no model here, but in {last.name}", f"Give that folder: {last}")
    if any(name.endswith(_PICKLES) for name in names):
        hint = "Save the model as safetensors (save_pretrained does by default) and give that folder."
        return InputError(f"{folder}: its weights are pickles, which can run code when opened", hint)
    hint = f"A checkpoint has config.json and {_SINGLE} or its shards."
    return InputError(f"{folder}: no model here{_instead(others)}", hint)


def _instead(others: tuple[str, ...]) -> str:
    return f", only {', '.join(others)}, which is not read" if others else ""


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the settings of the LoRA adapter in `folder`, or raise an `InputError` that names its kind."""
    path = folder / _ADAPTER_CONFIG
    if look(folder).kind != "adapter":
        raise InputError(f"{folder}: no adapter here", f"An adapter is {path.name} and {ADAPTER_WEIGHTS}.")
    config = read_json(path, "Save the adapter again.", required=True)
    kind = config.get("peft_type")
    if kind != "LORA":
        hint = "Train with LoRA, or merge it with the program that trained it and give the merged checkpoint."
        raise InputError(f"{path}: peft_type is {kind!r}; only LoRA adapters can be merged into their base", hint)
    return config


def tokenizer_files(folder: Path, adapter: Path | None = None) -> dict[str, Path]:
    """Return the files of a checkpoint's tokenizer by their names.

    Args:
        adapter: an adapter of the checkpoint. If its folder holds a whole tokenizer, that is the one it was trained
            with; single files of it, such as a template, replace those of the base.
    """
    found = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    more = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    found |= {f"{MORE_TEMPLATES}/{path.name}": path for path in more}
    if adapter is None:
        return found
    own = tokenizer_files(adapter)
    if not own.keys().isdisjoint(("tokenizer.json", "tokenizer.model")):
        return own
    if chat_templates(own):  # a template of the base in another file would win
        found = {name: path for name, path in found.items() if "chat_template" not in name}
    return found | own


def chat_templates(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the chat templates in `tokenizer_files` by name; the standard one is "default".

    A file of its own comes before tokenizer_config.json, and chat_template.json, of old processors, last.
    """
    given: object = None
    for name in ("tokenizer_config.json", "chat_template.json"):
        if name in files and not given:
            given = read_json(files[name]).get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(given, str) and given:
        templates["default"] = given
    for row in given if isinstance(given, list) else ():
        if isinstance(row, dict) and isinstance(row.get("template"), str):
            templates[str(row.get("name"))] = row["template"]
    named = {name: path for name, path in files.items() if name.endswith(".jinja")}
    if named:
        templates = {}
    for name, path in named.items():
        with reading(path, _AGAIN):
            templates["default" if name == "chat_template.jinja" else path.stem] = path.read_text("utf-8")
    return templates


def token_text(token: object) -> str:
    """Return a special token's text, stored as a string or as an object with `content`; empty for anything else."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def end_ids(folder: Path) -> list[int]:
    """Return the ids of the end tokens that generation_config.json names, else config.json.

    Raises InputError: they are neither an id nor a list of them.
    """
    config = read_json(folder / "config.json")
    places = (read_json(folder / "generation_config.json"), config, config.get("text_config"))
    named = [place.get("eos_token_id") for place in places if isinstance(place, dict)]
    ids: Any = next((value for value in named if value is not None), [])
    # null and -1 are what some trainers write for none.
    listed = [token for token in (ids if isinstance(ids, list) else [ids]) if token not in (None, -1)]
    if not all(isinstance(token, int) and 0 <= token < 2**31 for token in listed):
        raise InputError(
            f"{folder}: eos_token_id is {str(ids)[:40]}, neither a token's id nor a list of them",
            "Correct it in generation_config.json or config.json.",
        )
    return listed
