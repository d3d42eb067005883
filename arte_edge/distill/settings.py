"""From TOML and ``--set`` to a `RunConfig`, with errors that name the file and the key."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from arte_edge.distill.config import RunConfig
from arte_edge.errors import InputError, nearest

__all__ = ["build", "differences", "dump_toml", "load_toml", "parse_set", "problems_of"]


def load_toml(path: Path) -> dict[str, Any]:
    """Read one TOML file.

    Raises:
        InputError: missing, or not TOML; says the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file", "See `arte-edge ls` for the shipped presets.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from error


def parse_set(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn ``align.learning_rate=1e-6`` and the like into nested tables; a later one wins."""
    tables: dict[str, Any] = {}
    for assignment in assignments:
        key, found, text = assignment.partition("=")
        parts = key.strip().replace("-", "_").split(".")
        if not found or not all(parts):
            raise InputError(f"--set {assignment}: not of the form key=value", "Example: --set tune.epochs=2")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text.strip()  # a bare word is a string: quotes do not survive every shell
        table = tables
        for part in parts[:-1]:
            below = table.get(part)
            table[part] = below if isinstance(below, dict) else {}  # task=x, then task.ref=y
            table = table[part]
        table[parts[-1]] = value
    return tables


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid on top, tables merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def build(source: str, *layers: Mapping[str, Any]) -> RunConfig:
    """Return the validated configuration of `layers`, the last one on top. `source` is named in errors.

    Raises:
        InputError: every problem at once, each with its key; an unknown key with its nearest neighbour.
    """
    tables: dict[str, Any] = {}
    for layer in layers:
        tables = merge(tables, layer)
    try:
        return RunConfig.model_validate(tables)
    except ValidationError as error:
        problems, hints = zip(*_problems(error), strict=True)
        raise InputError(f"{source}: " + "; ".join(problems), " ".join(filter(None, hints))) from error


def problems_of(tables: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is wrong with nested tables as (message, hint) pairs; empty if they are a run."""
    try:
        RunConfig.model_validate(tables)
    except ValidationError as error:
        return _problems(error)
    return []


def _problems(error: ValidationError) -> list[tuple[str, str]]:
    found = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            hint = nearest(str(item["loc"][-1]), _keys_at(item["loc"][:-1]))
            found.append((f"unknown key '{key}'", hint))
        else:
            message = item["msg"].removeprefix("Value error, ")
            found.append((f"{key}: {message}" if key else message, ""))
    return found


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        options = [annotation, *get_args(annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)


def dump_toml(config: RunConfig) -> str:
    """Return the configuration as TOML, every key written out."""
    import tomlkit

    return tomlkit.dumps(config.model_dump(mode="json", exclude_none=True))


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys in which two nested tables differ."""
    keys: list[str] = []
    for key in sorted({*a, *b}):
        one, two = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            keys += differences(one, two, f"{prefix}{key}.")
        elif one != two:
            keys.append(prefix + key)
    return keys
