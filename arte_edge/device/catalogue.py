"""Which device is meant: a shipped profile, one of one's own, a file, or ``user@host``.

One's own devices are small TOML files in the user's configuration folder (``devices add``); most
name a shipped profile as their ``base`` and add how to reach the device.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from arte_edge import catalog
from arte_edge.device.profile import Match, Profile, Remote, checked_host, load_profile, read_profile
from arte_edge.errors import InputError, nearest
from arte_edge.results.rows import DeviceFacts
from arte_edge.store import write_atomic

__all__ = ["add_device", "find_device", "match_device", "own_folder", "own_names", "remove_device", "shipped"]

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

    from arte_edge.cache import home

    if os.environ.get("ARTE_EDGE_HOME"):
        return home() / "devices"
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
