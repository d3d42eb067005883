"""Several processes make the calls of one stage: each call once, in the groups of one process, and none hangs."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from arte_edge.console import Reporter
from arte_edge.distill.cached_calls import Calls
from arte_edge.distill.part import PartDone, ShardLog, Share, locked, merge_shards
from arte_edge.errors import EngineError, InputError
from arte_edge.runtimes.completion import Completion, EngineIdentity, Request, Sampling
from arte_edge.store import CallLog

SAMPLING = Sampling(max_tokens=4)
# A stage whose second calls depend on all of the first ones. Its engine answers with its batch, and may die in one.
WORKER = """
import os, sys, time
from pathlib import Path
import test_part_shards as t
from arte_edge.distill import part
folder, number, of, dies = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
part._BRIEF_S = float(sys.argv[5])
class Engine(t.Engine):
    def complete(self, requests, sampling):
        if dies in [r.prompt for r in requests]:
            os.kill(os.getpid(), 9)
        time.sleep(0.02)
        return super().complete(requests, sampling)
log = t.ShardLog(folder, t.Share(number, of))
try:
    t.stage(t.Calls(log, t.Reporter(quiet=True), group=4), Engine())
except t.PartDone as done:
    print(done)
    sys.exit(5)
finally:
    log.close()
"""


class Engine:
    """Answers a prompt with its batch, so that another composition of groups shows; fails on prompts of "bad"."""

    identity = EngineIdentity("openai", "scripted")

    def complete(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
        batch = "+".join(request.prompt for request in requests)
        return [
            Completion("", "error", error="bad row", fault="row")
            if "bad" in request.prompt
            else Completion(f"{request.prompt} in {batch}", "stop", 1, 1)
            for request in requests
        ]


def stage(calls: Calls, engine: Any) -> list[str]:
    first = [Request(f"a{i % 37}") for i in range(45)]  # the last group holds calls of an earlier one
    texts = [c.text for c in calls.complete(engine, first, SAMPLING, "first")]
    second = [Request(f"b{i} {len(texts)}") for i in range(30)] + [Request("bad")]
    return texts + [c.text for c in calls.complete(engine, second, SAMPLING, "second", spare=True)]


def start(folder: Path, number: int, of: int = 3, dies: str = "", brief_s: float = 20) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(folder), str(number), str(of), dies, str(brief_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)


def keys(folder: Path) -> Counter[str]:
    lines = [line for path in folder.glob("calls*.jsonl") for line in path.read_text().splitlines()]
    return Counter(json.loads(line)["key"] for line in lines)


def plain(folder: Path) -> tuple[list[str], Calls]:
    folder.mkdir(exist_ok=True)
    log = CallLog(folder / "calls.jsonl")
    merge_shards(folder, log)
    calls = Calls(log, Reporter(quiet=True), group=4)
    texts = stage(calls, Engine())
    log.close()
    return texts, calls


def test_processes_share_a_stage_whose_later_calls_depend_on_all_earlier_ones(tmp_path: Path) -> None:
    whole, alone = plain(tmp_path / "whole")
    folder = tmp_path / "run"
    folder.mkdir()
    processes = [start(folder, number) for number in (1, 2, 3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert max(keys(folder).values()) == 1
    files = sorted(folder.glob("calls-*-of-3.jsonl"))
    assert len(files) == 3 and all(path.stat().st_size for path in files)
    texts, calls = plain(folder)
    assert texts == whole
    assert alone.made == 37 + 31 and calls.made == 1  # the failed call is made again


def test_a_shard_that_dies_costs_one_group_and_the_others_end(tmp_path: Path) -> None:
    whole, _ = plain(tmp_path / "whole")
    folder = tmp_path / "run"
    folder.mkdir()
    processes = [start(folder, number, dies="a21" if number == 3 else "", brief_s=4) for number in (1, 2, 3)]
    outs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [5, 5, -9]
    assert "3/3" in outs[0] and "first" in outs[0]
    # Started again alone it finds all rows of the first calls, and makes its share of the second.
    assert start(folder, 3, brief_s=0).wait(timeout=60) == 5
    done = keys(folder)
    assert max(done.values()) == 1 and len(done) > 37
    texts, calls = plain(folder)
    assert texts == whole and calls.made == 37 + 31 - len(done)


def test_a_plain_command_and_a_shard_keep_out_of_each_others_way(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("arte_edge.distill.part._BRIEF_S", 0.1)
    shard = ShardLog(tmp_path, Share(1, 2))
    with pytest.raises(InputError, match="shard 1/2 works"):
        merge_shards(tmp_path, CallLog(tmp_path / "calls.jsonl"))
    with pytest.raises(InputError, match="another process"):
        ShardLog(tmp_path, Share(1, 2))
    shard.close()
    with locked(tmp_path / ".lock"), pytest.raises(InputError, match="another process"):
        ShardLog(tmp_path, Share(1, 2))
    ShardLog(tmp_path, Share(1, 2)).close()  # nothing is left locked


def shard(folder: Path, number: int, of: int, engine: Any) -> str:
    """Make a share of the stage alone; return why it ended."""
    log = ShardLog(folder, Share(number, of))
    try:
        stage(Calls(log, Reporter(quiet=True), group=4), engine)
    except (PartDone, EngineError) as error:
        return str(error)
    finally:
        log.close()
    return ""


class Mortal(Engine):
    """Counts its calls; its server may be gone."""

    def __init__(self) -> None:
        self.gone, self.prompts = False, Counter[str]()

    def complete(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
        self.prompts.update(request.prompt for request in requests)
        lost = Completion("", "error", error="no route", fault="server")
        return [lost for _ in requests] if self.gone else super().complete(requests, sampling)


def test_a_shard_that_met_a_dead_server_stops_at_once_and_resumes(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("arte_edge.distill.part._BRIEF_S", 0.0)
    whole, _ = plain(tmp_path / "whole")
    folder, engine = tmp_path / "run", Mortal()
    folder.mkdir()
    engine.gone = True
    assert "no route" in shard(folder, 1, 2, engine) and engine.prompts.total() == 4
    assert "1/2 is missing" in shard(folder, 2, 2, Mortal()), "the other takes no lost call for an answer"
    engine.gone = False
    said = [shard(folder, number, 2, engine) for number in (1, 2, 1)]
    assert "'second'; that of 2/2 is missing" in said[0]
    assert max(engine.prompts.values()) == 2 and engine.prompts["a0"] == 2, "only the lost ones twice"
    texts, calls = plain(folder)
    assert texts == whole and calls.made <= 1


def test_another_number_of_shards_pays_for_nothing_twice(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("arte_edge.distill.part._BRIEF_S", 0.0)
    engine = Mortal()
    assert "'first'" in shard(tmp_path, 1, 2, engine)
    for number in (2, 3, 1):
        shard(tmp_path, number, 3, engine)
    assert len(engine.prompts) > 37 and max(engine.prompts.values()) == 1
    assert max(keys(tmp_path).values()) == 1


def test_one_that_looks_is_not_taken_for_one_that_works(tmp_path: Path) -> None:
    log, other = ShardLog(tmp_path, Share(1, 2)), tmp_path / ".work-2-of-2.lock"
    with locked(other):
        assert log._works(2)
    held, free = threading.Event(), threading.Event()

    def look() -> None:
        with locked(other):
            held.set()
            free.wait(0.2)

    looker = threading.Thread(target=look)
    looker.start()
    assert held.wait(10) and not log._works(2)
    looker.join()
    log.close()


def test_part_shards_that_wait_for_each_other_both_end(tmp_path: Path, monkeypatch: Any) -> None:
    """As on two machines whose engines differ: no call of the one is a call of the other."""
    monkeypatch.setattr("arte_edge.distill.part._BRIEF_S", 1.0)
    process = start(tmp_path, 2, of=2, brief_s=1)
    log = ShardLog(tmp_path, Share(1, 2))

    class Other(Engine):
        identity = EngineIdentity("openai", "another")

    began = time.monotonic()
    with pytest.raises(PartDone, match="2/2"):
        stage(Calls(log, Reporter(quiet=True), group=4), Other())
    log.close()
    assert process.wait(timeout=60) == 5
    assert time.monotonic() - began < 40
