"""Bring the device's environment to what a plan asks for; nothing to do when it is so already."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from arte_edge.cache import sha256_file
from arte_edge.device.copy import Blob, Tick, blobs_of, place, put_text, send
from arte_edge.device.patience import Patience
from arte_edge.device.remote_env import Plan, install_commands, is_offline
from arte_edge.device.remote_job import JobFailed, RemoteJob
from arte_edge.device.ssh import Ssh
from arte_edge.device.survey import Python, Survey
from arte_edge.device.wheels import Target, fetch_wheels
from arte_edge.errors import ArteError
from arte_edge.store import content_key

__all__ = ["Marker", "Site", "env_bytes_missing", "install", "read_marker", "send_wheel"]

_MARKER = "arte-edge.json"


@dataclass(frozen=True)
class Marker:
    """The environment's own record of what it holds, written when all of it was installed."""

    wheel: str = ""  # sha256 of our wheel
    extras: tuple[str, ...] = ()


@dataclass
class Site:
    """A prepared device: what one needs to run jobs there."""

    ssh: Ssh
    found: Survey
    patience: Patience
    say: Callable[[str], None]
    tick: Tick | None = None

    @property
    def work(self) -> str:
        return self.found.work

    def job(self, name: str, python: Python, wheel: str) -> RemoteJob:
        return RemoteJob(self.ssh, f"{self.work}/jobs/{name}", python.path, wheel, self.patience)

    def send(self, blobs: list[Blob]) -> None:
        send(self.ssh, self.work, blobs, patience=self.patience, tick=self.tick)


def send_wheel(site: Site, wheel: Path) -> str:
    """Bring our wheel there and return its path, which is named after its contents."""
    (blob,) = blobs_of(wheel)
    folder = f"{site.work}/wheels/{blob.sha256[:16]}"
    path = f"{folder}/{wheel.name}"
    if site.ssh.run('[ -e "$1" ] && echo yes; exit 0', path).strip() != "yes":
        site.send([blob])
        place(site.ssh, site.work, folder, [blob])
    return path


def read_marker(ssh: Ssh, env: str) -> Marker:
    """Return what the environment `env` there holds, nothing if there is none or it was never finished."""
    text = ssh.run('cat "$1" 2>/dev/null; exit 0', f"{env}/{_MARKER}")
    try:
        value = json.loads(text)
        return Marker(str(value["wheel"]), tuple(str(extra) for extra in value["extras"]))
    except (ValueError, KeyError, TypeError):
        return Marker()


def install(site: Site, plan: Plan, wheel: Path, wheel_there: str) -> str:
    """Make the environment of `plan` and return its interpreter's path there.

    Raises:
        ArteError: a package cannot be installed; says pip's reason.
        ConnectionLost: the device did not come back in time; the installation goes on there.
    """
    env = f"{site.work}/{plan.env_name}"
    python = f"{env}/bin/python"
    marker = read_marker(site.ssh, env)
    sum_here = sha256_file(wheel, fresh=True)
    if marker.wheel == sum_here and set(plan.extras) <= set(marker.extras):
        return python
    site.say(f"{'bringing up to date' if marker.wheel else 'making'} the environment there")
    said = _try(site, plan, install_commands(plan, env, wheel_there), wheel_there)
    pip = ""
    if "ensurepip" in said:  # Debian without python3-venv: pip runs from its own wheel
        site.say("its Python has no ensurepip: bringing pip along")
        pip = _fetch(site, ["pip"], plan)[0]
        said = _try(site, plan, install_commands(plan, env, wheel_there, pip=pip), wheel_there)
    if said and is_offline(said):
        site.say("it reaches no package index: fetching its packages here")
        house = str(PurePosixPath(_fetch(site, plan.requirements(str(wheel)), plan)[0]).parent)
        commands = install_commands(plan, env, wheel_there, pip=pip, wheelhouse=house)
        said = _try(site, plan, commands, wheel_there)
    if said:
        raise _not_installed(site.ssh.host, said)
    record = {"wheel": sum_here, "extras": sorted({*marker.extras, *plan.extras}), "why": plan.why}
    put_text(site.ssh, f"{env}/{_MARKER}", json.dumps(record))
    return python


def env_bytes_missing(marker: Marker, plan: Plan, sizes: dict[str, int]) -> int:
    """Return about how many bytes the installation will still take."""
    parts = [extra for extra in plan.extras if extra not in marker.extras] + ([] if marker.wheel else [""])
    return sum(sizes.get(part, 0) for part in parts)


def _try(site: Site, plan: Plan, commands: list[list[str]], wheel_there: str) -> str:
    """Run the commands there; return what the failing one said, empty if all went well."""
    # Named after what it does: a compilation that outlived its connection is joined, not begun again.
    job = site.job(f"install-{content_key(commands)[:12]}", plan.python, wheel_there)
    if not job.is_laid_out():
        job.lay_out(commands)
    printed: list[str] = []
    try:
        job.run(printed.append, lambda text: None)
    except JobFailed as error:
        job.remove()
        return "\n".join([*printed, error.said, error.message])
    job.remove()
    return ""


def _fetch(site: Site, requirements: list[str], plan: Plan) -> list[str]:
    """Fetch wheels here, with all they depend on; return their paths there, in one folder."""
    if site.found.system != "Linux":
        raise ArteError(
            f"{site.ssh.host} reaches no package index",
            "Give it a network for the first run; wheels are kept.",
        )
    target = Target(_wheel_machine(site.found.machine), plan.python.version[:2], site.found.glibc_minor)
    with TemporaryDirectory(prefix="arte-edge-") as scratch:
        wheels = fetch_wheels(requirements, target, Path(scratch))
        blobs = [blob for wheel in wheels for blob in blobs_of(wheel)]
        site.send(blobs)
    folder = f"{site.work}/wheelhouse-{content_key(requirements)[:12]}"
    place(site.ssh, site.work, folder, blobs)
    return [f"{folder}/{blob.name}" for blob in blobs]


def _wheel_machine(machine: str) -> str:
    return {"arm64": "aarch64", "amd64": "x86_64"}.get(machine.lower(), machine.lower())


def _not_installed(host: str, said: str) -> ArteError:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line or "error:" in line] or lines[-1:]
    return ArteError(
        f"{host}: the packages could not be installed there: {errors[-1] if errors else 'no reason given'}",
        "What was installed stays; when the cause is mended, the same command goes on.",
    )
