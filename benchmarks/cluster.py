"""What a Ray cluster is worth, what a kill costs, and what the driver needs as a run grows.

    python benchmarks/cluster.py speed --json benchmarks/results/cluster/speed.json
    python benchmarks/cluster.py kills --json benchmarks/results/cluster/kills.json
    python benchmarks/cluster.py growth --json benchmarks/results/cluster/growth.json

`speed`: no Ray, one node and two nodes take turns at the same calls, one core each: a student's scores and a teacher's
drafts. On this machine nodes are raylets; it has to be idle, with a core for each, and one to spare for the driver.
`kills`: workers, raylets and the driver are killed with SIGKILL while calls are made; the rows are compared with those
of one process, byte for byte. `growth`: rows of scores that are made up go through the store of a run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

# Read when Ray is imported: on this machine alone, and workers that run as any other process.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("ARTE_EDGE_PROBE", "0")
os.environ |= dict.fromkeys(("ARTE_EDGE_THREADS", "OMP_NUM_THREADS"), "1")  # without Ray one core too

from arte_edge.cache import write_atomic
from arte_edge.cluster.connect import RayCluster, WorkerSizes, connect
from arte_edge.console import Reporter
from arte_edge.distill.cached_calls import Calls
from arte_edge.models.resolve import LocalModel, f16_student, resolve
from arte_edge.runtimes.completion import EngineIdentity, Request, Sampling
from arte_edge.runtimes.loader import open_local
from arte_edge.runtimes.prompt_render import render
from arte_edge.store import CallLog
from arte_edge.tasks.loaders import load_task

TASK = load_task("home_intents")
STORE_BYTES = 200_000_000
DRAWN = Sampling(temperature=1.0, max_tokens=48, seed=7)


@contextmanager
def nodes(n: int) -> Iterator[Any]:
    """Start a cluster of `n` raylets with one core each."""
    from ray.cluster_utils import Cluster

    one = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=one)
    try:
        for _ in range(n - 1):
            cluster.add_node(**one)
        yield cluster
    finally:
        cluster.shutdown()


@contextmanager
def joined(address: str) -> Iterator[RayCluster]:
    cluster = connect(address, WorkerSizes(cpus=1), print)
    try:
        yield cluster
    finally:
        cluster.close()


def score(calls: Calls, engine: Any, n: int, salt: str = "") -> int:
    """Score every label after `n` one-shot prompts of the task; return the number of prompts."""
    labels = [f"{label}</ans>" for label in TASK.answer.choices]
    asks = []
    for d in range(-(-n // 20)):
        shot = TASK.seed[d % len(TASK.seed)]
        head = f"{TASK.description} {salt}{d}\nQuestion: {shot.input}\nAnswer: <ans>{shot.target}</ans>\n\n"
        asked = TASK.validation[: min(20, n - 20 * d)]
        asks.append(([f"{head}Question: {e.input}\nAnswer: <ans>" for e in asked], [labels] * len(asked)))
    calls.choose_each(engine, asks, "scores")
    return n


def draft(calls: Calls, engine: Any, n: int, salt: str = "") -> int:
    """Draw `n` rationales; return the number of tokens."""
    requests = []
    for i in range(n):
        text = f"{TASK.description}\nSay in one sentence why {salt}: {TASK.validation[i % 40].input}"
        requests.append(Request(render(engine, [{"role": "user", "content": text}]), sample=i))
    return sum(done.completion_tokens for done in calls.complete(engine, requests, DRAWN, "drafts"))


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of each turn, and the ratios of their medians."""
    work: dict[str, tuple[Callable[..., int], LocalModel, int, int]] = {
        "scores": (score, f16_student(resolve(options.student)), options.scores, 160),
        "drafts": (draft, resolve(options.teacher), options.drafts, 32),
    }
    seconds: dict[str, list[float]] = {}
    amounts: dict[str, int] = {}

    def measure(where: str, opened: Callable[[LocalModel], Any], turn: int) -> None:
        for what, (do, model, n, group) in work.items():
            engine = opened(model)
            with tempfile.TemporaryDirectory() as folder:
                calls = Calls(CallLog(Path(folder) / "calls.jsonl"), Reporter(quiet=True))
                do(calls, engine, 2 * group, "warm-up")  # opens the engine on every worker
                began = time.perf_counter()
                amounts[what] = do(calls, engine, n, str(turn))
                seconds.setdefault(f"{what}, {where}", []).append(round(time.perf_counter() - began, 3))
            engine.close()
            print(what, where, seconds[f"{what}, {where}"][-1], flush=True)

    for turn in range(options.turns):
        measure("no Ray", lambda model: open_local(model), turn)
        for n in (1, 2):
            with nodes(n) as cluster, joined(cluster.address) as here:
                measure(f"{n} node{'s' * (n > 1)}", lambda model, here=here: here.open(model), turn)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        what: {
            "2 nodes over 1": round(median[f"{what}, 1 node"] / median[f"{what}, 2 nodes"], 3),
            "1 node over no Ray": round(median[f"{what}, no Ray"] / median[f"{what}, 1 node"], 3),
        }
        for what in work
    }
    return {"seconds": seconds, "amounts": amounts, "ratios": ratios}


def work_of(options: argparse.Namespace, folder: Path, engine: Any) -> None:
    """Make all calls of the kill test, in groups of eight."""
    calls = Calls(CallLog(folder / "calls.jsonl"), Reporter(quiet=True), group=8, together=8)
    score(calls, engine, options.scores)
    draft(calls, engine, options.drafts)


def rows(folder: Path) -> list[bytes]:
    log = folder / "calls.jsonl"
    return (
        [line for line in log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if log.is_file() else []
    )


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "ray::Worker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def kills(options: argparse.Namespace) -> dict[str, Any]:
    """Return, for each kind of kill, how many there were and what became of the rows."""
    draw = random.Random(options.seed)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as parent, nodes(2) as cluster:
        root = Path(parent)
        (root / "alone").mkdir()
        engine = open_local(local_model(options))
        work_of(options, root / "alone", engine)
        engine.close()
        expected = Counter(rows(root / "alone"))

        def worker() -> bool:
            alive = workers()
            if alive:
                draw.choice(alive).kill()
            return bool(alive)

        def raylet() -> bool:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
            cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            return True

        for kind, n, kill in (
            ("worker", options.workers, worker),
            ("raylet", options.raylets, raylet),
            ("driver", options.drivers, None),
        ):
            found[kind] = killed(options, root, kind, n, kill, cluster.address, draw) | compared(
                expected, rows(root / kind)
            )
            print(kind, found[kind], flush=True)
    return found


def killed(
    options: argparse.Namespace,
    root: Path,
    kind: str,
    n: int,
    kill: Callable[[], bool] | None,
    address: str,
    draw: random.Random,
) -> dict[str, Any]:
    """Make the work in drivers of their own, with `n` kills at random moments; None kills the driver."""
    folder = root / kind
    folder.mkdir()
    command = [sys.executable, __file__, "drive", "--address", address, "--folder", str(folder)]
    command += ["--model", options.model, "--scores", str(options.scores), "--drafts", str(options.drafts)]
    done = starts = 0
    driver = None
    wait_rows = max(1, len(rows(root / "alone")) // (n + 2))
    while driver is None or driver.returncode != 0:
        driver = subprocess.Popen(command)
        starts += 1
        before = len(rows(folder))
        while driver.poll() is None:
            time.sleep(draw.uniform(0.02, 0.2))
            if done >= n or len(rows(folder)) < before + wait_rows * draw.uniform(0.5, 1.0):
                continue
            if kill is None:
                driver.send_signal(signal.SIGKILL)
                driver.wait()
                done += 1
            elif kill():
                done += 1
                before = len(rows(folder))
        if driver.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"the driver ended with {driver.returncode}")
    return {"kills": done, "starts": starts}


def compared(expected: Counter[bytes], got: Sequence[bytes]) -> dict[str, int]:
    """Return how many rows are lost, changed or there twice."""
    keys = [json.loads(row)["key"] for row in got]
    wanted = {json.loads(row)["key"] for row in expected}
    return {
        "rows": len(wanted),
        "lost": len(wanted - set(keys)),
        "twice": len(keys) - len(set(keys)),
        "changed": len(set(got) - set(expected)),
    }


def local_model(options: argparse.Namespace) -> LocalModel:
    return f16_student(resolve(options.model))


def drive(options: argparse.Namespace) -> None:
    with joined(options.address) as cluster:
        work_of(options, options.folder, cluster.open(local_model(options)))


class Null:
    """A cluster's engine without models: results come in another order than calls, eight at a time."""

    identity = EngineIdentity("null", "made")

    def each(self, method: str, groups: Iterable[tuple[Any, Any]]) -> Iterator[tuple[int, list[Any]]]:
        waiting = []
        for number, (prompts, choices) in enumerate(groups):
            waiting.append((number, [np.full(len(own), -1.25) for _, own in zip(prompts, choices, strict=True)]))
            if len(waiting) == 8:
                yield from reversed(waiting)
                waiting = []
        yield from reversed(waiting)


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """Return seconds and memory of drivers that store so many scores, each in a process of its own."""
    found = {}
    for n in options.rows:
        out = subprocess.run([sys.executable, __file__, "grow", "--n", str(n)], stdout=-1, text=True, check=True)
        found[str(n)] = json.loads(out.stdout)
        print(n, found[str(n)], flush=True)
    return found


def grow(options: argparse.Namespace) -> None:
    """Store scores of 50 questions after each of n / 50 drafts, and read them again as a resumed run does."""
    questions, labels = ([f"question {i} of the task, in a sentence" for i in range(50)], ["yes", "no", "maybe"])
    asks = [([f"draft {d}: {q}" for q in questions], [labels] * 50) for d in range(options.n // 50)]
    base_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    engine: Any = Null()
    with tempfile.TemporaryDirectory() as folder:
        log = CallLog(Path(folder) / "calls.jsonl")
        began, cpu = time.perf_counter(), time.process_time()
        Calls(log, Reporter(quiet=True)).choose_each(engine, asks, "scores")
        stored_s, stored_cpu_s = time.perf_counter() - began, time.process_time() - cpu
        file_bytes = (Path(folder) / "calls.jsonl").stat().st_size
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        log.close()
        cpu = time.process_time()
        again = Calls(CallLog(Path(folder) / "calls.jsonl"), Reporter(quiet=True))
        again.choose_each(engine, asks, "scores")
        assert again.made == 0
        found = {"prompts_mib": round(base_mib), "peak_mib": round(peak_mib), "seconds": round(stored_s, 1)}
        found |= {"cpu_seconds": round(stored_cpu_s, 1), "resumed_cpu_seconds": round(time.process_time() - cpu, 1)}
        print(json.dumps(found | {"file_mb": round(file_bytes / 1e6, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("speed")
    one.add_argument("--student", default="smollm2-135m-instruct")
    one.add_argument("--teacher", default="qwen2.5-coder-0.5b-instruct")
    one.add_argument("--scores", type=int, default=3200, help="prompts, a multiple of 320")
    one.add_argument("--drafts", type=int, default=256, help="texts, a multiple of 64")
    one.add_argument("--turns", type=int, default=3)
    two = parts.add_parser("kills")
    drive_ = parts.add_parser("drive")
    for each in (two, drive_):
        each.add_argument("--model", default="smollm2-135m-instruct")
        each.add_argument("--scores", type=int, default=1200)
        each.add_argument("--drafts", type=int, default=240)
    two.add_argument("--workers", type=int, default=20)
    two.add_argument("--raylets", type=int, default=5)
    two.add_argument("--drivers", type=int, default=5)
    two.add_argument("--seed", type=int, default=0)
    drive_.add_argument("--address", required=True)
    drive_.add_argument("--folder", type=Path, required=True)
    three = parts.add_parser("growth")
    three.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parts.add_parser("grow").add_argument("--n", type=int, required=True)
    for each in (one, two, three):
        each.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    part: Callable[[argparse.Namespace], Any] = globals()[options.part]
    found = part(options)
    if getattr(options, "json", None):
        write_atomic(options.json, json.dumps(found, indent=1).encode() + b"\n")
        print(json.dumps(found))


if __name__ == "__main__":
    main()
