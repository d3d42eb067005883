"""A small export folder with a real GGUF file in it, and rows as `arte-edge bench` writes them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from arte_edge.bench.result import DeviceFacts, QualityRow, SpeedRow
from arte_edge.export.student import (
    Accuracy,
    Artifact,
    Data,
    Fidelity,
    Figures,
    Lineage,
    Parent,
    Student,
    StudentFile,
    Tuning,
    write_student,
)
from arte_edge.export.sums import sums_of

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
    """An export of one accepted and one rejected GGUF, with the gate's figures and accuracies."""
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


def accuracy(right: int, **more: Any) -> Accuracy:
    share = right / 40
    found = {"split": "validation", "n": 40, "right": right, "accuracy": share, "low": share - 0.1}
    return Accuracy.model_validate(found | {"high": min(share + 0.1, 1.0)} | more)


def _artifact(folder: Path, name: str) -> Artifact:
    sums = sums_of(folder / name)
    ok = not name.endswith(".rejected")
    figures = Figures(
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
        fidelity=Fidelity(passed=ok, runtime="llama_cpp 0.3.36", figures=figures),
        accuracy=accuracy(32, difference=-0.1, difference_low=-0.2, difference_high=0.0, p_value=0.1),
    )


@pytest.fixture
def tensor_sha256(export_folder: Path) -> str:
    """The tensor hash of the accepted file."""
    return sums_of(export_folder / "tiny-Q8_0.gguf").tensor_sha256


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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start a Hub of our own and log in to it: ``hub(benchmarks=[...])`` returns the server."""
    spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    servers: list[Any] = []

    def start(benchmarks: Sequence[str] = ()) -> Any:
        server = module.FakeHub(list(benchmarks))
        servers.append(server)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", module.TOKEN)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        for name in (
            "ARTE_EDGE_OFFLINE",
            "HF_HUB_OFFLINE",
            "http_proxy",
            "HTTP_PROXY",
            "all_proxy",
            "ALL_PROXY",
        ):
            monkeypatch.delenv(name, raising=False)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
