"""What is known of a kind of device before one is reached: ``devices/*.toml``, each fact with its source.

A profile holds what a data sheet, a published measurement or a probe says. Which of them it is
stands beside the number, since a peak on paper and a rate that somebody measured differ by half.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arte_edge import catalog
from arte_edge.errors import InputError, nearest

__all__ = ["Fact", "Match", "Profile", "Remote", "Runtimes", "load_profile", "read_profile"]

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
    notes: str = Field(default="", description="cooling, supply, ambient: goes into results as free text")


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
    notes: tuple[str, ...] = ()


def load_profile(ref: str) -> Profile:
    """Return the shipped profile `ref`, or the one in a TOML file.

    Raises:
        InputError: no such profile, not TOML, an unknown key or a bad value; says the file and the key.
    """
    path = catalog.find("devices", ref)
    return read_profile(path)


def read_profile(path: Path) -> Profile:
    """Return the profile in a TOML file. Raises InputError as `load_profile` does."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: not readable as TOML: {error}") from error
    try:
        return Profile.model_validate({"name": path.stem, **tables})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = Profile.model_fields if len(first["loc"]) == 1 else ()
            raise InputError(f"{path}: unknown key '{key}'", nearest(key, known)) from error
        raise InputError(f"{path}: {key}: {first['msg']}") from error
