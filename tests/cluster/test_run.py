"""The command with ``--ray local``, interrupted in mid-stage: the rows that it has without Ray, and no process left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import tiny
from tiny import Patch

from arte_edge.cli.main import main

WORDS = ("switch the light on in the kitchen please", "answer <ans>light_on</ans>")
SETTINGS = (
    "check.examples=20",
    "check.own_labels=false",
    "evaluate.answer_tokens=8",
    "teacher.shots=1",
    "elicit.by_label=false",
    "elicit.opinion_shots=0",
    "elicit.max_prompts=2",
    "elicit.question_tokens=16",
    "tune.target=answer",
)


def command(folder: Path, name: str, ray: str) -> list[str]:
    models = ["--teacher", str(folder / "model"), "--student", str(folder / "model")]
    words = ["distill", "--task", "home_intents", *models, "--runs", str(folder), "--name", name, "--force"]
    return [*words, "--ray", ray, *(word for one in SETTINGS for word in ("--set", one))]


def stored(folder: Path) -> list[bytes]:
    log = folder / "calls.jsonl"
    return sorted(log.read_bytes().splitlines()) if log.is_file() else []


def test_a_command_on_ray_that_is_interrupted(tmp_path: Path, monkeypatch: Patch) -> None:
    inner = tiny.bpe(WORDS, tiny.SPECIAL, 400)
    roles = {"bos_token": tiny.SPECIAL[0], "eos_token": tiny.SPECIAL[2]}
    tokenizer = tiny.chat_tokenizer(inner, tiny.TEMPLATE, **roles)
    tiny.save_checkpoint(tmp_path / "model", tokenizer, max_position_embeddings=8192)
    monkeypatch.setenv("ARTE_EDGE_THREADS", "1")
    # Its teacher writes no draft, which ends the run: the check and the calls of elicit are all there.
    assert main(command(tmp_path, "alone", "")) == 4
    alone, run = stored(tmp_path / "alone"), tmp_path / "ray"
    assert len(alone) > 40
    words = [sys.executable, "-m", "arte_edge", *command(tmp_path, "ray", "local")]
    for end in (signal.SIGTERM, None):
        before = len(stored(run))
        with subprocess.Popen(words, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}) as driver:
            children = []
            while driver.poll() is None and len(stored(run)) == before:
                time.sleep(0.1)
                children = psutil.Process(driver.pid).children(recursive=True)
            if end is not None:
                driver.send_signal(end)
            _, said = driver.communicate(timeout=200)
            assert driver.returncode == 4, said.decode()[-2000:]
        assert (end == signal.SIGTERM) == (b"Interrupted." in said)
        assert len(children) > 4
        assert psutil.wait_procs(children, timeout=30)[1] == []
    assert stored(run) == alone
