"""The environment on a device: a virtual environment with the device-side packages only, never torch.

The device installs from its own package index, which has the best wheels for it (piwheels, a mirror). If it
reaches no index, its wheels are downloaded here and uploaded. Nothing is compiled there unless requested:
llama-cpp-python has no ARM wheel and takes a Raspberry Pi most of an hour, so the prebuilt xllamacpp is used.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Literal

import arte_edge
from arte_edge import catalog
from arte_edge.cache import megabytes, sha256_file
from arte_edge.device.profiles import Profile, Runtimes
from arte_edge.device.ssh.connection import JobFailed, ReconnectPolicy, RemoteJob, Ssh, put_text
from arte_edge.device.ssh.workdir import OLDEST_PYTHON, Blob, Probe, Python, Tick, blobs_of, place, probe, reach, send
from arte_edge.errors import ArteError, InputError
from arte_edge.files import json_loads
from arte_edge.store import content_key

# Machines for which every runtime publishes wheels, as `uname -m` prints them.
_MACHINES = ("aarch64", "arm64", "x86_64", "amd64")
# pip's messages when it cannot reach an index, as opposed to a package that is missing on it.
_OFFLINE = re.compile(
    "Temporary failure in name resolution|Name or service not known|nodename nor servname provided|"
    "Network is unreachable|No route to host|Connection refused|Max retries exceeded|Read timed out|"
    "Failed to establish a new connection|NewConnectionError|ConnectTimeoutError"
)


@dataclass(frozen=True)
class Plan:
    """The environment to install."""

    python: Python
    extras: tuple[str, ...]
    sees_system: bool  # packages of the interpreter's own environment are used too
    compiles: bool
    why: str  # the GGUF runtime and the reason for it; empty without GGUF

    @property
    def env_name(self) -> str:
        """The environment's folder, one per interpreter; extras that are needed later are added to it."""
        parts = (self.python.path, str(self.python.version), str(self.sees_system))
        return f"env-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"

    def requirements(self, wheel: str) -> list[str]:
        """Return pip's requirements: our wheel with its extras, and gguf beside a runtime of the system."""
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        return [f"{wheel}{extras}", *(["gguf>=0.17"] if self.sees_system else [])]


def _check_machine(found: Probe, host: str) -> Python:
    """Return the interpreter to use; raise ArteError if there is none or the machine is not supported."""
    if found.machine.lower() not in _MACHINES:
        raise ArteError(
            f"{host} is a {found.machine or 'unknown'} system, and no runtime has wheels for it",
            "A 64-bit system is needed: Raspberry Pi OS (64-bit) runs on a Zero 2 W, a 3, a 4 and a 5.",
        )
    oldest = ".".join(map(str, OLDEST_PYTHON))
    hint = (
        f"Raspberry Pi OS 12 and Debian 12 have Python {oldest}. Without root: `uv python install {oldest}` there, "
        "and its path as `python` under [remote] of the device's profile."
    )
    if not found.pythons:
        raise ArteError(f"{host} has no Python", hint)
    if (python := found.python) is None:
        newest = ".".join(map(str, max(python.version for python in found.pythons)))
        raise ArteError(f"{host} has Python {newest}; arte-edge needs {oldest} or newer", hint)
    if python.bits != 64:
        raise ArteError(f"{host} runs a 32-bit Python on a 64-bit kernel; no runtime has wheels for it", hint)
    return python


def plan(
    found: Probe,
    formats: Iterable[str],
    runtimes: Runtimes,
    host: str,
    *,
    compile_there: bool = False,
    installed: Iterable[str] = (),
) -> Plan:
    """Choose the packages for these formats.

    Args:
        formats: gguf, onnx-genai, onnx, null.
        runtimes: the profile's order of preference.
        compile_there: llama-cpp-python may be compiled on the device.
        installed: extras that the environment already has.

    Raises:
        InputError: a format needs torch, or there is no compiler for `compile_there`.
        ArteError: the machine is not supported, or has no suitable Python; the hint says what to do.
    """
    python = _check_machine(found, host)
    needed = set(formats)
    if "safetensors" in needed:
        raise InputError(
            "A checkpoint (safetensors) needs torch, which is never installed on a device",
            "Export it first: arte-edge export RUN --gguf Q4_K_M",
        )
    extras = [] if needed.isdisjoint({"onnx", "onnx-genai"}) else ["onnx"]
    why, sees_system, compiles = "", False, False
    if "gguf" in needed:
        if "gguf" in installed:
            extras.append("gguf")
            why = "llama-cpp-python, compiled there earlier"
        elif compile_there:
            if not found.can_compile:
                raise InputError(
                    f"{host} has no C and C++ compiler to build llama-cpp-python",
                    "Omit --compile to use the prebuilt xllamacpp.",
                )
            extras.append("gguf")
            compiles, why = True, "llama-cpp-python, compiled there (--compile)"
        elif python.has_llama_cpp and runtimes.gguf[0] == "llama-cpp-python":
            sees_system, why = True, "llama-cpp-python, which is installed there already"
        else:
            extras.append("xllamacpp")
            if runtimes.gguf[0] == "xllamacpp":
                reason = "the profile prefers it"
            else:
                remedy = "would have to be compiled (--compile)" if found.can_compile else "there is no compiler"
                reason = f"llama-cpp-python has no wheel and {remedy}"
            why = f"xllamacpp, prebuilt: {reason}"
    return Plan(python, tuple(sorted(extras)), sees_system, compiles, why)


def is_offline(errors: str) -> bool:
    """True if pip's messages say that no package index could be reached."""
    return _OFFLINE.search(errors) is not None


def install_commands(plan: Plan, env: str, wheel: str, *, pip: str = "", wheelhouse: str = "") -> list[list[str]]:
    """Return the commands that make the environment; all paths are absolute paths on the device.

    Args:
        env: folder of the environment.
        wheel: our own wheel.
        pip: a pip wheel, where Python came without ensurepip (Debian without python3-venv).
        wheelhouse: folder of wheels; then nothing is downloaded.
    """
    make = [plan.python.path, "-m", "venv"]
    make += ["--system-site-packages"] if plan.sees_system else []
    make += ["--without-pip"] if pip else []
    python = f"{env}/bin/python"
    # Python can run pip from inside its wheel.
    base = [python, f"{pip}/pip"] if pip else [python, "-m", "pip"]
    install = [*base, "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    if wheelhouse:
        install += ["--no-index", "--find-links", wheelhouse]
    else:
        install += ["--retries", "1", "--timeout", "15"]
    # A missing wheel must end in an error, not in an hour of compiling.
    binary = ["--prefer-binary"] if plan.compiles else ["--only-binary", ":all:"]
    return [
        [*make, env],
        [*install, *binary, *plan.requirements(wheel)],
        # pip does not replace a package by another wheel of the same version.
        [*install, "--no-deps", "--force-reinstall", wheel],
        [python, "-m", "arte_edge", "--version"],
    ]


# Data folders beside the package in a checkout, and in its _data when installed.
_DATA = ("export", "devices", "suites")
# Files that may lie in a checkout but do not belong in a wheel.
_EXCLUDED = {".gguf", ".safetensors", ".onnx", ".pyc", ".so", ".bin"}
_OLDEST_GLIBC_MINOR = 17  # manylinux2014; no runtime has wheels for an older one
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold


def platform_tags(machine: str, glibc_minor: int) -> list[str]:
    """Return the platform tags that pip would accept there, the newest first (PEP 600); glibc 2.0: unknown."""
    minors = range(glibc_minor or _OLDEST_GLIBC_MINOR, _OLDEST_GLIBC_MINOR - 1, -1)
    return [*(f"manylinux_2_{minor}_{machine}" for minor in minors), f"manylinux2014_{machine}"]


def own_wheel(folder: Path) -> Path:
    """Pack the running package into `folder` and return the wheel; raise ArteError if it has no metadata."""
    version = arte_edge.__version__
    info = f"arte_edge-{version}.dist-info"
    files = dict(_package_files())
    lines = ["Metadata-Version: 2.1", "Name: arte-edge", f"Version: {version}", "Requires-Python: >=3.11"]
    files[f"{info}/METADATA"] = "\n".join([*lines, *_requirements(), ""]).encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: arte-edge\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\narte-edge = arte_edge.cli.main:main\n"
    record = [f"{name},sha256={_urlsafe(data)},{len(data)}\n" for name, data in files.items()]
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"arte_edge-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
    return path


def _package_files() -> Iterator[tuple[str, bytes]]:
    package = Path(arte_edge.__file__).parent
    folders = [(package, "arte_edge"), *((catalog.root(kind), f"arte_edge/_data/{kind}") for kind in _DATA)]
    seen = set()
    for folder, prefix in folders:
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
            name = f"{prefix}/{inside.as_posix()}"
            if path.is_file() and not hidden and path.suffix not in _EXCLUDED and name not in seen:
                seen.add(name)
                yield name, path.read_bytes()


def _urlsafe(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def _requirements() -> list[str]:
    """Return the metadata lines for dependencies, from the checkout's pyproject.toml or the installed package."""
    project = Path(arte_edge.__file__).parents[1] / "pyproject.toml"
    if project.is_file():  # first: installed metadata of a checkout may be outdated
        tables = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if tables.get("name") == "arte-edge":
            lines = [f"Requires-Dist: {need}" for need in tables["dependencies"]]
            for extra, needs in tables["optional-dependencies"].items():
                lines.append(f"Provides-Extra: {extra}")
                lines += [f"Requires-Dist: {_with_marker(need, extra)}" for need in needs]
            return lines
    try:
        found = metadata("arte-edge")
    except PackageNotFoundError as error:
        raise ArteError(
            "arte-edge is not installed here, so its dependencies are unknown",
            "pip install arte-edge, or pip install -e . in a checkout",
        ) from error
    keys = ("Provides-Extra", "Requires-Dist")
    return [f"{key}: {value}" for key in keys for value in found.get_all(key) or []]


def _with_marker(need: str, extra: str) -> str:
    """Return a requirement that applies only with `extra`, in addition to its own marker."""
    requirement, _, marker = need.partition(";")
    condition = f'extra == "{extra}"'
    return f"{requirement.strip()} ; " + (f"({marker.strip()}) and {condition}" if marker else condition)


def fetch_wheels(
    requirements: Sequence[str], machine: str, glibc_minor: int, python: tuple[int, ...], folder: Path
) -> list[Path]:
    """Download wheels for a machine with this one's pip, dependencies included, into `folder`.

    Raises ArteError: no pip, no network, or a package has no such wheel.
    """
    version = ".".join(map(str, python[:2]))
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--dest", str(folder), "--implementation", "cp"]
    command += ["--python-version", version, *(f"--platform={t}" for t in platform_tags(machine, glibc_minor))]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise ArteError(
                "The device reaches no package index, and there is no pip here to download its packages",
                "python -m ensurepip, or connect the device to a network for the first run.",
            )
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = re.sub(r"^ERROR: ", "", lines[-1]) if lines else "pip download failed"
        raise ArteError(
            f"The device reaches no package index, and its packages could not be downloaded here: {reason}",
            f"Python {version} on {machine} needs a wheel of each of them.",
        )
    return sorted(folder.glob("*.whl"))


_MARKER = "arte-edge.json"


@dataclass(frozen=True)
class Marker:
    """The environment's own record of its contents, written after a complete installation."""

    wheel: str = ""  # sha256 of our wheel
    extras: tuple[str, ...] = ()


@dataclass
class Site:
    """A connected device with a work folder, ready to run jobs."""

    ssh: Ssh
    found: Probe
    policy: ReconnectPolicy
    say: Callable[[str], None]
    tick: Tick | None = None

    @property
    def work(self) -> str:
        return self.found.work

    def job(self, name: str, python: Python, wheel: str) -> RemoteJob:
        return RemoteJob(self.ssh, f"{self.work}/jobs/{name}", python.path, wheel, self.policy)

    def send(self, blobs: list[Blob]) -> None:
        send(self.ssh, self.work, blobs, policy=self.policy, tick=self.tick)


def send_wheel(site: Site, wheel: Path) -> str:
    """Upload our wheel and return its path on the device; the folder is named after the contents."""
    (blob,) = blobs_of(wheel)
    folder = f"{site.work}/wheels/{blob.sha256[:16]}"
    path = f"{folder}/{wheel.name}"
    if site.ssh.run('[ -e "$1" ] && echo yes; exit 0', path).strip() != "yes":
        site.send([blob])
        place(site.ssh, site.work, folder, [blob])
    return path


def read_marker(ssh: Ssh, env: str) -> Marker:
    """Return the contents of the environment `env`, nothing if it does not exist or is incomplete."""
    text = ssh.run('cat "$1" 2>/dev/null; exit 0', f"{env}/{_MARKER}")
    try:
        value = json_loads(text)
        return Marker(str(value["wheel"]), tuple(str(extra) for extra in value["extras"]))
    except (ValueError, KeyError, TypeError):
        return Marker()


def install(site: Site, plan: Plan, wheel: Path, wheel_there: str) -> str:
    """Make the environment of `plan` and return the path of its interpreter on the device.

    Raises:
        ArteError: a package cannot be installed; contains pip's reason.
        ConnectionLost: the device did not come back in time; the installation continues there.
    """
    env = f"{site.work}/{plan.env_name}"
    python = f"{env}/bin/python"
    marker = read_marker(site.ssh, env)
    checksum = sha256_file(wheel, fresh=True)
    if marker.wheel == checksum and set(plan.extras) <= set(marker.extras):
        return python
    site.say(f"{'updating' if marker.wheel else 'making'} the environment there")
    errors = _try(site, plan, install_commands(plan, env, wheel_there), wheel_there)
    pip = ""
    if "ensurepip" in errors:  # Debian without python3-venv: pip runs from its own wheel
        site.say("its Python has no ensurepip: uploading pip")
        pip = _fetch(site, ["pip"], plan)[0]
        errors = _try(site, plan, install_commands(plan, env, wheel_there, pip=pip), wheel_there)
    if errors and is_offline(errors):
        site.say("no package index reachable: downloading its packages here")
        house = str(PurePosixPath(_fetch(site, plan.requirements(str(wheel)), plan)[0]).parent)
        commands = install_commands(plan, env, wheel_there, pip=pip, wheelhouse=house)
        errors = _try(site, plan, commands, wheel_there)
    if errors:
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        reasons = [line for line in lines if "ERROR" in line or "error:" in line] or lines[-1:]
        raise ArteError(
            f"{site.ssh.host}: the packages could not be installed there: {reasons[-1]}",
            "Installed packages are kept; fix the cause and run the same command again to resume.",
        )
    record = {"wheel": checksum, "extras": sorted({*marker.extras, *plan.extras}), "why": plan.why}
    put_text(site.ssh, f"{env}/{_MARKER}", json.dumps(record))
    return python


def env_bytes_missing(marker: Marker, plan: Plan, sizes: dict[str, int]) -> int:
    """Return roughly how many bytes the installation will add."""
    parts = [extra for extra in plan.extras if extra not in marker.extras] + ([] if marker.wheel else [""])
    return sum(sizes.get(part, 0) for part in parts)


def _try(site: Site, plan: Plan, commands: list[list[str]], wheel_there: str) -> str:
    """Run the commands on the device; return the output of the one that failed, empty if none did."""
    # Named after its content, so that a compilation that outlived its connection is joined, not restarted.
    job = site.job(f"install-{content_key(commands)[:12]}", plan.python, wheel_there)
    if not job.is_prepared():
        job.prepare(commands)
    printed: list[str] = []
    try:
        job.run(printed.append, lambda text: None)
    except JobFailed as error:
        job.remove()
        return "\n".join([*printed, error.log, error.message])
    job.remove()
    return ""


def _fetch(site: Site, requirements: list[str], plan: Plan) -> list[str]:
    """Download wheels with their dependencies here and upload them; return their paths, in one folder."""
    if site.found.system != "Linux":
        raise ArteError(
            f"{site.ssh.host} reaches no package index", "Connect it to a network for the first run; wheels are cached."
        )
    machine = site.found.machine.lower()
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
    with TemporaryDirectory(prefix="arte-edge-") as scratch:
        there = machine, site.found.glibc_minor, plan.python.version
        wheels = fetch_wheels(requirements, *there, Path(scratch))
        blobs = [blob for wheel in wheels for blob in blobs_of(wheel)]
        site.send(blobs)
    folder = f"{site.work}/wheelhouse-{content_key(requirements)[:12]}"
    place(site.ssh, site.work, folder, blobs)
    return [f"{folder}/{blob.name}" for blob in blobs]


_USED = 'du -sk "$1" 2>/dev/null | cut -f1; exit 0'
_FIRST_RUN_BYTES = 1_000_000_000  # an environment with every runtime, and a small model


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    state: Literal["ok", "warning", "failed"]
    text: str
    hint: str = ""


@dataclass(frozen=True)
class Report:
    """All findings of `check`, the most important first."""

    host: str
    findings: tuple[Finding, ...]


def check(profile: Profile) -> Report:
    """Check a device without changing anything on it; problems are findings, not exceptions."""
    remote = reach(profile)
    with Ssh(remote.host, config=remote.ssh_config) as ssh:
        try:
            found = probe(ssh, remote)
            used = ssh.run(_USED, found.work, timeout_s=300).strip()
        except ArteError as error:
            return Report(remote.host, (Finding("ssh", "failed", error.message, error.hint),))
    findings = [Finding("ssh", "ok", f"{found.system} {found.machine}"), *_software(found, profile, remote.host)]
    if found.memory_bytes:
        free = f", {megabytes(found.available_bytes)} free" if found.available_bytes else ""
        findings.append(Finding("memory", "ok", f"{megabytes(found.memory_bytes)}{free}"))
    state: Literal["ok", "warning"] = "ok" if found.free_bytes > _FIRST_RUN_BYTES else "warning"
    hint = "" if state == "ok" else "A first run takes up to 1 GB."
    findings.append(Finding("disk", state, f"{megabytes(found.free_bytes)} free", hint))
    size = megabytes(int(used) * 1024) if used.isdigit() and int(used) else "nothing"
    findings.append(Finding("work folder", "ok", f"{found.work}: {size}"))
    return Report(remote.host, tuple(findings))


def _software(found: Probe, profile: Profile, host: str) -> list[Finding]:
    try:
        chosen = plan(found, ["gguf"], profile.runtimes, host)
    except ArteError as error:
        return [Finding("python", "failed", error.message, error.hint)]
    version = ".".join(map(str, chosen.python.version))
    python = Finding("python", "ok", f"{version}, {chosen.python.path}")
    return [python, Finding("GGUF runtime", "ok", chosen.why)]
