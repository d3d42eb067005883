"""What is installed on a device: this very package as a wheel, and, for a device without internet, everything else.

The wheel is packed from the files that run here, an installed package and a checkout alike: no
build tool, no network, and the device runs exactly the code that asks it. The same files give the
same bytes, so that a device that has them is not sent them again. The format is PEP 427's.
"""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import arte_edge
from arte_edge import catalog
from arte_edge.errors import ArteError

__all__ = ["Target", "fetch_wheels", "own_wheel"]

# Data rooms that live beside the package in a checkout, and in its _data when installed.
_ROOMS = ("export", "devices", "suites")
# What a working checkout collects and no wheel holds.
_NEVER = {".gguf", ".safetensors", ".onnx", ".pyc", ".so", ".bin"}
_OLDEST_GLIBC_MINOR = 17  # manylinux2014; no runtime of ours has wheels for an older one
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold


@dataclass(frozen=True)
class Target:
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
    for folder, place in rooms:
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
            name = f"{place}/{inside.as_posix()}"
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


def fetch_wheels(requirements: Sequence[str], target: Target, folder: Path) -> list[Path]:
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
