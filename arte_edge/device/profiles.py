"""Device profiles: facts with evidence and source, shipped in ``devices/*.toml`` or the user's own."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from arte_edge import catalog
from arte_edge.cache import write_atomic
from arte_edge.errors import InputError, nearest
from arte_edge.results.rows import DeviceFacts

__all__ = [
    "Fact",
    "Match",
    "Profile",
    "Remote",
    "Runtimes",
    "add_device",
    "checked_host",
    "find_device",
    "load_profile",
    "match_device",
    "own_folder",
    "own_names",
    "read_profile",
    "remove_device",
    "shipped",
]

# A word for ssh's command line: never an option, never something that a shell or scp reads otherwise.
_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.-]*")
Evidence = Literal["measured", "published", "data-sheet", "derived", "assumed"]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fact(_Table):
    """One number and where it is from."""

    value: float
    evidence: Evidence
    source: str = Field(min_length=4, description="page, issue or measurement that says so")


class Match(_Table):
    """How `detect` knows such a device: every given entry must hold."""

    arch: str = Field(default="", description="as `uname -m` prints it")
    model: str = Field(default="", description="regular expression on the board's model string")
    cpu: str = Field(default="", description="regular expression on the processor's name")
    features: tuple[str, ...] = Field(default=(), description="CPU features that must be there")
    without: tuple[str, ...] = Field(default=(), description="CPU features that must not be there")
    system: str = Field(default="", description="Linux, Darwin, Windows")


class Runtimes(_Table):
    """Which runtime to take there, best first."""

    gguf: tuple[Literal["llama-cpp-python", "xllamacpp"], ...] = ("llama-cpp-python", "xllamacpp")
    onnx: tuple[Literal["onnxruntime-genai", "onnxruntime"], ...] = ("onnxruntime-genai", "onnxruntime")


class Remote(_Table):
    """How to reach one device of one's own (`arte-edge devices add`); a shipped profile has none."""

    host: str = Field(description="as the system's ssh takes it: pi@kitchen, or an alias of ~/.ssh/config")
    workdir: str = Field(default="", description="folder there; empty: ~/.cache/arte-edge-device")
    python: str = Field(default="python3", description="interpreter there, 3.11 or newer")
    ssh_config: str = Field(default="", description="another file than ~/.ssh/config, for `ssh -F`")
    notes: str = Field(default="", description="cooling, supply, ambient: goes into results as free text")

    @field_validator("host")
    @classmethod
    def _plain_host(cls, host: str) -> str:
        return checked_host(host)

    @field_validator("workdir", "python", "notes")
    @classmethod
    def _one_line(cls, text: str) -> str:
        if not text.isprintable() or text.startswith("-"):
            raise ValueError("must be one line of printable text that does not begin with '-'")
        return text


class Profile(_Table):
    """One kind of device, or one device of one's own."""

    name: str = Field(default="", description="the file's stem")
    title: str = Field(description="as people call it")
    base: str = Field(default="", description="shipped profile that the rest is taken from (own devices)")
    arch: Literal["x86_64", "aarch64", "arm64"] = "aarch64"
    cores: int = Field(ge=1, description="cores worth using: the fast ones of a big.LITTLE")
    cpu: str = Field(default="", description="cores and clock, in words")
    features: tuple[str, ...] = Field(default=(), description="CPU features that matter to quantized kernels")
    memory_bytes: tuple[int, ...] = Field(
        min_length=1, description="sizes that it is sold with, the usual first"
    )
    system_bytes: int = Field(default=600_000_000, ge=0, description="what the system keeps of it")
    peak_bandwidth: Fact | None = Field(default=None, description="bytes/s of the memory on paper")
    effective_bandwidth: Fact | None = Field(default=None, description="bytes/s that decoding reaches")
    token_overhead_s: Fact | None = Field(
        default=None, description="fixed cost of one token: 1/rate = bytes/bw + this"
    )
    power_w: Fact | None = Field(default=None, description="at the wall under such a load")
    throttle_c: Fact | None = Field(default=None, description="temperature from which the clock goes down")
    match: Match | None = None
    runtimes: Runtimes = Runtimes()
    remote: Remote | None = None
    recipe: str = Field(default="", description="export recipe made for it")
    sources: dict[str, str] = Field(
        default={}, description="where the plain entries above (cores, memory_bytes, …) are from"
    )
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """The names that results of this device may have: its own, and that of the profile it is based on."""
        return frozenset(name for name in (self.name, self.base) if name)

    def facts(self) -> dict[str, Fact]:
        """Return the numbers that carry their evidence, by key, those that are known."""
        named = {key: getattr(self, key) for key in type(self).model_fields}
        return {key: value for key, value in named.items() if isinstance(value, Fact)}


def checked_host(host: str) -> str:
    """Return `host` if it is safe to hand to ssh and scp as one argument.

    Raises:
        ValueError: it begins with ``-`` (an option), or holds a space, a colon or another special character.
    """
    if not _HOST.fullmatch(host):
        raise ValueError(
            f"{host!r} is no user@host or alias; ports and addresses with ':' go into ~/.ssh/config"
        )
    return host


def load_profile(ref: str) -> Profile:
    """Return the shipped profile `ref`, or the one in a TOML file.

    Raises:
        InputError: no such profile, not TOML, an unknown key or a bad value; says the file and the key.
    """
    return read_profile(catalog.find("devices", ref))


def read_profile(path: Path) -> Profile:
    """Return the profile in a TOML file; what it does not say is its base's. Raises as `load_profile` does."""
    tables = _tables(path)
    base = tables.get("base", "")
    inherited = dict(_tables(_base_path(path, base))) if base else {}
    inherited.pop("match", None)  # a device of one's own is never detected as a kind of device
    try:
        return Profile.model_validate({"name": path.stem, **inherited, **tables})
    except ValidationError as error:
        unknown = [found for found in error.errors() if found["type"] == "extra_forbidden"]
        first = (unknown or error.errors())[0]  # a misspelt key is also why its right name is missing
        key = ".".join(str(part) for part in first["loc"])
        if unknown:
            known = _keys_beside(first["loc"])
            raise InputError(f"{path}: unknown key '{key}'", nearest(str(first["loc"][-1]), known)) from error
        raise InputError(f"{path}: {key}: {first['msg'].removeprefix('Value error, ')}") from error


def _tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: not readable as TOML: {error}") from error


def _base_path(path: Path, base: Any) -> Path:
    if base in (shipped := catalog.names("devices")):
        return catalog.find("devices", base)
    raise InputError(f"{path}: base: no shipped device is named '{base}'", nearest(str(base), shipped))


def _keys_beside(loc: tuple[int | str, ...]) -> Iterable[str]:
    """Return the keys that stand where the unknown one stood: of the profile, or of one of its tables."""
    if len(loc) == 1:
        return Profile.model_fields
    tables: dict[str, type[BaseModel]] = {"match": Match, "runtimes": Runtimes, "remote": Remote}
    return tables.get(str(loc[0]), Fact).model_fields


_GENERIC = "generic-arm64"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def find_device(ref: str) -> Profile:
    """Return the device that `ref` means.

    Args:
        ref: a shipped name, one of one's own, a .toml file, or ``user@host``. The last gets the facts
            of a generic board, since nothing is known of it before it is reached.

    Raises:
        InputError: no such device (the hint names the nearest), or its file is wrong.
    """
    if ref.endswith(".toml") or "/" in ref:
        return read_profile(catalog.find("devices", ref))
    if ref in own_names():
        return read_profile(own_folder() / f"{ref}.toml")
    if ref in catalog.names("devices"):
        return load_profile(ref)
    if "@" in ref:
        remote = Remote(host=_host(ref))
        return load_profile(_GENERIC).model_copy(
            update={
                "name": "",
                "title": "a device over ssh",
                "base": _GENERIC,
                "match": None,
                "remote": remote,
            }
        )
    raise InputError(f"No device is named '{ref}'", nearest(ref, [*own_names(), *catalog.names("devices")]))


def own_folder() -> Path:
    """Return where one's own devices are kept; it need not exist. ``ARTE_EDGE_HOME`` holds all in one place."""
    import platformdirs

    from arte_edge.cache import cache_dir

    if os.environ.get("ARTE_EDGE_HOME"):
        return cache_dir() / "devices"
    return platformdirs.user_config_path("arte-edge", appauthor=False) / "devices"


def own_names() -> list[str]:
    """Return the names of one's own devices, sorted."""
    return sorted(path.stem for path in own_folder().glob("*.toml"))


def add_device(name: str, host: str, *, base: str = "", **told: str) -> Path:
    """Write a device of one's own and return its file.

    Args:
        name: lower-case letters, digits, ``.``, ``_``, ``-``.
        host: as the system's ssh takes it.
        base: shipped profile to take the facts from; empty: a generic board's.
        told: ``workdir``, ``python``, ``notes`` of `Remote`, ``title`` of `Profile`; empty ones are left out.

    Raises:
        InputError: the name is taken or no name, the host could be an option, the base is unknown.
    """
    import tomlkit

    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} is no name for a device",
            "Lower-case letters, digits, '.', '_' and '-', as in kitchen-pi.",
        )
    if name in catalog.names("devices"):
        raise InputError(f"'{name}' is the name of a shipped profile", f"Try my-{name}, with --base {name}.")
    path = own_folder() / f"{name}.toml"
    if path.exists():
        raise InputError(f"{path}: exists already", f"Change it, or `arte-edge devices rm {name}` first.")
    load_profile(base := base or _GENERIC)
    document: Any = tomlkit.document()
    document.add(tomlkit.comment(f"made by `arte-edge devices add`; what it does not say is {base}'s"))
    document["title"] = told.pop("title", "") or name
    document["base"] = base
    remote = {"host": _host(host)} | {key: value for key, value in told.items() if value}
    document["remote"] = remote
    _checked(remote)
    write_atomic(path, tomlkit.dumps(document).encode())
    read_profile(path)
    return path


def remove_device(name: str) -> Path:
    """Remove a device of one's own and return the file that it was.

    Raises:
        InputError: it is not one of one's own.
    """
    if name not in own_names():
        hint = "Shipped profiles stay." if name in catalog.names("devices") else nearest(name, own_names())
        raise InputError(f"'{name}' is no device of your own", hint)
    path = own_folder() / f"{name}.toml"
    path.unlink()
    return path


def _host(host: str) -> str:
    try:
        return checked_host(host)
    except ValueError as error:
        raise InputError(str(error)) from error


def _checked(remote: dict[str, str]) -> None:
    from pydantic import ValidationError

    try:
        Remote.model_validate(remote)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}") from error


@cache
def shipped() -> tuple[Profile, ...]:
    """Return the shipped profiles, sorted by name."""
    return tuple(load_profile(name) for name in catalog.names("devices"))


def match_device(facts: DeviceFacts, model: str, system: str) -> str:
    """Return the name of the shipped profile that fits a machine best, empty if none does.

    Of several that fit, the one that asks for the most particular things wins: the board before
    the processor, the processor before its features, and those before the architecture.

    Args:
        model: the board, as `arte_edge.device.detect.board` says it.
        system: Linux, Darwin, Windows.
    """
    fitting = [
        (_weight(profile.match), profile.name)
        for profile in shipped()
        if profile.match and _fits(profile.match, facts, model, system)
    ]
    return max(fitting, default=((), ""))[1]


def _fits(match: Match, facts: DeviceFacts, model: str, system: str) -> bool:
    return (
        (not match.arch or _same_arch(match.arch, facts.arch))
        and (not match.system or match.system == system)
        and (not match.model or re.search(match.model, model) is not None)
        and (not match.cpu or re.search(match.cpu, facts.cpu) is not None)
        and set(match.features) <= set(facts.features)
        and set(match.without).isdisjoint(facts.features)
        and "qemu-user" not in facts.virtual  # an emulated processor is no such device
    )


def _same_arch(one: str, other: str) -> bool:
    """Linux says aarch64 for what macOS and Windows call arm64."""
    arm = {"aarch64", "arm64"}
    return one == other or {one, other} <= arm


def _weight(match: Match) -> tuple[int, ...]:
    return bool(match.model), bool(match.cpu), len(match.features), bool(match.system), bool(match.arch)
