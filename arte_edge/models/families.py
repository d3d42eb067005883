"""The model families we know how to lay out in a GGUF file: one small TOML each, in ``families/``.

All that is special about a family is in its file: what its checkpoints call
themselves, how rows are laid out, which GGUF keys its hyper-parameters go to, and
what llama.cpp takes for granted about it (a checkpoint that differs there is
refused, because its file would load and answer wrongly). The patcher of trained
checkpoints and the adapter writer read the layout, the converter reads all of it.
docs/new-family.md tells how to add one.
"""

from __future__ import annotations

import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arte_edge.errors import InputError

__all__ = ["Family", "Pattern", "families", "family_of_arch", "family_of_model_type", "unsupported"]

_FOLDER = Path(__file__).with_suffix("")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Pattern(_Frozen):
    """What each layer's entry of a list in config.json must be: `value` at every `every`-th, `others` else."""

    every: int = Field(gt=0)
    value: Any
    others: Any

    def expected(self, n_layer: int) -> list[Any]:
        """Return the list that llama.cpp takes for granted."""
        return [self.value if (layer + 1) % self.every == 0 else self.others for layer in range(n_layer)]


class Family(_Frozen):
    """What is special about one architecture. Field names are the keys of its TOML file.

    `uint32` and `float32` map a GGUF key, without ``<arch>.``, to the key of config.json that
    its value comes from; a name that ends in ``?`` may be missing.
    """

    arch: str  # general.architecture, and the name of the table in GGML's `gguf`
    model_types: tuple[str, ...] = Field(min_length=1)  # config.json: model_type
    title: str
    interleave_heads: bool = False
    norm_offset: float = 0.0
    rope_types: tuple[str, ...] = ("default",)
    rope_keys: bool = True  # whether scaling goes to rope.scaling.* (else to tensors alone)
    pre_tokenizers: dict[str, str] = {}  # our name of a way of splitting -> the family's own name for it
    add_space_prefix: bool | None = None
    uint32: dict[str, str]
    float32: dict[str, str]
    defaults: dict[str, Any] = {}  # what transformers takes where config.json is silent
    must: dict[str, tuple[Any, ...]] = {}  # config key -> the only values llama.cpp computes
    same: dict[str, tuple[str, ...]] = {}  # config key -> keys, one of which must have the same value
    patterns: dict[str, Pattern] = {}


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """Return the families by GGUF architecture, sorted.

    Raises:
        InputError: a file is not valid TOML or breaks the schema; says which file and key.
    """
    found: dict[str, Family] = {}
    for path in sorted(_FOLDER.glob("*.toml")):
        try:
            family = Family.model_validate(tomllib.loads(path.read_text("utf-8")))
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{path}: not valid TOML: {error}", "See docs/new-family.md.") from error
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{path}: {key}: {first['msg']}", "See docs/new-family.md.") from error
        found[family.arch] = family
    return found


def family_of_arch(arch: str, where: str) -> Family:
    """Return the family of a GGUF architecture; `where` begins the error's message.

    Raises:
        InputError: not one of `families`.
    """
    if arch not in families():
        raise unsupported(f"{where}: architecture '{arch}'")
    return families()[arch]


def family_of_model_type(model_type: object, where: str) -> Family:
    """Return the family of a checkpoint's ``model_type``; `where` begins the error's message.

    Raises:
        InputError: not one of `families`.
    """
    for family in families().values():
        if model_type in family.model_types:
            return family
    raise unsupported(f"{where}: model_type '{model_type}'")


def unsupported(what: str) -> InputError:
    """Return the error that names the supported families."""
    known = ", ".join(f"{arch} ({' '.join(family.model_types)})" for arch, family in families().items())
    return InputError(f"{what} is not supported", f"Supported: {known}.")
