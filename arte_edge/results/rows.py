"""``bench.jsonl``: one line for each measurement, with every sample, beside the files that were measured.

A row is one test of one file (``pp512``: prefill of 512 tokens; ``tg128``: generation of 128) with one
number of threads. Names and units are those of llama.cpp's ``llama-bench -o json`` where they mean
the same, so that its tools read our rows; our own keys have the unit in the name. A test that failed
is a row too, with a status and a reason. Nothing in a row is personal: no host, user, address or path.

Rows are only appended, one JSON object a line, each group written at once and fsynced. A line that a
crash cut off is dropped; it is always the last one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from arte_edge.cache import locked
from arte_edge.errors import ArteError, InputError
from arte_edge.results.accuracy import SCHEMA_VERSION, Answers, DeviceAccuracy, PairedAccuracy, Record, paired_on_common
from arte_edge.store import parse_line

BENCH_NAME = "bench.jsonl"
SIXTEEN_BITS = ("F16", "BF16", "F32", "fp32", "fp16")  # types of a file that others are compared with

# ok; the child process died; the kernel killed it for memory; too long; rejected before it began
Status = Literal["ok", "crashed", "out-of-memory", "timeout", "refused"]


class DeviceFacts(Record):
    """The machine that measured, as far as it matters to speed. `arte_edge.device.detect` fills it."""

    profile: str = Field(default="", description="name of the shipped or own profile, empty if none fits")
    fingerprint: str = Field(description="16 hex digits over the facts that do not change between runs")
    cpu: str = Field(description="the processor's name, as its vendor gives it")
    arch: str = Field(description="x86_64, aarch64, …")
    cores: int = Field(ge=1, description="cores this process may use")
    features: tuple[str, ...] = Field(default=(), description="avx2, avx512_vnni, asimddp, i8mm, …")
    memory_bytes: int = Field(ge=0)
    os: str = Field(default="", description="Linux 6.6, without the build's host")
    governor: str = Field(default="", description="of the clock: performance, ondemand, …")
    virtual: str = Field(default="", description="kvm, qemu-user, container; empty: bare metal or unknown")
    power: str = Field(default="", description="mains, battery; empty: unknown")

    @property
    def names(self) -> set[str]:
        """The names of the device: its profile and its fingerprint."""
        return {self.profile, self.fingerprint} - {""}


class Reading(Record):
    """The sensors at one moment. None: the device does not report it."""

    t_s: float = Field(description="seconds since the test began")
    temperature_c: float | None = None
    clock_mhz: float | None = None
    throttle_bits: int | None = Field(default=None, description="of `vcgencmd get_throttled`, Raspberry Pi")
    power_w: float | None = None


class CpuUse(Record):
    """How the cores were used during one repetition. None: the system does not report it."""

    wall_s: float = Field(ge=0)
    run_share: float = Field(description="CPU time of the benchmark over wall time and threads, spinning too")
    wait_share: float | None = Field(
        default=None, description="largest share of the wall time that one thread was ready but had no core"
    )
    others_cores: float | None = Field(default=None, description="cores that other processes used")
    steal_share: float | None = Field(default=None, description="time taken by a hypervisor over wall time and threads")
    quota_share: float | None = Field(default=None, description="likewise, stopped by a container's limit")
    switches: int | None = Field(default=None, description="involuntary context switches")


class SpeedRow(Record):
    """One test of one file. Times in the unit of the name; `_ts` is tokens a second, as in llama-bench."""

    schema_version: Literal[2] = SCHEMA_VERSION
    status: Status = "ok"
    reason: str = Field(default="", description="why it is not ok, and what to do")

    # the test and the file
    test: str = Field(description="pp512, tg128, tg128@d512, as llama-bench names it")
    model_filename: str = Field(description="name of the file or folder, without its path")
    model_type: str = Field(default="", description="architecture, as in llama")
    model_size: int = Field(ge=0, description="bytes of the file or of a folder's files")
    model_n_params: int = Field(default=0, ge=0)
    format: Literal["gguf", "onnx-genai", "onnx", "safetensors", "null"]
    quantization: str = ""
    sha256: str = Field(default="", description="of the file; of a folder, one hash over its files")
    tensor_sha256: str = Field(default="", description="of the tensor data alone: what results are keyed on")

    # the runtime and its settings
    runtime: str = Field(default="", description="llama_cpp 0.3.36, xllamacpp …, onnxruntime …")
    build_commit: str = Field(default="", description="of llama.cpp, where the runtime reports it")
    build: str = Field(default="", description="the runtime's build, and the CPU features it uses")
    n_threads: int = Field(ge=1)
    n_batch: int = Field(default=0, ge=0)
    n_ubatch: int = Field(default=0, ge=0)
    type_k: str = ""
    type_v: str = ""
    flash_attn: bool | None = None
    use_mmap: bool | None = None
    n_prompt: int = Field(ge=0)
    n_gen: int = Field(ge=0)
    n_depth: int = Field(default=0, ge=0, description="tokens in the KV cache before the test begins")

    # speed
    test_time: str = Field(default="", description="when it began, ISO 8601, UTC")
    n_warmup: int = Field(default=0, ge=0, description="repetitions before the first that counts")
    avg_ns: int = 0
    stddev_ns: int = 0
    avg_ts: float = 0.0
    stddev_ts: float = 0.0
    samples_ns: tuple[int, ...] = ()
    samples_ts: tuple[float, ...] = ()
    median_ts: float = 0.0
    cv: float = Field(default=0.0, description="standard deviation over mean of `samples_ts`")
    load_ms: float | None = Field(default=None, description="from opening the file to a decoder that is ready")
    ttft_ms: float | None = Field(default=None, description="time to first token, median; pp rows")
    ttft_samples_ms: tuple[float, ...] = ()
    itl_p50_ms: float | None = Field(default=None, description="inter-token latency over all tokens; tg rows")
    itl_p90_ms: float | None = Field(default=None, description="only from 64 tokens on (MLPerf)")
    itl_p95_ms: float | None = None
    itl_p99_ms: float | None = Field(default=None, description="only from 662 tokens on (MLPerf)")
    itl_samples_ms: tuple[tuple[float, ...], ...] = Field(default=(), description="[repetition][token]")
    burst_ts: float | None = Field(default=None, description="rate of the first part of the test")
    sustained_ts: float | None = Field(default=None, description="rate of its last third")
    slope_percent_per_min: float | None = Field(default=None, description="of the rate over the test")
    slowed: bool | None = Field(
        default=None, description="the slope is significantly below zero and large enough to matter"
    )

    # memory, temperature, energy
    peak_rss_bytes: int | None = Field(default=None, description="of the child process, with mapped weights")
    mapped_bytes: int | None = Field(default=None, description="resident part of the model's files at the end")
    temperature_c_max: float | None = None
    clock_mhz_min: float | None = None
    throttled: bool | None = Field(default=None, description="None: the device does not report it")
    throttle_reason: str = ""
    energy_j: float | None = Field(default=None, description="measured during the repetitions that count")
    energy_source: str = Field(default="", description="rapl, pmic, ina219, meter; empty: not measured")
    readings: tuple[Reading, ...] = Field(default=(), description="the sensors, about once a second")
    load_average: float | None = Field(default=None, description="of the last minute, before the test")
    cpu: tuple[CpuUse, ...] = Field(default=(), description="how the cores were used, of each sample")
    contended: bool | None = Field(
        default=None, description="other work held the cores; None: the system does not report it"
    )
    contended_reason: str = ""
    n_repeated: int = Field(default=0, ge=0, description="contended samples that were discarded and repeated")

    # predicted by arte_edge.device.roofline
    expected_ts: float | None = None
    expected_from: str = Field(default="", description="probe, published")

    device: DeviceFacts

    @property
    def ok(self) -> bool:
        return self.status == "ok"


class QualityRow(DeviceAccuracy):
    """Accuracy of one file on a task, measured on the device that will run it."""

    schema_version: Literal[2] = SCHEMA_VERSION
    status: Status = "ok"
    reason: str = ""
    model_filename: str
    format: Literal["gguf", "onnx-genai", "onnx", "safetensors", "null"]
    quantization: str = ""
    sha256: str = ""
    tensor_sha256: str = ""
    n_threads: int = Field(ge=1)
    task: str
    split: Literal["test", "validation"]
    answers: Answers = Field(
        default=(), description="per example: sha256 of its input (16 hex digits), the extracted answer, correct or not"
    )
    answer_tokens_mean: float | None = Field(default=None, description="tokens generated per answer")
    device: DeviceFacts


Row = SpeedRow | QualityRow


def paired(row: QualityRow, earlier: Iterable[Row]) -> QualityRow:
    """Return `row` with its difference from the first 16-bit file among the `earlier` rows, if there is one.

    The process that measures knows one file alone, so the rows are paired where they arrive.
    """
    answered = (one for one in (row, *earlier) if isinstance(one, QualityRow) and one.status == "ok")
    reference = next((one for one in answered if one is not row and one.quantization in SIXTEEN_BITS), None)
    if row.status != "ok" or reference is None:
        return row
    found = paired_on_common(reference.model_filename, reference.answers, row.model_filename, row.answers)
    own = set(PairedAccuracy.of("", "", 0, 0).model_fields_set)  # on all examples, not only the common ones
    return row.model_copy(update=found.model_dump(exclude=own))


def disturbance(rate: Any) -> str:
    """Return why a row's or a speed's rate is not the device's: ``contended`` or ``throttled``; empty if it is."""
    return "contended" if rate.contended else "throttled" if rate.throttled else ""


_LEFT_OUT = {
    "contended": "other work held the cores: close it and run the same `arte-edge bench` again",
    "throttled": "the device was throttled: cool it and run the same `arte-edge bench` again",
}


def left_out_notes(disturbances: Iterable[str]) -> tuple[str, ...]:
    """Return a sentence for each kind of disturbance: how many measurements it spoiled, and what to do."""
    counts = Counter(disturbances)
    return tuple(f"{counts[kind]} measurement(s) left out, {why}." for kind, why in _LEFT_OUT.items() if counts[kind])


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append `rows` to `path`, which need not exist. They are on the disk when this returns.

    Raises InputError: the file cannot be written; ArteError: the disk is full; the file is as it was before.
    """
    if not rows:
        return
    data = b"".join(row.model_dump_json().encode() + b"\n" for row in rows)
    with locked("bench", of=path):  # a benchmark here and one on a device may write at the same moment
        try:
            before = path.read_bytes() if path.exists() else b""
            file = path.open("ab")
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        size, last = len(before), before.rpartition(b"\n")[2]
        if last and parse_line(last) is None:  # cut off by a crash
            size -= len(last)
        elif last:  # some editors drop the newline at the end
            data = b"\n" + data
        try:
            with file:
                file.truncate(size)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            os.truncate(path, size)
            raise ArteError(
                f"{path}: {error.strerror}; earlier rows are unchanged", "Free some space and measure again."
            ) from error


def read_rows(path: Path) -> list[Row]:
    """Return the rows of `path` in their order; empty if there is no such file.

    Raises InputError: a line other than the last is damaged, or a row has a version we do not know.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    lines = data.split(b"\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        document = parse_line(line)
        if document is None:
            if number == len(lines):  # no newline: cut off by a crash
                break
            raise InputError(f"{path}:{number}: not a JSON object", "Delete the line; it is one result.")
        rows.append(parse_row(document, f"{path}:{number}"))
    return rows


def parse_row(document: dict[str, Any], where: str, hint: str = "Delete the line; it is one result.") -> Row:
    """Return the row that `document` holds; rows of an older schema version are upgraded.

    Raises InputError: an unknown version or a bad key; the message starts with `where`.
    """
    kind: type[Row] = SpeedRow if "test" in document else QualityRow
    outdated = "Read it with the arte-edge that wrote it, or a newer one."
    return kind.parse(document, where, outdated=outdated, hint=hint)
