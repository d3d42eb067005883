"""Joining a cluster: what is refused before anything runs, and that nothing of Ray is left behind."""

from pathlib import Path
from typing import Any

import pytest
from tiny import Patch

from arte_edge.cluster import connect as module
from arte_edge.cluster.connect import RayCluster, WorkerSizes, connect
from arte_edge.errors import ArteError, InputError
from arte_edge.models.resolve import LocalModel

NODE = {"CPU": 8.0, "memory": 1e9}
GPU_NODE = {"CPU": 32.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("sizes", "nodes", "expected"),
    [
        ((0, 0, -1), [NODE, NODE], (2, 8, 0)),
        ((0, 2, -1), [NODE, NODE], (8, 2, 0)),
        ((3, 2, -1), [NODE, NODE], (3, 2, 0)),
        ((0, 0, -1), [{"CPU": 4.0}, NODE], (3, 4, 0)),
        ((0, 0, -1), [{"CPU": 2.0}, GPU_NODE], (8, 4, 1)),
        ((0, 0, 2), [GPU_NODE], (4, 8, 2)),
        ((0, 0, 0), [GPU_NODE], (1, 32, 0)),
        ((0, 0, -1), [{"memory": 1.0}, NODE], (1, 8, 0)),
    ],
)
def test_workers_fill_the_nodes(sizes: Any, nodes: Any, expected: Any) -> None:
    assert module._fitting(WorkerSizes(*sizes), nodes) == expected


@pytest.mark.parametrize(
    ("sizes", "nodes"), [((0, 16, -1), [NODE]), ((3, 4, -1), [NODE]), ((0, 0, 1), [NODE]), ((0, 0, -1), [])]
)
def test_workers_that_fit_nowhere_are_refused(sizes: Any, nodes: Any) -> None:
    with pytest.raises(InputError, match="do not fit"):
        module._fitting(WorkerSizes(*sizes), nodes)


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "http://127.0.0.1:8265", ":1", "head:port"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="not local, auto or HOST:PORT"):
        connect(address, WorkerSizes(), print)


def test_an_address_that_nobody_answers_is_refused_at_once(closed_port: int) -> None:
    with pytest.raises(InputError, match=r"No Ray cluster at 127\.0\.0\.1"):
        connect(f"127.0.0.1:{closed_port}", WorkerSizes(), print)


def test_a_cluster_that_is_gone_is_not_waited_for(closed_port: int, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{closed_port}")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(InputError, match=f"No Ray cluster at .*:{closed_port}"):
        connect("auto", WorkerSizes(), print)


def test_an_address_from_the_environment_is_named_with_its_source(monkeypatch: Patch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(InputError, match="RAY_ADDRESS ray://head:10001: not local"):
        connect("auto", WorkerSizes(), print)


def test_a_process_that_ran_ray_alone_joins_no_cluster(two_nodes: Any, monkeypatch: Patch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", module._TOKEN)
    with pytest.raises(InputError, match="on this machine alone"):
        connect(two_nodes.address, WorkerSizes(), print)


def test_another_version_of_ray_is_refused(two_nodes: Any, monkeypatch: Patch) -> None:
    import ray

    monkeypatch.setattr(ray, "__version__", "2.59.0")
    with pytest.raises(InputError, match=r"Ray: 2\.60.*Ray: 2\.59"):
        connect(two_nodes.address, WorkerSizes(), print)
    assert not ray.is_initialized()


def test_a_node_with_another_arte_edge_is_refused(
    two_nodes: Any, joined: RayCluster, tmp_path: Path, model: LocalModel, monkeypatch: Patch
) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text("seed = 1")
    joined.check(run_file, [model])
    monkeypatch.setattr("arte_edge.__version__", "9.9.9")
    with pytest.raises(InputError, match=r"has arte-edge .*; this machine has .*arte-edge 9\.9\.9"):
        joined.check(run_file, [])


def test_a_node_may_take_long_over_models_and_nothing_else(
    joined: RayCluster, tmp_path: Path, model: LocalModel, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(module, "_NODE_S", 0.001)
    said: list[str] = []
    assert module._ask_nodes((str(tmp_path), ""), [model], said.append)
    assert said and "waiting for" in said[0]

    def slow(*_: object, **__: object) -> None:  # a nested function is sent by value
        import time

        time.sleep(5)

    monkeypatch.setattr(module, "node_facts", slow)
    with pytest.raises(ArteError, match="no answer in"):
        module._ask_nodes((str(tmp_path), ""))


def test_a_run_folder_that_a_node_does_not_see_and_a_model_it_has_not_are_refused(
    joined: RayCluster, tmp_path: Path, model: LocalModel, monkeypatch: Patch
) -> None:
    from dataclasses import replace

    run_file = tmp_path / "run.toml"
    run_file.write_text("seed = 1")
    with pytest.raises(InputError, match="another model than"):
        joined.check(run_file, [model, replace(model, sha256="0" * 64)])
    monkeypatch.setattr(module, "sha256_file", lambda path: "of this machine's own folder")
    with pytest.raises(InputError, match="does not see"):
        joined.check(run_file, [model])
