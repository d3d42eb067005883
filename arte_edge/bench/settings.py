"""What is measured: the models, the settings and suites of settings, and the tests that they multiply out to.

Names and defaults are those of ``llama-bench`` where they mean the same. Lists are written as there:
``1,2,4``, ``1-4``, ``1-9+4``, ``128-1024*2``. A suite is a file ``benchmarks/suites/*.toml`` or the user's own,
with one table ``[bench]`` whose keys are those of `BenchSettings`; the command line overrides it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from arte_edge import catalog
from arte_edge.device.model_size import ModelSize
from arte_edge.errors import InputError
from arte_edge.files import own_name, read_toml, user_path, validated
from arte_edge.machine import threads_from_environment
from arte_edge.results.rows import DeviceFacts
from arte_edge.runtimes.loader import decoder_format, null_ms

Runtime = Literal["auto", "llama-cpp-python", "xllamacpp", "onnxruntime-genai", "onnxruntime", "transformers", "null"]
CacheType = Literal["f16", "f32", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
Split = Literal["test", "validation"]
_MOST_TOKENS = 1_000_000
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?")


class _Protocol(BaseModel):
    """How each test is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repetitions: int = Field(default=5, ge=1, le=10_000)
    warmup: bool = Field(default=True, description="repeat until the rate is steady before measuring")
    warmup_s: float = Field(default=20.0, gt=0, description="longest warm-up")
    delay_s: float = Field(default=0.0, ge=0, description="pause before each test")
    sustained_s: float = Field(default=0.0, ge=0, description="keep decoding for this long")
    timeout_s: float = Field(
        default=1800.0, gt=0, description="timeout per test, on top of `sustained_s`, and per answer to a task"
    )
    power_watts: float | None = Field(default=None, gt=0, description="steady reading of an external meter")
    runtime: Runtime = "auto"
    roofline: bool = Field(default=True, description="also predict the decode rate from memory bandwidth")


class BenchSettings(_Protocol):
    """How to measure. Every list multiplies the tests."""

    n_prompt: tuple[int, ...] = Field(default=(512,), description="prompt tokens; 0: no prefill test")
    n_gen: tuple[int, ...] = Field(default=(128,), description="generated tokens; 0: no decode test")
    n_depth: tuple[int, ...] = Field(default=(0,), description="tokens already in the KV cache (context depth)")
    threads: tuple[int, ...] = Field(default=(0,), description="0: one per fast physical core")
    type_k: tuple[CacheType, ...] = Field(default=("f16",), description="KV-cache type for keys (GGUF only)")
    type_v: tuple[CacheType, ...] = Field(default=("f16",), description="KV-cache type for values (GGUF only)")

    @field_validator("n_prompt", "n_gen", "n_depth", mode="before")
    @classmethod
    def _counts(cls, value: Any) -> Any:
        if isinstance(value, int):
            return (value,)
        return parse_counts(value) if isinstance(value, str) else value

    @field_validator("threads", mode="before")
    @classmethod
    def _threads(cls, value: Any) -> Any:
        if isinstance(value, str):
            return parse_counts(value, threads=True)
        if isinstance(value, list | tuple):
            return tuple(0 if item == "auto" else item for item in value)
        return (value,) if isinstance(value, int) else value

    @field_validator("n_prompt", "n_gen", "n_depth", "threads")
    @classmethod
    def _in_range(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not values or min(values) < 0 or max(values) > _MOST_TOKENS:
            raise ValueError(f"must be numbers from 0 to {_MOST_TOKENS}, at least one")
        return tuple(dict.fromkeys(values))

    @field_validator("type_k", "type_v", mode="before")
    @classmethod
    def _types(cls, value: Any) -> Any:
        if not value:
            raise ValueError("must name at least one type")
        return tuple(value.split(",")) if isinstance(value, str) else value

    @property
    def context_tokens(self) -> int:
        """Tokens in the KV cache at the end of the longest test."""
        return max(self.n_depth) + max(*self.n_prompt, *self.n_gen)


class Reporter:
    """Receives progress and ignores it; subclasses show it."""

    def progress(self, text: str) -> None:
        """Called often with the current activity."""

    def note(self, text: str) -> None:
        """Called with a message for the user."""

    def transfer(self, name: str, done_bytes: int, total_bytes: int) -> None:
        """Called while a file is uploaded to a device."""


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
    grammar: bool = True
    answer_tokens: int = 0  # budget of an answer; 0: what the student.json beside the file says


class Case(_Protocol):
    """One test of one model, complete, as the child process gets it. Either `n_prompt` or `n_gen` is 0."""

    path: Path
    n_prompt: int
    n_gen: int
    n_depth: int
    threads: int
    type_k: str
    type_v: str

    @property
    def test(self) -> str:
        """``pp512``, ``tg128@d1024``: as llama-bench calls it."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name}@d{self.n_depth}" if self.n_depth else name

    @property
    def context_tokens(self) -> int:
        return self.n_prompt + self.n_gen + self.n_depth


def cases(path: Path, settings: BenchSettings, device: DeviceFacts) -> Iterator[Case]:
    """Yield the cases of one model, in the order of llama-bench: threads, depth, then prefill and decode."""
    common = settings.model_dump(include=set(_Protocol.model_fields) - {"sustained_s"})
    tests = [(n, 0) for n in settings.n_prompt if n] + [(0, n) for n in settings.n_gen if n]
    for type_k, type_v, threads, n_depth, (n_prompt, n_gen) in product(
        settings.type_k, settings.type_v, settings.threads, settings.n_depth, tests
    ):
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

        with contextlib.suppress(InputError):  # a user's profile that was removed
            threads = min(threads, find_device(device.profile).cores)
    return max(1, threads)


def threads_note(device: DeviceFacts) -> str:
    """Return how many threads ``auto`` is, and what sets it."""
    count = decode_threads(device)
    source = "one per fast core; -t or ARTE_EDGE_THREADS sets another number"
    source = "set by ARTE_EDGE_THREADS" if threads_from_environment() else source
    ignored = "; OMP_NUM_THREADS has no effect" if os.environ.get("OMP_NUM_THREADS") else ""
    return f"{count} thread{'s' * (count != 1)} ({source}{ignored})"


def parse_counts(text: str, *, threads: bool = False) -> tuple[int, ...]:
    """Return the numbers of a list in llama-bench's notation; raise ValueError if it is none or too long.

    Args:
        threads: ``auto`` is allowed and becomes 0; the number 0 is not.
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
            raise ValueError("threads must be at least 1; auto uses one per fast core")
        step, number, previous = int(found[4] or 1), first, -1
        numbers.append(number)
        while len(numbers) <= 1000:
            number, previous = (number * step if found[3] == "*" else number + step), number
            if not previous < number <= last:
                break
            numbers.append(number)
        if len(numbers) > 1000:
            raise ValueError(f"'{text}' has more than a thousand numbers; use a larger step")
    return tuple(numbers)


_TABLE = "bench"


def load_suite(ref: str) -> dict[str, Any]:
    """Return the settings of the suite `ref`, a shipped name or a ``.toml``; raise InputError if it is invalid."""
    path = catalog.find("suites", ref)
    document = read_toml(path)
    table = document.pop(_TABLE, {})
    if document or not isinstance(table, dict):
        problem = f"unknown table '{next(iter(document))}'" if document else f"{_TABLE} is not a table"
        raise InputError(f"{path}: {problem}", f"A suite has one table, [{_TABLE}].")
    make_settings(str(path), table)
    return table


def make_settings(source: str, *layers: Mapping[str, Any]) -> BenchSettings:
    """Return the settings of `layers`, the last one first in priority; InputError lists every problem."""
    values = {key: value for layer in layers for key, value in layer.items()}
    return validated(BenchSettings, values, source)


@dataclass(frozen=True)
class Target:
    """One model to measure, as its rows describe it."""

    path: Path
    format: Literal["gguf", "onnx-genai", "onnx", "safetensors", "null"]
    model_filename: str
    model_type: str = ""
    model_size: int = 0
    model_n_params: int = 0
    quantization: str = ""
    sha256: str = ""
    tensor_sha256: str = ""

    @property
    def row_fields(self) -> dict[str, Any]:
        """What every row says of its model."""
        keys = ("model_filename", "format", "quantization", "sha256", "tensor_sha256")
        return {key: getattr(self, key) for key in keys}


def find_targets(refs: Sequence[str], fetch: Callable[[str], Path]) -> list[Path]:
    """Return the files and folders that `refs` name, in order, without duplicates.

    The folder of a run means its export; an export means all its files that passed verification.

    Args:
        fetch: returns the file of a registry name or Hub id.

    Raises InputError: there is no such model, or no file of an export passed.
    """
    found: dict[Path, None] = {}
    for ref in refs:
        path = user_path(ref, recorded=True)
        if null_ms(Path(ref)) is not None and not path.exists():
            found[Path(ref)] = None
        elif path.is_dir():
            found |= dict.fromkeys(_in_folder(path))
        else:
            found[path if path.is_file() else fetch(ref)] = None
    return list(found)


def _in_folder(folder: Path) -> list[Path]:
    from arte_edge.results.student_json import FILE_NAME, read_student

    for place in (folder, folder / "export"):
        if (place / FILE_NAME).is_file() and (student := read_student(place)) is not None:
            files = [place / artifact.file for artifact in student.artifacts if artifact.status == "ok"]
            if not files:
                raise InputError(f"{place}: no file here passed verification", "See student.json for the reasons.")
            if missing := [file.name for file in files if not file.exists()]:
                raise InputError(f"{place}: {missing[0]} is missing", "Export it again.")
            return files
    try:
        decoder_format(folder)
        return [folder]
    except InputError:
        if ggufs := sorted(folder.glob("*.gguf")):
            return ggufs
        if (folder / "run.toml").is_file():
            raise InputError(f"{folder}: nothing is exported yet", f"arte-edge export {folder}") from None
        raise


def describe(path: Path) -> Target:
    """Return the format, sizes and checksums of `path`. Raises InputError if it is not a model, or damaged."""
    kind = decoder_format(path)
    if kind == "null":
        return Target(path, "null", path.name)
    size = ModelSize.of(path)
    files = path.rglob("*") if path.is_dir() else [path]
    sha256, tensor_sha256, quantization = _checksums(path, kind)
    return Target(
        path=path,
        format=kind,  # type: ignore[arg-type]
        model_filename=own_name(path),
        model_type=size.architecture,
        model_size=sum(file.stat().st_size for file in files if file.is_file()),
        model_n_params=size.n_params,
        quantization=quantization or size.quantization,
        sha256=sha256,
        tensor_sha256=tensor_sha256,
    )


def _checksums(path: Path, kind: str) -> tuple[str, str, str]:
    """Return the sha256, the sha256 of the tensors and the quantization, empty where unknown."""
    from arte_edge.cache import sha256_checkpoint, sha256_file
    from arte_edge.models.artifact import checksums_of
    from arte_edge.results.student_json import read_student
    from arte_edge.runtimes.onnxruntime import onnx_precision

    if kind == "safetensors":
        return sha256_checkpoint(path), "", ""
    try:
        student = read_student(path.resolve().parent)
    except InputError:  # a damaged student.json does not prevent measuring
        student = None
    artifacts = student.artifacts if student else ()
    own = next((a for a in artifacts if a.file.rstrip("/") == path.resolve().name), None)
    if own is not None and path.is_file() and own.sha256 == sha256_file(path):
        return own.sha256, own.tensor_sha256, own.quantization
    sums = checksums_of(path)
    label = own.quantization if own else onnx_precision(path) if path.is_dir() else ""
    return sums.sha256, sums.tensor_sha256, label
