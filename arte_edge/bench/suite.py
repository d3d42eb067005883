"""A suite: settings of a bench that have a name, ``benchmarks/suites/*.toml`` or a file of one's own.

One table, ``[bench]``, whose keys are those of `BenchSettings`. What is given on the command line goes
before what the suite says.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from arte_edge import catalog
from arte_edge.bench.case import BenchSettings
from arte_edge.errors import InputError, nearest

__all__ = ["load_suite", "make_settings"]

_TABLE = "bench"


def load_suite(ref: str) -> dict[str, Any]:
    """Return the settings of the suite `ref`, a shipped name or a ``.toml``.

    Raises:
        InputError: there is none, it is not TOML, or a key or value is wrong; says which.
    """
    path = catalog.find("suites", ref)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from error
    if unknown := [key for key in document if key != _TABLE]:
        raise InputError(f"{path}: unknown table '{unknown[0]}'", f"A suite has one table, [{_TABLE}].")
    table = document.get(_TABLE, {})
    if not isinstance(table, dict):
        raise InputError(f"{path}: {_TABLE} is no table", f"A suite has one table, [{_TABLE}].")
    make_settings(str(path), table)
    return table


def make_settings(source: str, *layers: Mapping[str, Any]) -> BenchSettings:
    """Return the settings of `layers`, the last on top; `source` is named in errors.

    Raises:
        InputError: every problem at once, an unknown key with its nearest neighbour.
    """
    values = {key: value for layer in layers for key, value in layer.items()}
    try:
        return BenchSettings.model_validate(values)
    except ValidationError as error:
        problems, hints = [], []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                problems.append(f"unknown key '{key}'")
                hints.append(nearest(key, BenchSettings.model_fields))
            else:
                problems.append(f"{key}: {item['msg'].removeprefix('Value error, ')}")
        raise InputError(f"{source}: {'; '.join(problems)}", " ".join(hints)) from error
