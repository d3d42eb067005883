"""A Ray cluster of two raylets with one core each on this machine, and calls of a tiny model to spread over it."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import Folders, write_gguf

# Read when Ray is imported: everything on 127.0.0.1, no request to anybody.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (else workers wait for every other process)

from arte_edge.cluster.connect import RayCluster, WorkerSizes, connect
from arte_edge.console import Reporter
from arte_edge.distill.cached_calls import Calls
from arte_edge.models.resolve import LocalModel, from_gguf
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.store import CallLog

STORE_BYTES = 80_000_000


def ray_processes(name: str = "ray", below: int | None = None) -> list[psutil.Process]:
    """Return the processes below this one, or another, whose command has `name` in it; workers are ``ray::Worker``."""
    found = []
    for process in psutil.Process(below).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.fixture
def kill_worker() -> Callable[[], None]:
    """Kill one worker, as the kernel does where memory is short."""
    return lambda: ray_processes("ray::Worker")[0].kill()


@pytest.fixture(scope="package")
def two_nodes() -> Iterator[Any]:
    """The cluster; a test that kills a node adds another."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE_BYTES})
    cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    yield cluster
    cluster.shutdown()
    _, left = psutil.wait_procs(ray_processes(), timeout=20)
    for process in left:
        process.kill()
    assert left == []


@pytest.fixture
def joined(two_nodes: Any) -> Iterator[RayCluster]:
    """This process as the driver of a run, with a worker on each node."""
    cluster = connect(two_nodes.address, WorkerSizes(cpus=1), warn=print)
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory: Folders) -> LocalModel:
    return from_gguf(write_gguf(tmp_path_factory.mktemp("cluster") / "tiny-F16.gguf"))


class Work:
    """Calls of one run in a folder: drawn texts, and log-probabilities of given answers."""

    N_TEXT, N_SCORED = 40, 24

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = CallLog(folder / "calls.jsonl")
        self.calls = Calls(self.log, Reporter(quiet=True), group=4, together=8)

    def do(self, engine: Any) -> None:
        requests = [Request(f"say{i % 20}:", sample=i) for i in range(self.N_TEXT)]
        drawn = Sampling(temperature=1.0, max_tokens=24, seed=7)
        texts = self.calls.complete(engine, requests, drawn, "texts")
        asks = [([f"{d}ask{q}" for q in range(4)], [["yes", "no!"]] * 4) for d in range(self.N_SCORED // 4)]
        scores = self.calls.choose_each(engine, asks, "scores")
        assert len(texts) == self.N_TEXT and sum(map(len, scores)) == self.N_SCORED

    def after_first_group(self, do: Callable[[], None]) -> None:
        """Call `do` once, when the first group is stored."""
        append = self.log.append

        def appended(rows: Any) -> None:
            append(rows)
            self.log.append = append  # type: ignore[method-assign]
            do()

        self.log.append = appended  # type: ignore[method-assign]

    def lines(self) -> list[bytes]:
        return sorted((self.folder / "calls.jsonl").read_bytes().splitlines())


@pytest.fixture(scope="session")
def rows(model: LocalModel, tmp_path_factory: Folders) -> list[bytes]:
    """The rows of the work without Ray."""
    from arte_edge.runtimes.loader import open_local

    work, engine = Work(tmp_path_factory.mktemp("alone")), open_local(model, parallel=4)
    work.do(engine)
    engine.close()
    assert len(work.lines()) == Work.N_TEXT + Work.N_SCORED // 4
    return work.lines()


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)
