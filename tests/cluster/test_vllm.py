"""Workers that each start a server of their own: the rows of one server without Ray, whoever is killed meanwhile."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from tiny import Patch
from vllm_stand_in import started, write_command

from arte_edge.cluster.connect import RayCluster
from arte_edge.cluster.worker import EngineSpec, Worker, node_facts
from arte_edge.errors import ArteError, InputError
from arte_edge.models.resolve import LocalModel, from_folder
from arte_edge.runtimes.loader import ServerLimits
from arte_edge.runtimes.openai.vllm_process import VllmServer, VllmSettings, end_workers

pytest.importorskip("ray")
pytest.importorskip("torch")


@pytest.fixture
def checkpoint(tmp_path: Path) -> LocalModel:
    inner = tiny.bpe(("say ask yes no! 0 1 2 3 4 5 6 7 8 9 :",), tiny.SPECIAL, 300)
    roles = {"bos_token": tiny.SPECIAL[0], "eos_token": tiny.SPECIAL[2]}
    tokenizer = tiny.chat_tokenizer(inner, tiny.TEMPLATE, **roles)
    return from_folder(tiny.save_checkpoint(tmp_path / "model", tokenizer, dtype="float32"))


@pytest.fixture
def settings_here(tmp_path: Path, monkeypatch: Patch) -> VllmSettings:
    """Put a stand-in in the place of vLLM; each that is started writes to ``commands``."""
    (tmp_path / "commands").mkdir()
    for name, value in variables(tmp_path).items():
        monkeypatch.setenv(name, value)
    return VllmSettings(tmp_path / "served", (), 0, ServerLimits(timeout_s=20.0))


def variables(tmp_path: Path) -> dict[str, str]:
    more = {"ARTE_EDGE_VLLM": str(write_command(tmp_path)), "ARTE_TEST_VLLM": str(tmp_path / "commands")}
    return more | {"ARTE_EDGE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def settings(joined: RayCluster, settings_here: VllmSettings, tmp_path: Path) -> Iterator[VllmSettings]:
    """Put the stand-in in the place of vLLM on the workers too."""
    joined.pool._environment = {**joined.pool._environment, **variables(tmp_path)}
    yield settings_here
    end_workers(joined.stop_workers, tmp_path / "served")
    assert not alive(tmp_path), "gone when training begins"


def alive(folder: Path) -> list[int]:
    """Return the processes of all servers that were started."""
    pids = [pid for server in started(folder / "commands") for pid in server["pids"]]
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("killed", ["server", "worker"])
def test_the_rows_are_those_of_one_server_though_one_is_killed(
    joined: RayCluster,
    settings: VllmSettings,
    checkpoint: LocalModel,
    work: Any,
    tmp_path: Path,
    kill_worker: Any,
    killed: str,
) -> None:
    alone = type(work)(tmp_path / "alone")
    server = VllmServer(checkpoint, settings)
    one = server.engine(None, parallel=2)
    alone.do(one)
    one.close()
    server.close()
    engine = joined.open(checkpoint, kind="transformers", parallel=2, vllm=settings)
    assert engine.identity == one.identity and engine.in_flight == one.in_flight == 2
    first = started(tmp_path / "commands")[1:]
    assert len(first) == 2 and len({each["env"]["VLLM_API_KEY"] for each in first}) == 2
    pids = alive(tmp_path)

    def kill() -> None:
        if killed == "server":
            os.kill(first[0]["pids"][0], signal.SIGKILL)
            return
        kill_worker()
        until = time.monotonic() + 15
        while len(alive(tmp_path)) == len(pids) and time.monotonic() < until:
            time.sleep(0.05)
        assert len(set(pids) - set(alive(tmp_path))) in (1, 2), "the server of one worker ends with it"

    work.after_first_group(kill)
    work.do(engine)
    assert work.lines() == alone.lines()


def test_a_server_that_does_not_start_ends_the_run_with_its_log(
    joined: RayCluster, settings: VllmSettings, checkpoint: LocalModel
) -> None:
    joined.pool._environment = {**joined.pool._environment, "ARTE_TEST_VLLM_DOES": "fail"}
    with pytest.raises(ArteError, match=r"^On .*vLLM did not start: exit code 3(?s:.*)no room for 1 GPU"):
        joined.open(checkpoint, kind="transformers", vllm=settings)


def test_a_server_that_ended_while_its_worker_was_idle_is_replaced(
    checkpoint: LocalModel, settings_here: VllmSettings, tmp_path: Path
) -> None:
    worker, spec = Worker({}), EngineSpec(checkpoint, "transformers", 2, vllm=settings_here)
    facts = worker.open(spec)
    assert facts is not None
    os.kill(started(tmp_path / "commands")[0]["pids"][0], signal.SIGKILL)
    (server,) = worker._servers.values()
    server._process.wait()
    # An engine of another call opens on the next server, and so does the first again.
    assert worker.open(replace(spec, parallel=1)) == replace(facts, in_flight=1) and worker.open(spec) == facts
    assert len(started(tmp_path / "commands")) == 2 and server.log.is_file()
    for left in worker._servers.values():
        left.close()
    assert list(server.log.parent.iterdir()) == [server.log] and not alive(tmp_path)


def test_a_node_without_vllm_is_named(checkpoint: LocalModel, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("ARTE_EDGE_VLLM", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"^On .*nowhere: no such command"):
        node_facts((str(tmp_path), ""), [checkpoint], vllm=True)
    node_facts((str(tmp_path), ""), [checkpoint])
