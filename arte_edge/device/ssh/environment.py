"""The environment on a device: a virtual environment with the device-side packages only, never torch.

The device installs from its own package index, since that one knows its wheels (piwheels, a
mirror). Only if it reaches none are the wheels fetched here, for its platform, and copied. Nothing is
compiled there unless requested: there is no ARM wheel of llama-cpp-python, and compiling it takes a
Raspberry Pi most of an hour, so the prebuilt xllamacpp is used instead.
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
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import arte_edge
from arte_edge import catalog
from arte_edge.cache import sha256_file
from arte_edge.device.profiles import Runtimes
from arte_edge.device.ssh.connection import Patience, Ssh
from arte_edge.device.ssh.job import JobFailed, RemoteJob
from arte_edge.device.ssh.probe import OLDEST_PYTHON, Python, Survey
from arte_edge.device.ssh.upload import Blob, Tick, blobs_of, place, put_text, send
from arte_edge.errors import ArteError, InputError
from arte_edge.store import content_key

__all__ = [
    "Marker",
    "Plan",
    "Platform",
    "Site",
    "check_machine",
    "env_bytes_missing",
    "fetch_wheels",
    "install",
    "install_commands",
    "is_offline",
    "own_wheel",
    "plan",
    "read_marker",
    "send_wheel",
]

# Machines for which every runtime publishes wheels, as `uname -m` prints them.
_MACHINES = ("aarch64", "arm64", "x86_64", "amd64")
# What pip says when the index is out of reach, not when a package is missing on it.
_OFFLINE = (
    "Temporary failure in name resolution",
    "Name or service not known",
    "nodename nor servname provided",
    "Network is unreachable",
    "No route to host",
    "Connection refused",
    "Max retries exceeded",
    "Failed to establish a new connection",
    "NewConnectionError",
    "ConnectTimeoutError",
    "Read timed out",
)


@dataclass(frozen=True)
class Plan:
    """What the environment there shall be."""

    python: Python
    extras: tuple[str, ...]
    sees_system: bool  # packages of the interpreter's own environment are used too
    compiles: bool
    why: str  # the GGUF runtime and the reason for it, in words; empty without GGUF

    @property
    def env_name(self) -> str:
        """The environment's folder: one an interpreter; the parts that are added later join those in it."""
        parts = (self.python.path, str(self.python.version), str(self.sees_system))
        return f"env-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"

    def requirements(self, wheel: str) -> list[str]:
        """Return what pip is given: our wheel with its extras, and what goes with a runtime that is there."""
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        return [f"{wheel}{extras}", *(["gguf>=0.17"] if self.sees_system else [])]


def check_machine(found: Survey, host: str) -> Python:
    """Return the interpreter to use.

    Raises:
        ArteError: 32-bit, an unknown architecture, no Python or one that is too old; says what to do.
    """
    if found.machine.lower() not in _MACHINES:
        raise ArteError(
            f"{host} is a {found.machine or 'nameless'} system, and no runtime has wheels for it",
            "A 64-bit system is needed: Raspberry Pi OS (64-bit) runs on a Zero 2 W, a 3, a 4 and a 5.",
        )
    wanted = ".".join(map(str, OLDEST_PYTHON))
    by_hand = (
        f"Raspberry Pi OS 12 and Debian 12 have Python {wanted}. Without root: `uv python install {wanted}` there, "
        "and its path as `python` under [remote] of the device's profile."
    )
    if not found.pythons:
        raise ArteError(f"{host} has no Python", by_hand)
    if (python := found.python) is None:
        newest = max(python.version for python in found.pythons)
        raise ArteError(
            f"{host} has Python {'.'.join(map(str, newest))}; arte-edge needs {wanted} or newer", by_hand
        )
    if python.bits != 64:
        raise ArteError(
            f"{host} runs a 32-bit Python on a 64-bit kernel; no runtime has wheels for it", by_hand
        )
    return python


def plan(
    found: Survey,
    formats: Iterable[str],
    runtimes: Runtimes,
    host: str,
    *,
    compile_there: bool = False,
    installed: Iterable[str] = (),
) -> Plan:
    """Choose what is installed for these formats.

    Args:
        formats: gguf, onnx-genai, onnx.
        runtimes: the profile's order of preference.
        compile_there: llama-cpp-python may be compiled on the device.
        installed: extras that the environment there has already.

    Raises:
        InputError: a format that needs torch, or compiling was asked for where no compiler is.
        ArteError: as `check_machine`.
    """
    python = check_machine(found, host)
    wanted = set(formats)
    if "safetensors" in wanted:
        raise InputError(
            "A checkpoint (safetensors) needs torch, which is never installed on a device",
            "Export it first: arte-edge export RUN --gguf Q4_K_M",
        )
    extras = [] if wanted.isdisjoint({"onnx", "onnx-genai"}) else ["onnx"]
    why, sees_system, compiles = "", False, False
    if "gguf" in wanted:
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
            reason = (
                "the profile prefers it"
                if runtimes.gguf[0] == "xllamacpp"
                else "llama-cpp-python has no wheel and would have to be compiled (--compile)"
                if found.can_compile
                else "llama-cpp-python has no wheel and there is no compiler"
            )
            why = f"xllamacpp, prebuilt: {reason}"
    return Plan(python, tuple(sorted(extras)), sees_system, compiles, why)


def is_offline(errors: str) -> bool:
    """True if pip's words say that no package index could be reached."""
    return any(mark in errors for mark in _OFFLINE)


def install_commands(
    plan: Plan, env: str, wheel: str, *, pip: str = "", wheelhouse: str = ""
) -> list[list[str]]:
    """Return the commands, to be run there, that make the environment.

    Args:
        env: folder of the environment, absolute.
        wheel: our own wheel there.
        pip: a pip wheel there, where Python came without ensurepip (Debian without python3-venv).
        wheelhouse: folder of wheels there; nothing is downloaded then.
    """
    make = [plan.python.path, "-m", "venv"]
    make += ["--system-site-packages"] if plan.sees_system else []
    make += ["--without-pip"] if pip else []
    python = f"{env}/bin/python"
    # A wheel is a zip, from which Python runs pip as it is.
    base = [python, f"{pip}/pip"] if pip else [python, "-m", "pip"]
    install = [*base, "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    if wheelhouse:
        install += ["--no-index", "--find-links", wheelhouse]
    else:
        install += ["--retries", "1", "--timeout", "15"]
    # A missing wheel must end in a message, not in an hour of compiling that nobody asked for.
    binary = ["--prefer-binary"] if plan.compiles else ["--only-binary", ":all:"]
    return [
        [*make, env],
        [*install, *binary, *plan.requirements(wheel)],
        # pip takes a wheel of the same version for the same wheel, whatever is in it.
        [*install, "--no-deps", "--force-reinstall", wheel],
        [python, "-m", "arte_edge", "--version"],
    ]


# Data rooms that live beside the package in a checkout, and in its _data when installed.
_ROOMS = ("export", "devices", "suites")
# What a working checkout collects and no wheel holds.
_NEVER = {".gguf", ".safetensors", ".onnx", ".pyc", ".so", ".bin"}
_OLDEST_GLIBC_MINOR = 17  # manylinux2014; no runtime of ours has wheels for an older one
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold


@dataclass(frozen=True)
class Platform:
    """The interpreter that wheels are for."""

    machine: str  # as `uname -m` prints it
    python: tuple[int, int]
    glibc_minor: int  # of glibc 2.x; 0: another C library, or macOS

    @property
    def platforms(self) -> list[str]:
        """Return the platform tags that pip would accept there, the newest first (PEP 600)."""
        newest = self.glibc_minor or _OLDEST_GLIBC_MINOR
        tags = [f"manylinux_2_{minor}_{self.machine}" for minor in range(newest, _OLDEST_GLIBC_MINOR - 1, -1)]
        return [*tags, f"manylinux2014_{self.machine}"]


def own_wheel(folder: Path) -> Path:
    """Pack the running package into `folder` and return the wheel.

    Raises:
        ArteError: the package's metadata are not to be found.
    """
    version = arte_edge.__version__
    info = f"arte_edge-{version}.dist-info"
    files = dict(_package_files())
    files[f"{info}/METADATA"] = _metadata(version).encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: arte-edge\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
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
    rooms = [(package, "arte_edge")]
    rooms += [(catalog.root(kind), f"arte_edge/_data/{kind}") for kind in _ROOMS]
    seen = set()
    for folder, prefix in rooms:
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
            name = f"{prefix}/{inside.as_posix()}"
            if path.is_file() and not hidden and path.suffix not in _NEVER and name not in seen:
                seen.add(name)
                yield name, path.read_bytes()


def _urlsafe(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def _metadata(version: str) -> str:
    lines = ["Metadata-Version: 2.1", "Name: arte-edge", f"Version: {version}", "Requires-Python: >=3.11"]
    return "\n".join([*lines, *_requirements(), ""])


def _requirements() -> list[str]:
    """Return the lines on dependencies: of the checkout, since its installed metadata grow old, else of the package."""
    project = Path(arte_edge.__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        tables = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if tables.get("name") == "arte-edge":
            extras = tables["optional-dependencies"]
            return [f"Requires-Dist: {need}" for need in tables["dependencies"]] + [
                line
                for extra, needs in extras.items()
                for line in (
                    f"Provides-Extra: {extra}",
                    *(f"Requires-Dist: {_under(need, extra)}" for need in needs),
                )
            ]
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        found = metadata("arte-edge")
    except PackageNotFoundError as error:
        raise ArteError(
            "arte-edge is not installed here, so what it needs on a device is not known",
            "pip install arte-edge, or pip install -e . in a checkout",
        ) from error
    keys = ("Provides-Extra", "Requires-Dist")
    return [f"{key}: {value}" for key in keys for value in found.get_all(key) or []]


def _under(need: str, extra: str) -> str:
    """Return a requirement that holds only with `extra`; one that has a marker of its own keeps it."""
    requirement, _, marker = need.partition(";")
    condition = f'extra == "{extra}"'
    return f"{requirement.strip()} ; " + (f"({marker.strip()}) and {condition}" if marker else condition)


def fetch_wheels(requirements: Sequence[str], target: Platform, folder: Path) -> list[Path]:
    """Download wheels for `target` with this machine's pip, dependencies included, into `folder`.

    Args:
        requirements: as pip takes them; a path of a wheel may carry extras: ``x.whl[onnx]``.

    Raises:
        ArteError: pip is missing here, no network, or a package has no wheel for such a device.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--dest", str(folder), "--implementation", "cp"]
    command += ["--python-version", ".".join(map(str, target.python))]
    command += [word for tag in target.platforms for word in ("--platform", tag)]
    done = subprocess.run(
        [*command, *requirements], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise ArteError(
                "The device reaches no package index, and there is no pip here to fetch its packages with",
                "python -m ensurepip, or give the device a network for the first run.",
            )
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        said = re.sub(r"^ERROR: ", "", lines[-1]) if lines else "pip download failed"
        raise ArteError(
            f"The device reaches no package index, and its packages could not be fetched here: {said}",
            f"Python {'.'.join(map(str, target.python))} on {target.machine} needs a wheel of each of them.",
        )
    return sorted(folder.glob("*.whl"))


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
        ConnectionLost: the device did not come back in time; the installation continues there.
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
        site.say("its Python has no ensurepip: uploading pip")
        pip = _fetch(site, ["pip"], plan)[0]
        said = _try(site, plan, install_commands(plan, env, wheel_there, pip=pip), wheel_there)
    if said and is_offline(said):
        site.say("no package index reachable: downloading its packages here")
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
            "Connect it to a network for the first run; wheels are cached.",
        )
    target = Platform(_wheel_machine(site.found.machine), plan.python.version[:2], site.found.glibc_minor)
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
        f"{host}: the packages could not be installed there: {errors[-1] if errors else 'no reason reported'}",
        "Installed packages are kept; fix the cause and run the same command again to resume.",
    )
