"""However a child ends, the answer says how, and the next case runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import Patch, facts

from arte_edge.bench.settings import BenchSettings, cases
from arte_edge.bench.worker import run_child

posix = pytest.mark.skipif(os.name != "posix", reason="signals")
OOM = "sys/fs/cgroup/memory.events"


def run(code: str, timeout_s: float = 30.0, **more: Any) -> dict[str, Any]:
    head = "import json, os, signal, sys, time\nsay = lambda **m: print(json.dumps(m), flush=True)\n"
    return run_child({"kind": "test"}, timeout_s, command=[sys.executable, "-c", head + code], **more)


def test_the_answer_comes_back_and_noise_on_stdout_does_not_disturb_it() -> None:
    seen: list[tuple[str, int, int]] = []
    code = """
request = json.loads(sys.stdin.readline())
print("a library says hello"); print("{not json"); print("[1, 2]")
say(doing="loading", done=0, total=0); say(doing="repetition", done=2, total=5)
say(result={"echo": request})
"""
    answer = run(code, on_progress=lambda *step: seen.append(step))
    assert answer == {"echo": {"kind": "test"}}
    assert seen == [("loading", 0, 0), ("repetition", 2, 5)]


@posix
@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGSEGV, "try another --runtime"), (signal.SIGILL, "another processor"), (signal.SIGBUS, "shorter")],
)
def test_a_crash_is_named_with_what_it_did_and_what_to_do(number: signal.Signals, words: str) -> None:
    answer = run(f'say(doing="repetition", done=2, total=5)\nos.kill(os.getpid(), {int(number)})')
    assert answer["status"] == "crashed"
    assert f"{number.name}, in repetition 2 of 5" in answer["reason"]
    assert words in answer["reason"]
    assert answer["peak_rss_bytes"] > 1_000_000


def fake_root(tmp_path: Path, kills: int) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal:  8000000 kB\nMemAvailable:  4000000 kB\n")
    (tmp_path / OOM).parent.mkdir(parents=True)
    (tmp_path / OOM).write_text(f"low 0\nmax 3\noom_kill {kills}\n")
    return tmp_path


@posix
def test_a_kill_that_the_control_group_counts_is_out_of_memory(tmp_path: Path) -> None:
    root = fake_root(tmp_path, 4)
    code = f"""
say(doing="loading", done=0, total=0)
open({str(root / OOM)!r}, "w").write("oom_kill 5\\n")
os.kill(os.getpid(), signal.SIGKILL)
"""
    answer = run(code, root=root)
    assert answer["status"] == "out-of-memory"
    assert "loading" in answer["reason"] and "control group" in answer["reason"]
    assert "smaller type or context" in answer["reason"]


@posix
def test_a_kill_near_the_size_of_the_memory_is_out_of_memory(tmp_path: Path) -> None:
    root = fake_root(tmp_path, 0)
    (root / "proc/meminfo").write_text("MemTotal:  60000 kB\nMemAvailable:  60000 kB\n")
    code = "held = b'x' * 70_000_000\nos.kill(os.getpid(), signal.SIGKILL)"
    assert run(code, root=root)["status"] == "out-of-memory"


@posix
def test_a_kill_without_evidence_is_not_blamed_on_the_kernel(tmp_path: Path) -> None:
    answer = run("os.kill(os.getpid(), signal.SIGKILL)", root=fake_root(tmp_path, 4))
    assert answer["status"] == "crashed"
    assert "SIGKILL" in answer["reason"] and "out-of-memory" in answer["reason"]


def test_a_child_that_hangs_is_killed_in_time() -> None:
    start = time.monotonic()
    answer = run('say(doing="warm-up", done=3, total=10)\ntime.sleep(60)', timeout_s=1.5)
    assert time.monotonic() - start < 10
    assert answer["status"] == "timeout"
    assert "in warm-up 3 of 10" in answer["reason"] and "--timeout" in answer["reason"]


def test_a_child_that_gets_on_is_not_killed_where_the_time_is_per_step() -> None:
    slow = 'for i in range(6):\n    say(doing="answers", done=i, total=40); time.sleep(0.5)\n'
    assert run(slow + "say(result={})", timeout_s=2.0, per_step=True) == {}
    answer = run(slow + "time.sleep(60)", timeout_s=2.0, per_step=True)
    assert answer["status"] == "timeout" and "in answers 5 of 40" in answer["reason"]
    assert "--timeout" in answer["reason"] and "--limit" in answer["reason"] and "-p" not in answer["reason"]


def test_a_child_that_answers_and_hangs_does_not_hold_us_up(monkeypatch: Patch) -> None:
    monkeypatch.setattr("arte_edge.bench.worker._EXIT_S", 0.3)
    start = time.monotonic()
    assert run('say(result={"status": "ok"})\ntime.sleep(60)') == {"status": "ok"}
    assert time.monotonic() - start < 10


def test_an_exit_without_an_answer_tells_its_last_words() -> None:
    answer = run('print("GGML_ASSERT(n < 5) failed", file=sys.stderr)\nsys.exit(7)')
    assert answer["status"] == "crashed"
    assert "code 7" in answer["reason"] and "GGML_ASSERT(n < 5) failed" in answer["reason"]


def test_a_child_that_cannot_be_started_is_a_result_too() -> None:
    answer = run_child({}, 5, command=["/nonexistent/python"])
    assert answer["status"] == "crashed" and "could not be started" in answer["reason"]


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on address space")
def test_running_into_a_limit_of_memory_is_out_of_memory() -> None:
    # The real child, with less memory than it needs: Python's allocation fails, as malloc does under a limit.
    settings = BenchSettings(n_prompt=(1,), n_gen=(0,), repetitions=1, warmup=False, threads=(1,))
    (case,) = cases(Path("null"), settings, facts())
    request = {"kind": "speed", "case": case.model_dump(mode="json") | {"n_prompt": 400_000_000}}
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (600_000_000,) * 2)\n"
    code = limit + "from arte_edge.bench.worker import main; main()"
    answer = run_child(request, 60, command=[sys.executable, "-c", code])
    assert answer["status"] == "out-of-memory"
    assert "smaller type or context" in answer["reason"]


def test_the_child_ends_when_its_parent_is_gone() -> None:
    command = [sys.executable, "-m", "arte_edge", "bench", "null:50", "-p", "1000", "-n", "0", "--no-warmup"]
    parent = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ends = time.monotonic() + 30
    while not (children := parent.children()) and time.monotonic() < ends:
        time.sleep(0.05)
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(children, timeout=20)[1] == [] != children
