"""The environment on a device: a virtual environment with the device-side parts only, never torch.

The device installs from its own package index, since that one knows its wheels (piwheels, a
mirror). Only if it reaches none are the wheels fetched here, for its platform, and copied. Nothing is
compiled there unless asked for: of llama-cpp-python there is no ARM wheel, and compiling it
takes a Raspberry Pi most of an hour, so the prebuilt xllamacpp stands in, chosen and said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from arte_edge.device.profile import Runtimes
from arte_edge.device.survey import OLDEST_PYTHON, Python, Survey
from arte_edge.errors import ArteError, InputError

__all__ = ["Plan", "check_machine", "install_commands", "is_offline", "plan"]

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
                    f"{host} has no C and C++ compiler, so llama-cpp-python cannot be compiled there",
                    "Leave --compile out: the prebuilt xllamacpp is taken then.",
                )
            extras.append("gguf")
            compiles, why = True, "llama-cpp-python, compiled there as asked"
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
