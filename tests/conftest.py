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

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from arte_edge.models import LocalModel, resolve

# A test says what must hold, not how busy the machine may be meanwhile.
settings.register_profile("arte", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("arte")
# The engine's layout is the default one in every test, whatever this machine would measure.
os.environ.setdefault("ARTE_EDGE_PROBE", "0")


@pytest.fixture(scope="session")
def smollm2() -> LocalModel:
    """The real SmolLM2-135M-Instruct from the user's cache, fetched if it is not there."""
    return resolve("smollm2-135m-instruct")


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
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
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
