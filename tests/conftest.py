"""What every room's tests may ask for: the real small model, and a model cache of their own.

The cache starts empty, with a Hub that cannot be reached and a package index that
holds only the wheels a test writes, so that no test depends on a network.
"""

import hashlib
import os
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny
from filelock import FileLock
from hypothesis import HealthCheck, settings
from tiny import Folders, Make, Patch

from arte_edge.machine import available_cores
from arte_edge.models import LocalModel, resolve
from arte_edge.models.artifact import checksums_of
from arte_edge.results.student_json import Data, Fidelity, Lineage, Parent, Tuning, write_student

# A test says what must hold, not how busy the machine may be meanwhile.
settings.register_profile("arte", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("arte")
# The engine's layout is the default one in every test, whatever this machine would measure.
os.environ.setdefault("ARTE_EDGE_PROBE", "0")
if sys.platform == "darwin":  # hosted Macs report a GPU that they cannot use
    os.environ.setdefault("ARTE_EDGE_DEVICE", "cpu")


_WORKERS = 4  # at most: each may hold real models


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the workers of ``pytest -n auto``: the cores that this process may use, not those of the machine."""
    return min(_WORKERS, available_cores())


def pytest_configure() -> None:
    """Give each of several workers a core of its own: threads would wait for the other workers'."""
    worker, n_worker = (os.environ.get(f"PYTEST_XDIST_WORKER{name}", "") for name in ("", "_COUNT"))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if worker and 1 < int(n_worker) <= len(cores):
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw"))]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests or real models: at the end no worker waits for another's long file."""
    marks: dict[Path, set[str]] = defaultdict(set)
    for item in items:
        marks[item.path] |= {mark.name for mark in item.iter_markers()}
    items.sort(key=lambda item: ("slow" not in marks[item.path], "model" not in marks[item.path]))


@pytest.fixture(autouse=True)
def one_torch_thread(request: pytest.FixtureRequest) -> None:
    """Tiny models run on one thread: two wait for each other longer than they compute."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(available_cores() if request.node.get_closest_marker("model") else 1)


@pytest.fixture(scope="session")
def smollm2() -> LocalModel:
    """The real SmolLM2-135M-Instruct from the user's cache, fetched if it is not there."""
    return resolve("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def small_run(smollm2: LocalModel, tmp_path_factory: Folders) -> Path:
    """The folder of a finished run of SmolLM2 with itself; takes minutes, so several tests share it, and workers."""
    from small_run import finish

    smollm2.checkpoint()
    base = tmp_path_factory.getbasetemp()
    runs = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small-runs"
    runs.mkdir(exist_ok=True)
    with FileLock(runs.with_suffix(".lock")):
        if not (runs / "done").is_file():
            finish(runs)
            (runs / "done").touch()
    return runs / "run"


@pytest.fixture(scope="session")
def bench_gguf(tmp_path_factory: Folders) -> Path:
    """A tiny GGUF file, small enough to measure in no time."""
    pytest.importorskip("gguf")
    from tiny import write_gguf

    return write_gguf(tmp_path_factory.mktemp("bench") / "tiny-F16.gguf")


@pytest.fixture
def closed_port() -> int:
    """A port of this machine that nobody listens on."""
    return tiny.free_port()


@pytest.fixture
def model_cache(tmp_path: Path, monkeypatch: Patch, closed_port: int) -> Path:
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
def make_gguf(tmp_path: Path) -> Make:
    """Write a small GGUF with GGML's own writer: ``make_gguf("a.gguf", arch="llama", general__type="…")``."""
    return lambda name="tiny.gguf", **more: tiny.make_gguf(tmp_path / name, **more)


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
def register(model_cache: Path) -> Make:
    """Add a model with the bytes `content` to the user's registry and return its name."""

    def add(name: str, content: bytes, *, packages: Sequence[str] = (), hub: str = "", sha256: str = "") -> str:
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
def tiny_student(tmp_path_factory: Folders) -> Path:
    """The checkpoint folder of a random two-layer Llama with a chat template."""
    pytest.importorskip("transformers")
    from tiny import write_student

    return write_student(tmp_path_factory.mktemp("students") / "tiny-student")


@pytest.fixture
def export_folder(make_gguf: Make, tmp_path: Path) -> Path:
    """An export of one accepted and one rejected GGUF, with the gate's metrics and accuracies."""
    folder = tmp_path / "export"
    folder.mkdir()
    artifacts = []
    for name, rows in (("tiny-Q8_0.gguf", 8), ("tiny-Q4_K_M.gguf.rejected", 16)):
        path = make_gguf(name, rows=rows).rename(folder / name)
        ok = not name.endswith(".rejected")
        state = {"status": "ok"} if ok else {"status": "rejected", "reason": "kl mean"}
        sums = {key: value for key, value in vars(checksums_of(path)).items() if key != "tensor_bytes"}
        paired = {"difference": -0.1, "difference_low": -0.2, "difference_high": 0.0, "p_value": 0.1}
        gate = {"fidelity": Fidelity(passed=ok, runtime="llama_cpp 0.3.36", metrics=tiny.metrics())}
        gate |= {"accuracy": tiny.accuracy(32, **paired), "file": name}
        artifacts.append(tiny.artifact("Q8_0" if ok else "Q4_K_M", **sums, **state, **gate))
    known = {"source": "run", "task": "home_intents", "method": "arte", "seed": 0}
    base = Parent(name="HuggingFaceTB/SmolLM2-135M-Instruct", license="Apache-2.0")
    teacher = Parent(name="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", license="Apache-2.0")
    tuning = Tuning(method="full", data="arte", learning_rate=1e-4, epochs=2)
    data = Data(file="train.jsonl", rows=32, sha256="da" * 32)
    lineage = Lineage(**known, base=base, teacher=teacher, tuning=tuning, data=data)
    own = tiny.accuracy(36)
    document = tiny.student_file(*artifacts, name="tiny", lineage=lineage, student_accuracy=own)
    write_student(folder, document)
    return folder
