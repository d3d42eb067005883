"""Device profiles: facts with evidence and source, shipped in ``devices/*.toml`` or the user's own."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from arte_edge import catalog
from arte_edge.cache import user_settings, write_atomic
from arte_edge.errors import InputError, nearest
from arte_edge.files import read_toml, validated
from arte_edge.results.rows import DeviceFacts

# Safe as an argument of ssh: never an option, nothing with a special meaning to a shell or to scp.
_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.-]*")
_BAD_HOST = "not user@host or an alias; ports and addresses with ':' go into ~/.ssh/config"
Evidence = Literal["measured", "published", "data-sheet", "derived", "assumed"]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fact(_Table):
    """One number and where it is from."""

    value: float
    evidence: Evidence
    source: str = Field(min_length=4, description="page, issue or measurement that says so")


class Match(_Table):
    """How `detect` recognizes such a device: every given entry must match."""

    arch: str = Field(default="", description="as `uname -m` prints it")
    model: str = Field(default="", description="regular expression on the board's model string")
    cpu: str = Field(default="", description="regular expression on the processor's name")
    features: tuple[str, ...] = Field(default=(), description="CPU features that must be there")
    without: tuple[str, ...] = Field(default=(), description="CPU features that must not be there")
    system: str = Field(default="", description="Linux, Darwin, Windows")


class Runtimes(_Table):
    """The preferred runtimes, best first."""

    gguf: tuple[Literal["llama-cpp-python", "xllamacpp"], ...] = ("llama-cpp-python", "xllamacpp")
    onnx: tuple[Literal["onnxruntime-genai", "onnxruntime"], ...] = ("onnxruntime-genai", "onnxruntime")


class Remote(_Table):
    """How to reach a user's own device (`arte-edge devices add`); a shipped profile has none."""

    host: str = Field(description="as for ssh: pi@kitchen, or an alias of ~/.ssh/config")
    workdir: str = Field(default="", description="work folder there; empty: ~/.cache/arte-edge-device")
    python: str = Field(default="python3", description="interpreter there, 3.11 or newer")
    ssh_config: str = Field(default="", description="another file than ~/.ssh/config, for `ssh -F`")
    notes: str = Field(default="", description="cooling, power supply, ambient temperature: recorded in results")

    @field_validator("host")
    @classmethod
    def _plain_host(cls, host: str) -> str:
        if not _HOST.fullmatch(host):
            raise ValueError(f"{host!r} is {_BAD_HOST}")
        return host

    @field_validator("workdir", "python", "notes")
    @classmethod
    def _one_line(cls, text: str) -> str:
        if not text.isprintable() or text.startswith("-"):
            raise ValueError("must be one line of printable text that does not begin with '-'")
        return text


class Profile(_Table):
    """A device type, or one device of the user's own."""

    name: str = Field(default="", description="file name without .toml")
    title: str = Field(description="display name")
    base: str = Field(default="", description="shipped profile with the other facts (own devices)")
    arch: Literal["x86_64", "aarch64", "arm64"] = "aarch64"
    cores: int = Field(ge=1, description="cores worth using: the fast ones of a big.LITTLE")
    cpu: str = Field(default="", description="cores and clock, as text")
    features: tuple[str, ...] = Field(default=(), description="CPU features that matter to quantized kernels")
    memory_bytes: tuple[int, ...] = Field(min_length=1, description="sizes on sale, the usual one first")
    system_bytes: int = Field(default=600_000_000, ge=0, description="used by the system")
    peak_bandwidth: Fact | None = Field(default=None, description="bytes/s of the memory's data sheet")
    effective_bandwidth: Fact | None = Field(default=None, description="bytes/s that decoding reaches")
    token_overhead_s: Fact | None = Field(default=None, description="fixed cost of one token: 1/rate = bytes/bw + this")
    power_w: Fact | None = Field(default=None, description="at the wall under load")
    throttle_c: Fact | None = Field(default=None, description="temperature above which the clock is lowered")
    match: Match | None = None
    runtimes: Runtimes = Runtimes()
    remote: Remote | None = None
    recipe: str = Field(default="", description="export recipe made for it")
    sources: dict[str, str] = Field(
        default={}, description="sources of the plain entries above (cores, memory_bytes, …)"
    )
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """The names that results of this device may have: its own and that of its base."""
        return frozenset(filter(None, (self.name, self.base)))

    def facts(self) -> dict[str, Fact]:
        """Return the known numbers with evidence, by key."""
        named = {key: getattr(self, key) for key in type(self).model_fields}
        return {key: value for key, value in named.items() if isinstance(value, Fact)}


def check_host(host: str) -> str:
    """Return `host`; raise InputError if it is unsafe as an argument of ssh: an option or special characters."""
    if not _HOST.fullmatch(host):
        raise InputError(f"{host!r} is {_BAD_HOST}")
    return host


def read_profile(path: Path) -> Profile:
    """Return the profile in a TOML file; missing facts are those of its base.

    Raises InputError: not TOML, an unknown key or a bad value; names the file and the key.
    """
    tables = read_toml(path)
    inherited: dict[str, Any] = {}
    if base := tables.get("base", ""):
        names = catalog.names("devices")
        if base not in names:
            raise InputError(f"{path}: base: no shipped device is named '{base}'", nearest(str(base), names))
        inherited = read_toml(catalog.find("devices", base))
        inherited.pop("match", None)  # a user's own device is never detected as a device type
    return validated(Profile, {"name": path.stem, **inherited, **tables}, str(path))


_GENERIC = "generic-arm64"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def find_device(ref: str) -> Profile:
    """Return the device `ref`.

    Args:
        ref: a shipped name, a name of the user's own devices, a .toml file, or ``user@host``, which gets the
            facts of a generic board.

    Raises InputError: no such device (the hint has the nearest name), or its file is invalid.
    """
    if ref in own_names():
        return read_profile(own_folder() / f"{ref}.toml")
    if ref.endswith(".toml") or "/" in ref or ref in catalog.names("devices"):
        return read_profile(catalog.find("devices", ref))
    if "@" in ref:
        own = {"name": "", "title": "a device over ssh", "base": _GENERIC, "match": None}
        return find_device(_GENERIC).model_copy(update=own | {"remote": Remote(host=check_host(ref))})
    raise InputError(f"No device is named '{ref}'", nearest(ref, [*own_names(), *catalog.names("devices")]))


def own_folder() -> Path:
    """Return the folder of the user's own devices, which may not exist; below ``ARTE_EDGE_HOME`` if that is set."""
    return user_settings() / "devices"


def own_names() -> list[str]:
    """Return the names of the user's own devices, sorted."""
    return sorted(path.stem for path in own_folder().glob("*.toml"))


def add_device(name: str, host: str, *, base: str = "", **facts: str) -> Path:
    """Write the file of a user's own device and return its path.

    Args:
        name: lower-case letters, digits, ``.``, ``_``, ``-``.
        host: as for ssh.
        base: shipped profile with the other facts; empty: a generic board.
        facts: ``workdir``, ``python``, ``notes`` of `Remote`, ``title`` of `Profile`; empty ones are omitted.

    Raises InputError: the name exists or is invalid, the host is invalid, or the base is unknown.
    """
    import tomlkit

    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} is not a valid device name",
            "Use lower-case letters, digits, '.', '_' and '-', for example kitchen-pi.",
        )
    if name in catalog.names("devices"):
        raise InputError(f"'{name}' is the name of a shipped profile", f"Try my-{name}, with --base {name}.")
    path = own_folder() / f"{name}.toml"
    if path.exists():
        raise InputError(f"{path}: exists already", f"Change it, or `arte-edge devices rm {name}` first.")
    if (base := base or _GENERIC) not in (names := catalog.names("devices")):
        raise InputError(f"No shipped device is named '{base}'", nearest(base, names))
    document: Any = tomlkit.document()
    document.add(tomlkit.comment(f"made by `arte-edge devices add`; facts that are missing here are {base}'s"))
    document["title"] = facts.pop("title", "") or name
    document["base"] = base
    remote = {"host": check_host(host)} | {key: value for key, value in facts.items() if value}
    document["remote"] = remote
    validated(Remote, remote, "devices add")
    write_atomic(path, tomlkit.dumps(document).encode())
    return path


def remove_device(name: str) -> Path:
    """Remove the file of a user's own device and return its path. Raises InputError if there is none."""
    if name not in own_names():
        shipped = name in catalog.names("devices")
        hint = "Shipped profiles cannot be removed." if shipped else nearest(name, own_names())
        raise InputError(f"'{name}' is not one of your devices", hint)
    path = own_folder() / f"{name}.toml"
    path.unlink()
    return path


@cache
def shipped() -> tuple[Profile, ...]:
    """Return the shipped profiles, sorted by name."""
    return tuple(find_device(name) for name in catalog.names("devices"))


def match_device(facts: DeviceFacts, model: str, system: str) -> str:
    """Return the name of the shipped profile that matches a machine best, empty if none does.

    The most specific one wins: the board before the processor, the processor before its features, and
    those before the architecture.

    Args:
        model: the board, as of `arte_edge.device.detect.board`.
        system: Linux, Darwin, Windows.
    """
    found = [
        ((bool(m.model), bool(m.cpu), len(m.features), bool(m.system), bool(m.arch)), profile.name)
        for profile in shipped()
        if (m := profile.match) and _matches(m, facts, model, system)
    ]
    return max(found, default=((), ""))[1]


def _matches(match: Match, facts: DeviceFacts, model: str, system: str) -> bool:
    arm = {"aarch64", "arm64"}  # Linux' name, and that of macOS and Windows
    return (
        (not match.arch or match.arch == facts.arch or {match.arch, facts.arch} <= arm)
        and (not match.system or match.system == system)
        and (not match.model or re.search(match.model, model) is not None)
        and (not match.cpu or re.search(match.cpu, facts.cpu) is not None)
        and set(match.features) <= set(facts.features)
        and set(match.without).isdisjoint(facts.features)
        and "qemu-user" not in facts.virtual
    )
