"""What a user hands over, read so that every mistake becomes one `InputError`: paths, TOML, JSON.

The parsers of `tomllib` and `json` are recursive: a deeply nested file ends them with a `RecursionError`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from arte_edge.errors import InputError, nearest

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

_DEEPEST = 100  # tables or lists in each other; what validates, merges and writes settings is recursive too
_SHOWN_CHARS = 200
M = TypeVar("M", bound="BaseModel")
T = TypeVar("T")
V = TypeVar("V")
_AGAIN = "Save or download it again."


def user_path(ref: str | Path, *, recorded: bool = False) -> Path:
    """Return the path that a user gave, its ``~`` resolved; it need not exist. With `recorded` it is UTF-8.

    Raises InputError: no path, of an unknown user, too long, or in a folder that may not be read.
    """
    text = str(ref)
    shown = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"
    if not text.strip():
        raise InputError("An empty text was given where a path belongs", "Name a file or a folder.")
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except RuntimeError as error:
        raise InputError(f"{shown}: no such user on this machine", "Write the whole path.") from error
    except ValueError as error:
        raise InputError(f"{shown!r}: holds a character that no path can hold") from error
    except OSError as error:
        raise InputError(f"{shown}: {error.strerror}") from error
    if recorded and any("\udc80" <= character <= "\udcff" for character in text):
        hint = "Rename it, or run with PYTHONUTF8=1: results hold the name."
        raise InputError(f"{shown!r}: not a name in UTF-8", hint)
    return path


def own_name(path: Path) -> str:
    """Return the last part of `path` as its user wrote it: of a link its own name, not its target's."""
    return path.resolve().name if path.name in ("", "..") else path.name


def json_loads(text: str | bytes) -> Any:
    """Return what `json.loads` does; for text that is nested too deeply it raises JSONDecodeError too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None


def toml_loads(text: str) -> dict[str, Any]:
    """Return the tables in a TOML text.

    Raises ValueError: it is not TOML, or nested too deeply (TOMLDecodeError), or holds a number of thousands of digits.
    """
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise tomllib.TOMLDecodeError("nested too deeply") from None
    level: list[Any] = [tables]
    for _ in range(_DEEPEST):
        below = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in below if isinstance(child, dict | list)]
    if level:
        raise tomllib.TOMLDecodeError("nested too deeply")
    return tables


def read_json(path: Path, hint: str = _AGAIN, *, required: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no such file, unless it is `required`.

    Raises InputError: it cannot be read or holds no JSON object.
    """
    if not required and not path.exists():
        return {}
    try:
        if isinstance(value := json_loads(path.read_bytes()), dict):
            return value
        raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})", hint) from error


def read_toml(path: Path, hint: str = "") -> dict[str, Any]:
    """Return the tables in a TOML file.

    Raises InputError: it cannot be read, is not TOML (says the line), or is nested too deeply.
    """
    try:
        return toml_loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", hint) from error
    except ValueError as error:  # UnicodeDecodeError and TOMLDecodeError are two of them
        raise InputError(f"{path}: not TOML: {error}", hint) from error


def validated(model: type[M], tables: Any, source: str, hint: str = "") -> M:
    """Return `tables` as a `model`. Raises InputError with every problem in `source`, as `problems` finds them."""
    from pydantic import ValidationError

    try:
        return model.model_validate(tables)
    except ValidationError as error:
        messages, hints = zip(*problems(error, model), strict=True)
        raise InputError(f"{source}: " + "; ".join(messages), " ".join(filter(None, hints)) or hint) from error


def for_pydantic(parse: Callable[[V], T], value: V) -> T:
    """Parse a value inside a pydantic validator: an InputError becomes a `ValueError`, which pydantic collects."""
    try:
        return parse(value)
    except InputError as error:
        raise ValueError(f"{error.message}. {error.hint}") from None


def problems(error: ValidationError, model: type[BaseModel]) -> list[tuple[str, str]]:
    """Return what is wrong with the keys of a `model` as (message, hint); for an unknown one the nearest."""
    found = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            found.append((f"unknown key '{key}'", nearest(str(item["loc"][-1]), _keys_at(item["loc"][:-1], model))))
        else:
            message = item["msg"].removeprefix("Value error, ")
            found.append((f"{key}: {message}" if key else message, ""))
    return found


def _keys_at(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    from pydantic import BaseModel

    for part in location:
        if (field := model.model_fields.get(str(part))) is None:
            continue  # a key of a table, such as a format's name
        options = [field.annotation, *get_args(field.annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)


def run_file(folder: Path) -> Path:
    """Return the ``run.toml`` of a run's folder. Raises InputError: the folder is no run; says what it is instead."""
    path = folder / "run.toml"
    if not path.is_file():
        hint = "Give the folder that `arte-edge distill` made."
        raise InputError(f"{folder}: not a run but {_what_is(folder)}, it has no run.toml", hint)
    return path


def _what_is(folder: Path) -> str:
    kinds = {
        "task.toml": "a task",
        "student.json": "an export",
        "adapter_config.json": "a LoRA adapter",
        "config.json": "a checkpoint",
    }
    for name, kind in kinds.items():
        if (folder / name).is_file():
            return kind
    below = sorted(path.parent.name for path in folder.glob("*/run.toml"))
    if below:
        return f"a folder of runs ({', '.join(below[:5])}{', …' if len(below) > 5 else ''})"
    return "another folder" if any(folder.iterdir()) else "an empty folder"
