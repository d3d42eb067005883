"""Start Ray on this machine or join a cluster, and look at it before a run relies on it.

Checked are what Ray itself does not: an address that nobody answers, another arte-edge on a node, a run folder that a
node does not see, a node without a model, workers that fit nowhere. Nothing of Ray's reports home: usage statistics
are off (`arte_edge` sets the variable), there is no dashboard, and Ray on this machine listens on 127.0.0.1 alone.
"""

from __future__ import annotations

import importlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge.cache import is_offline, sha256_file
from arte_edge.cluster.pool import ClusterEngine, Pool, reason, translated
from arte_edge.cluster.worker import EngineSpec, NodeFacts, adapter_sum, node_facts, versions
from arte_edge.errors import ArteError, InputError
from arte_edge.extras import need
from arte_edge.machine import environment_for, thread_count
from arte_edge.models.resolve import LocalModel
from arte_edge.private_apis import missing
from arte_edge.runtimes.loader import Kind
from arte_edge.runtimes.openai.vllm_process import VllmSettings

_ANSWER_S = 5.0  # for an address to accept a connection
_NODE_S = 120.0  # for a node to start a process and name its versions; models may take hours to fetch and hash
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray takes 127.0.0.1 for this machine's address
_TOKEN = secrets.token_hex(32)  # of Ray on this machine
# Settings of the driver that decide what an engine computes; secrets and paths stay where they are.
_PASSED_ON = ("ARTE_EDGE_PROBE", "ARTE_EDGE_DTYPE", "ARTE_EDGE_GGUF_RUNTIME")


@dataclass(frozen=True)
class WorkerSizes:
    """How many workers, and what each gets; 0 workers: as many as fit, 0 cores: a node's, -1 GPUs: one if there are."""

    workers: int = 0
    cpus: int = 0
    gpus: float = -1.0


class RayCluster:
    """A cluster that this process has joined. `close` leaves it, and ends Ray if it was started here."""

    def __init__(self, sizes: WorkerSizes, warn: Callable[[str], None]) -> None:
        """Raises InputError: no node has room for a worker."""
        n, cpus, gpus = _fitting(sizes, [node["Resources"] for node in _nodes()])
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment |= environment_for(cpus)
        if is_offline():
            environment["ARTE_EDGE_OFFLINE"] = "1"
        self.summary = f"{n} workers, {cpus} cores" + f" and {gpus:g} GPUs" * bool(gpus) + " each"
        self.pool = Pool(n, cpus=cpus, gpus=gpus, environment=environment, warn=warn)

    def check(self, run_file: Path, models: Iterable[LocalModel], *, vllm: bool = False) -> None:
        """Look at every node; `run_file` is a file in the run's folder, `models` those that workers open.

        With `vllm` workers start that.

        Raises:
            InputError: another version on a node, or it does not see the run's folder or has not the models.
            ArteError: a node does not answer, cannot fetch a model or has no vLLM.
        """
        mine, seen = versions(), (str(run_file.resolve()), sha256_file(run_file))
        for host, facts in _ask_nodes(seen).items():
            differ = [f"{name} {facts.versions[name]}" for name in mine if facts.versions[name] != mine[name]]
            if differ:
                here = ", ".join(f"{name} {version}" for name, version in mine.items())
                raise InputError(
                    f"{host} has {', '.join(differ)}; this machine has {here}",
                    "Install the same versions on every node: pip install -c constraints.txt 'arte-edge[all,cluster]'.",
                )
            if not facts.sees_run:
                raise InputError(
                    f"{host} does not see {run_file.parent}",
                    "Adapters and tuned students are read from the run's folder: put it on a disk that every node "
                    "mounts at the same path, with --runs.",
                )
        _ask_nodes(seen, list(models), self.pool.warn, vllm=vllm)

    def open(
        self,
        model: LocalModel,
        *,
        kind: Kind = "auto",
        parallel: int = 32,
        adapter: tuple[Path, str] | None = None,
        dtype: str = "",
        vllm: VllmSettings | None = None,
    ) -> ClusterEngine:
        """Open an engine on the workers; arguments as of `arte_edge.runtimes.loader.open_local`, or with `vllm`.

        Raises ArteError: see `arte_edge.cluster.pool.Pool.each`.
        """
        if adapter is not None:
            adapter = (adapter[0].absolute(), adapter[1])
        total = adapter_sum(adapter[0]) if adapter else ""
        return ClusterEngine(self.pool, EngineSpec(model, kind, parallel, dtype, adapter, total, vllm))

    def on_a_node(self, function: Callable[..., Any], model: LocalModel, *arguments: Any) -> Any:
        """Return what `function` of this package returns on a node for its copy of `model`."""
        return self.pool.any(None, "with_model", function, model, *arguments)

    def stop_workers(self) -> None:
        """End the workers until the next call: training needs the memory."""
        self.pool.stop()

    def close(self) -> None:
        import ray

        self.pool.stop()
        ray.shutdown()


def connect(address: str, sizes: WorkerSizes, warn: Callable[[str], None]) -> RayCluster:
    """Return the cluster at `address`: ``local`` starts Ray here, ``auto`` joins this machine's, else HOST:PORT.

    Raises:
        InputError: no cluster there, another version of Ray or Python, or no node has room for a worker.
        ArteError: Ray is not installed, or does not start.
    """
    need("cluster", "Running on a cluster")
    where = "local" if address == "local" else _reachable(address)
    if where == "local":
        # Its own secret, of this process alone: otherwise Ray writes one into the home folder.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", _TOKEN)
        os.environ.setdefault(_LOOPBACK, "0")
        os.environ.setdefault("RAY_worker_niceness", "0")
    elif os.environ.get("RAY_AUTH_TOKEN") == _TOKEN:  # and Ray has read the other variables
        raise InputError("This process has run Ray on this machine alone", "Join a cluster from a new one.")
    import ray

    if ray.is_initialized():
        raise InputError("This process is connected to a Ray cluster already", "Call ray.shutdown() first.")
    if not missing(__name__):
        ray_worker: Any = importlib.import_module("ray._private.worker")
        ray_worker.print_to_stdstream = lambda data, ignore_prefix: None
    handler = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if where == "local":
        options |= {"num_cpus": thread_count(), "include_dashboard": False}
    try:
        ray.init(address=where, **options)
    except RuntimeError as error:
        if "ersion mismatch" in str(error):
            raise InputError(
                f"{address}: {reason(error)}", "Use the cluster's versions of Ray and Python here."
            ) from error
        raise ArteError(f"Ray at {address}: {reason(error)}", _START) from error
    except (ConnectionError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise InputError(f"No Ray cluster at {address}: {reason(error)}", _START) from error
    finally:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, handler)  # Ray takes it, and the command ends by its own rules
    try:
        return RayCluster(sizes, warn)
    except BaseException:
        ray.shutdown()
        raise


_START = (
    "Start one: `ray start --head` on the first machine, `ray start --address=HOST:6379` on the others, and run the "
    "command on one of them; or use --ray local."
)


def _reachable(address: str) -> str:
    """Return the address if something listens there; Ray would try for minutes. Raises InputError: nothing does."""
    source = "--ray"
    if address == "auto":
        source, address = _current()
        if address in ("", "auto"):
            return "auto"  # Ray looks for its own processes on this machine
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        raise InputError(f"{source} {address}: not local, auto or HOST:PORT", _START)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"No Ray cluster at {address} ({source}): {error}", _START) from error
    return address


def _current() -> tuple[str, str]:
    """Return what names the cluster that Ray would join by itself, and its address: empty, or of one that is gone."""
    if named := os.environ.get("RAY_ADDRESS", ""):
        return "RAY_ADDRESS", named
    path = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    with suppress(OSError, UnicodeDecodeError):
        return str(path), path.read_text("utf-8").strip()
    return "", ""


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _fitting(sizes: WorkerSizes, nodes: Sequence[dict[str, float]]) -> tuple[int, int, float]:
    """Return how many workers a cluster gets, and cores and GPUs of each.

    Raises InputError: no node, or not enough of them, has room.
    """
    gpus = sizes.gpus if sizes.gpus >= 0 else float(any(node.get("GPU", 0) >= 1 for node in nodes))
    able = [node for node in nodes if node.get("CPU", 0) >= max(sizes.cpus, 1) and node.get("GPU", 0) >= gpus]
    # A node's cores belong to its workers in equal parts; the smallest node decides, for all workers are equal.
    on_node = [int(node["GPU"] / gpus) if gpus else 1 for node in able]
    cpus = sizes.cpus or min((max(1, int(node["CPU"] / n)) for node, n in zip(able, on_node, strict=True)), default=1)
    room = sum(min(int(node["CPU"] / cpus), int(node["GPU"] / gpus) if gpus else sys.maxsize) for node in able)
    if room < max(sizes.workers, 1):
        have = "; ".join(f"{node.get('CPU', 0):g} cores, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise InputError(
            f"cluster: {max(sizes.workers, 1)} workers of {cpus} cores and {gpus:g} GPUs do not fit: the cluster "
            f"has room for {room} (its nodes: {have or 'none'})",
            "Lower cluster.workers, cluster.cpus_per_worker or cluster.gpus_per_worker, or add nodes.",
        )
    return sizes.workers or room, cpus, gpus


def _ask_nodes(
    run_file: tuple[str, str],
    models: Sequence[LocalModel] = (),
    say: Callable[[str], None] = print,
    *,
    vllm: bool = False,
) -> dict[str, NodeFacts]:
    """Return the facts of every node by its name and address; `say` gets a line for one that takes long over models.

    Raises ArteError: a node does not answer, is lost, or has not the models.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(node_facts)
    asked = {
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})": task.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(run_file, models, vllm=vllm)
        for node in _nodes()
        if node["Resources"].get("CPU", 0) >= 1
    }
    found = {}
    for name, reference in asked.items():
        try:
            if models and not ray.wait([reference], timeout=_NODE_S)[0]:
                say(f"waiting for {name}, which fetches models or computes their sha256")
            # A node that is lost meanwhile ends the wait.
            found[name] = ray.get(reference, timeout=None if models else _NODE_S)
        except ray.exceptions.GetTimeoutError as error:
            raise ArteError(
                f"{name}: no answer in {_NODE_S:.0f} s", "See Ray's logs on that node, or leave it out."
            ) from error
        except ray.exceptions.RayError as error:
            raise translated(error, f"{name}: ") from error
    return found
