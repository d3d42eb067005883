"""Groups of calls on real workers: the rows of a run without Ray, whoever dies meanwhile."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import Patch

from arte_edge.cluster import pool
from arte_edge.cluster.connect import RayCluster
from arte_edge.errors import EngineError, InputError
from arte_edge.models.resolve import LocalModel
from arte_edge.runtimes.completion import Request, Sampling


def all_once(work: Any) -> bool:
    keys = [json.loads(line)["key"] for line in work.lines()]
    return len(keys) == len(set(keys)) > 0


def test_the_rows_are_those_of_a_run_without_ray(joined: RayCluster, model: LocalModel, work: Any, rows: Any) -> None:
    engine = joined.open(model, parallel=4)
    work.do(engine)
    assert work.lines() == rows
    assert engine.identity.model == model.sha256 and engine.count_tokens("abc") == 4
    made = work.calls.made
    joined.stop_workers()
    work.do(engine)
    assert work.calls.made == made and not joined.pool._hands, "nothing to do starts no worker"
    one = engine.complete([Request("say1:", sample=1)], Sampling(temperature=1.0, max_tokens=24, seed=7))
    assert joined.pool._hands and one[0].completion_tokens > 0


def test_a_worker_that_is_killed_loses_no_row(
    joined: RayCluster, model: LocalModel, work: Any, rows: Any, kill_worker: Callable[[], None]
) -> None:
    engine = joined.open(model, parallel=4)
    work.after_first_group(kill_worker)
    work.do(engine)
    assert work.lines() == rows and all_once(work)


@pytest.mark.parametrize("name", ["OutOfMemoryError", "NodeDiedError", "ObjectLostError"])
def test_a_result_that_is_lost_is_made_again(
    joined: RayCluster, model: LocalModel, work: Any, rows: Any, monkeypatch: Patch, name: str
) -> None:
    import ray

    engine, get = joined.open(model, parallel=4), ray.get
    error = getattr(ray.exceptions, name)
    lost = [error("00", None, "") if name == "ObjectLostError" else error("killed")]

    def get_or_lose(*arguments: Any, **options: Any) -> Any:
        value = get(*arguments, **options)
        if lost:
            raise lost.pop()
        return value

    monkeypatch.setattr(ray, "get", get_or_lose)
    work.do(engine)
    assert work.lines() == rows and all_once(work) and not lost


def test_a_raylet_that_is_killed_loses_no_row(
    two_nodes: Any, joined: RayCluster, model: LocalModel, work: Any, rows: Any
) -> None:
    engine = joined.open(model, parallel=4)
    node = next(iter(two_nodes.worker_nodes))
    work.after_first_group(lambda: two_nodes.remove_node(node, allow_graceful=False))
    try:
        work.do(engine)
    finally:
        two_nodes.add_node(num_cpus=1, object_store_memory=80_000_000)
    assert work.lines() == rows and all_once(work)


DRIVER = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from conftest import Work
from arte_edge.cluster.connect import WorkerSizes, connect
from arte_edge.models.resolve import from_gguf
cluster = connect({address!r}, WorkerSizes(cpus=1), warn=print)
work = Work(Path({folder!r}))
work.after_first_group(lambda: __import__("os").kill(__import__("os").getpid(), 9))
work.do(cluster.open(from_gguf(Path({model!r})), parallel=4))
"""


def test_a_driver_that_is_killed_resumes_and_pays_for_no_call_twice(
    two_nodes: Any, model: LocalModel, tmp_path: Path, rows: Any, request: pytest.FixtureRequest
) -> None:
    here = Path(__file__).parent
    script = DRIVER.format(
        path=[str(here), str(here.parent)], address=two_nodes.address, folder=str(tmp_path), model=str(model.path)
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    stored = (tmp_path / "calls.jsonl").read_bytes().splitlines()
    assert len(stored) == 4
    work, joined = request.getfixturevalue("work"), request.getfixturevalue("joined")
    work.do(joined.open(model, parallel=4))
    assert work.lines() == rows and all_once(work)
    assert work.calls.made == work.N_TEXT + work.N_SCORED - len(stored)


class Deadly(Sampling):
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


def test_a_group_that_kills_three_workers_ends_the_run_and_is_named(
    joined: RayCluster, model: LocalModel, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(pool, "_REST_S", 0.1)
    engine = joined.open(model, parallel=4)
    groups: Any = [([Request("fine")], Sampling(max_tokens=2)), ([Request("the end")], Deadly())]
    done = {}
    with pytest.raises(EngineError, match=r"3 workers died over a group of 1 calls .* ends in “the end”"):
        for number, results in engine.each("complete", groups):
            done[number] = results
    assert done.keys() == {0}
    assert len(engine.complete([Request("fine")], Sampling(max_tokens=2))) == 1, "the others go on"


def end_process(model: LocalModel) -> None:
    os._exit(1)


def test_a_function_that_kills_three_workers_is_named(
    joined: RayCluster, model: LocalModel, monkeypatch: Patch
) -> None:
    ray_cloudpickle = pytest.importorskip("ray.cloudpickle")
    ray_cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(pool, "_REST_S", 0.1)
    with pytest.raises(EngineError, match=f"3 workers died over end_process of {model.name}") as caught:
        joined.on_a_node(end_process, model)
    assert "ARTE_EDGE_PROBE=0" in caught.value.hint


def test_a_prompt_that_an_engine_cannot_take_is_a_row_with_a_reason(joined: RayCluster, model: LocalModel) -> None:
    engine = joined.open(model, parallel=4)
    good, bad = engine.complete([Request("fine"), Request("x" * 5000)], Sampling(max_tokens=2))
    assert not good.error and "context" in bad.error


def test_what_a_node_does_not_have_is_named_with_the_node(joined: RayCluster, model: LocalModel) -> None:
    import socket

    host = socket.gethostname()
    gone = replace(model, gguf=Path("/nowhere/m.gguf"), ref="/nowhere/m.gguf")
    other = replace(model, sha256="0" * 64)
    for wrong, match in ((gone, "no such file"), (other, "another model")):
        with pytest.raises(InputError, match=f"On {host}: .*{match}"):
            joined.open(wrong)
    with pytest.raises(InputError, match="no such adapter"):
        joined.open(model, adapter=(Path("/nowhere/adapter.gguf"), "0"))


def test_workers_that_do_not_come_up_end_the_wait(joined: RayCluster, model: LocalModel) -> None:
    said: list[str] = []
    lonely = pool.Pool(1, cpus=64, gpus=0, environment={}, warn=said.append, patience_s=2)
    with pytest.raises(EngineError, match="No worker came up") as raised:
        lonely.any(None, "with_model", str, model)
    lonely.stop()
    assert "each needs 64 cores" in raised.value.hint and len(said) <= 1


def test_a_full_object_store_is_named() -> None:
    ray = pytest.importorskip("ray")
    error = pool.translated(ray.exceptions.OutOfDiskError("Local disk is full"))
    assert isinstance(error, EngineError) and "object store of the cluster is full" in error.message
