"""Benchmark settings, named suites of them, and the single tests that their lists multiply out to.

Names and defaults are those of ``llama-bench`` where they mean the same. Lists are written as there:
``1,2,4``, ``1-4``, ``1-9+4``, ``128-1024*2``. A suite is a file ``benchmarks/suites/*.toml`` or the user's own,
with one table ``[bench]`` whose keys are those of `BenchSettings`; the command line overrides it.
"""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from arte_edge import catalog
from arte_edge.errors import InputError, nearest
from arte_edge.results.rows import DeviceFacts
from arte_edge.threads import threads_from_environment

__all__ = [
    "BenchSettings",
    "Case",
    "Split",
    "cases",
    "decode_threads",
    "load_suite",
    "make_settings",
    "parse_counts",
]

Runtime = Literal[
    "auto", "llama-cpp-python", "xllamacpp", "onnxruntime-genai", "onnxruntime", "transformers", "null"
]
CacheType = Literal["f16", "f32", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
Split = Literal["test", "validation"]
_MOST_TOKENS = 1_000_000
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?")


class BenchSettings(BaseModel):
    """How to measure. Every list multiplies the cases. Times in the unit of the name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_prompt: tuple[int, ...] = Field(default=(512,), description="prompt tokens; 0: no prefill test")
    n_gen: tuple[int, ...] = Field(default=(128,), description="generated tokens; 0: no decode test")
    n_depth: tuple[int, ...] = Field(
        default=(0,), description="tokens already in the KV cache (context depth)"
    )
    threads: tuple[int, ...] = Field(default=(0,), description="0: one per fast physical core")
    repetitions: int = Field(default=5, ge=1, le=10_000)
    warmup: bool = Field(default=True, description="repeat until the rate is steady before measuring")
    warmup_s: float = Field(default=20.0, gt=0, description="longest warm-up")
    delay_s: float = Field(default=0.0, ge=0, description="pause before each test")
    sustained_s: float = Field(default=0.0, ge=0, description="keep decoding for this long")
    timeout_s: float = Field(default=1800.0, gt=0, description="timeout per test, on top of `sustained_s`")
    power_watts: float | None = Field(default=None, gt=0, description="steady reading of an external meter")
    type_k: tuple[CacheType, ...] = Field(default=("f16",), description="KV-cache type for keys (GGUF only)")
    type_v: tuple[CacheType, ...] = Field(
        default=("f16",), description="KV-cache type for values (GGUF only)"
    )
    runtime: Runtime = "auto"
    roofline: bool = Field(default=True, description="also predict the decode rate from memory bandwidth")

    @field_validator("n_prompt", "n_gen", "n_depth", mode="before")
    @classmethod
    def _counts(cls, value: Any) -> Any:
        if isinstance(value, int):
            return (value,)
        return parse_counts(value) if isinstance(value, str) else value

    @field_validator("type_k", "type_v", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("n_prompt", "n_gen", "n_depth", "threads")
    @classmethod
    def _in_range(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not values or min(values) < 0 or max(values) > _MOST_TOKENS:
            raise ValueError(f"must be numbers from 0 to {_MOST_TOKENS}, at least one")
        return tuple(dict.fromkeys(values))

    @field_validator("threads", mode="before")
    @classmethod
    def _threads(cls, value: Any) -> Any:
        if isinstance(value, str):
            return parse_counts(value, threads=True)
        if isinstance(value, list | tuple):
            return tuple(0 if item == "auto" else item for item in value)
        return (value,) if isinstance(value, int) else value

    @field_validator("type_k", "type_v")
    @classmethod
    def _some(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if not values:
            raise ValueError("must name at least one type")
        return values

    @property
    def context_tokens(self) -> int:
        """Tokens in the KV cache at the end of the longest test."""
        return max(self.n_depth) + max(*self.n_prompt, *self.n_gen)


class Reporter:
    """Receives progress; this one ignores it. Subclass it to show something."""

    def progress(self, text: str) -> None:
        """Called often with what is being done now."""

    def note(self, text: str) -> None:
        """Called with what a user should see once."""

    def transfer(self, name: str, done_bytes: int, total_bytes: int) -> None:
        """Called while a file is copied to a device."""


class Request(BaseModel):
    """One benchmark, complete, as it is sent to a device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = ""
    settings: BenchSettings = BenchSettings()
    task: str | None = None
    split: Split = "test"
    limit: int = 0
    bbh: Path | None = None
    speed: bool = True


class Case(BaseModel):
    """One test of one model, all that the child process has to know. Either `n_prompt` or `n_gen` is 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    runtime: str
    n_prompt: int
    n_gen: int
    n_depth: int
    threads: int
    type_k: str
    type_v: str
    repetitions: int
    warmup: bool
    warmup_s: float
    delay_s: float
    sustained_s: float
    power_watts: float | None
    timeout_s: float
    roofline: bool = False

    @property
    def test(self) -> str:
        """``pp512``, ``tg128@d1024``: as llama-bench calls it."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name}@d{self.n_depth}" if self.n_depth else name

    @property
    def context_tokens(self) -> int:
        return self.n_prompt + self.n_gen + self.n_depth


def cases(path: Path, settings: BenchSettings, device: DeviceFacts) -> Iterator[Case]:
    """Yield the cases of one model, in the order of llama-bench: threads, depth, then reading and writing."""
    common = settings.model_dump(
        include={
            "runtime",
            "repetitions",
            "warmup",
            "warmup_s",
            "delay_s",
            "power_watts",
            "timeout_s",
            "roofline",
        }
    )
    for type_k in settings.type_k:
        for type_v in settings.type_v:
            for threads in settings.threads:
                for n_depth in settings.n_depth:
                    tests = [(n, 0) for n in settings.n_prompt] + [(0, n) for n in settings.n_gen]
                    for n_prompt, n_gen in tests:
                        if n_prompt or n_gen:
                            yield Case(
                                path=path,
                                n_prompt=n_prompt,
                                n_gen=n_gen,
                                n_depth=n_depth,
                                threads=threads or decode_threads(device),
                                type_k=type_k,
                                type_v=type_v,
                                sustained_s=settings.sustained_s if n_gen else 0.0,
                                **common,
                            )


def decode_threads(device: DeviceFacts) -> int:
    """Return the number of decode threads: one per fast physical core, or ``ARTE_EDGE_THREADS``.

    Two threads of one core share its arithmetic units, and the slow cores of a big.LITTLE processor
    delay the fast ones.
    """
    if threads := threads_from_environment():
        return threads
    import psutil

    threads = min(device.cores, psutil.cpu_count(logical=False) or device.cores)
    if device.profile:
        from arte_edge.device.profiles import find_device

        with contextlib.suppress(InputError):  # an own profile that is gone
            threads = min(threads, find_device(device.profile).cores)
    return max(1, threads)


def parse_counts(text: str, *, threads: bool = False) -> tuple[int, ...]:
    """Return the numbers of a list in llama-bench's notation.

    Args:
        threads: ``auto`` is allowed and becomes 0; the number 0 is not.

    Raises:
        ValueError: not such a list, or more than a thousand numbers.
    """
    numbers: list[int] = []
    for part in text.split(","):
        if threads and part.strip() == "auto":
            numbers.append(0)
            continue
        found = _RANGE.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"'{part}' is not a number or a range such as 1-8*2")
        first, last = int(found[1]), int(found[2] or found[1])
        if threads and first == 0:
            raise ValueError("0 threads cannot work; auto uses one per fast core")
        numbers += _steps(first, last, found[3] or "+", int(found[4] or 1))
        if len(numbers) > 1000:
            raise ValueError(f"'{text}' has more than a thousand numbers; use a larger step")
    return tuple(numbers)


def _steps(first: int, last: int, sign: str, step: int) -> Sequence[int]:
    numbers = [first]
    while len(numbers) <= 1001:
        following = numbers[-1] + step if sign == "+" else numbers[-1] * step
        if following > last or following <= numbers[-1]:
            break
        numbers.append(following)
    return numbers


_TABLE = "bench"


def load_suite(ref: str) -> dict[str, Any]:
    """Return the settings of the suite `ref`, a shipped name or a ``.toml``.

    Raises:
        InputError: there is none, it is not TOML, or a key or value is wrong; says which.
    """
    path = catalog.find("suites", ref)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from error
    if unknown := [key for key in document if key != _TABLE]:
        raise InputError(f"{path}: unknown table '{unknown[0]}'", f"A suite has one table, [{_TABLE}].")
    table = document.get(_TABLE, {})
    if not isinstance(table, dict):
        raise InputError(f"{path}: {_TABLE} is no table", f"A suite has one table, [{_TABLE}].")
    make_settings(str(path), table)
    return table


def make_settings(source: str, *layers: Mapping[str, Any]) -> BenchSettings:
    """Return the settings of `layers`, the last on top; `source` is named in errors.

    Raises:
        InputError: every problem at once, an unknown key with its nearest neighbour.
    """
    values = {key: value for layer in layers for key, value in layer.items()}
    try:
        return BenchSettings.model_validate(values)
    except ValidationError as error:
        problems, hints = [], []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                problems.append(f"unknown key '{key}'")
                hints.append(nearest(key, BenchSettings.model_fields))
            else:
                problems.append(f"{key}: {item['msg'].removeprefix('Value error, ')}")
        raise InputError(f"{source}: {'; '.join(problems)}", " ".join(hints)) from error
