"""The one folder on a device that is ours: made private, looked into, removed only if we made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from arte_edge.cache import megabytes
from arte_edge.device.profiles import Profile, Remote
from arte_edge.device.ssh.connection import Ssh
from arte_edge.device.ssh.environment import check_machine, plan
from arte_edge.device.ssh.probe import Survey, survey
from arte_edge.errors import ArteError, InputError

__all__ = ["Finding", "Report", "check", "clean", "prepare", "reach"]

_OURS = ".arte-edge-device"  # only a folder with this file in it is ever written to or removed
_PREPARE = r"""
umask 077
w=$1
if [ -L "$w" ]; then echo "$w is a link" >&2; exit 41; fi
if [ -d "$w" ] && [ ! -e "$w/$2" ] && [ -n "$(ls -A "$w")" ]; then
  echo "$w is not empty and was not made by arte-edge" >&2; exit 41
fi
mkdir -p "$w" && chmod 700 "$w" && : > "$w/$2" && mkdir -p "$w/blobs" "$w/jobs" "$w/home"
"""
_CLEAN = r"""
[ -d "$1" ] || exit 0
if [ -L "$1" ] || [ ! -e "$1/$2" ]; then echo "$1 was not made by arte-edge" >&2; exit 41; fi
rm -rf "$1"
"""
_USED = 'du -sk "$1" 2>/dev/null | cut -f1; exit 0'
_FIRST_RUN_BYTES = 1_000_000_000  # an environment with every runtime, and a small model


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: Literal["ok", "warning", "failed"]
    text: str
    hint: str = ""


@dataclass(frozen=True)
class Report:
    """What `check` found, in the order in which it matters."""

    host: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(finding.state != "failed" for finding in self.findings)


def reach(profile: Profile) -> Remote:
    """Return how the device is reached. Raises InputError for a profile of a kind of device, not of one's own."""
    if profile.remote is None:
        raise InputError(
            f"'{profile.name}' is a kind of device without an address",
            f"--device user@host, or once: arte-edge devices add NAME user@host --base {profile.name}",
        )
    return profile.remote


def prepare(ssh: Ssh, work: str) -> None:
    """Make the work folder there, for its owner alone.

    Raises:
        RemoteError: it is a link, or a folder with other things in it, or cannot be made.
    """
    ssh.run(_PREPARE, work, _OURS)


def clean(profile: Profile) -> str:
    """Remove the work folder there: environment, copied models and all; return its path.

    Raises:
        RemoteError: the folder was not made by arte-edge.
        ArteError: the device cannot be reached.
    """
    remote = reach(profile)
    with Ssh(remote.host, config=remote.ssh_config) as ssh:
        work = survey(ssh, workdir=remote.workdir, python=remote.python).work
        ssh.run(_CLEAN, work, _OURS, timeout_s=600)
    return work


def check(profile: Profile) -> Report:
    """Look at a device without changing anything on it; what is wrong is a finding, not an exception.

    Raises:
        InputError: `profile` does not say how to reach it.
    """
    remote = reach(profile)
    with Ssh(remote.host, config=remote.ssh_config) as ssh:
        try:
            found = survey(ssh, workdir=remote.workdir, python=remote.python)
            used = ssh.run(_USED, found.work, timeout_s=300).strip()
        except ArteError as error:
            return Report(remote.host, (Finding("ssh", "failed", error.message, error.hint),))
    findings = [
        Finding("ssh", "ok", f"{found.system} {found.machine}"),
        *_software(found, profile, remote.host),
    ]
    if found.memory_bytes:
        free = f", {megabytes(found.available_bytes)} free" if found.available_bytes else ""
        findings.append(Finding("memory", "ok", f"{megabytes(found.memory_bytes)}{free}"))
    findings.append(
        Finding("disk", "ok", f"{megabytes(found.free_bytes)} free")
        if found.free_bytes > _FIRST_RUN_BYTES
        else Finding(
            "disk", "warning", f"{megabytes(found.free_bytes)} free", "A first run takes up to 1 GB."
        )
    )
    kept = megabytes(int(used) * 1024) if used.isdigit() and int(used) else "nothing"
    findings.append(Finding("work folder", "ok", f"{found.work}: {kept}"))
    return Report(remote.host, tuple(findings))


def _software(found: Survey, profile: Profile, host: str) -> list[Finding]:
    try:
        python = check_machine(found, host)
    except ArteError as error:
        return [Finding("python", "failed", error.message, error.hint)]
    version = ".".join(map(str, python.version))
    chosen = plan(found, ["gguf"], profile.runtimes, host)
    return [Finding("python", "ok", f"{version}, {python.path}"), Finding("GGUF runtime", "ok", chosen.why)]
