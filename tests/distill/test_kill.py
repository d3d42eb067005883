"""A real run, killed ten times with SIGKILL: no call is made twice, and its data is that of a run left alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from arte_edge.models.resolve import LocalModel

_KILLS = 10
# The smallest run that passes through every stage; one 135M model plays teacher and student.
_SMALL = [
    "elicit.questions=4",
    "elicit.shown=8",
    "elicit.temperature=0.8",
    "elicit.rouge=1.0",
    "elicit.one_draw=true",
    "elicit.question_tokens=96",
    "elicit.rationale_tokens=36",
    "elicit.max_prompts=60",
    "elicit.opinion_shots=8",
    "check.examples=10",
    "calibrate.items=10",
    "calibrate.k=8",
    "calibrate.shots=[0,1]",
    "prefer.race=on",
    "align.question_pairs=1",
    "align.rationale_pairs=3",
    "align.min_gap=0.0",
    "align.batch_size=2",
    'align.lora_targets=["q_proj","v_proj"]',
    "align.probe_prompts=1",
    "tailor.questions=8",
    "tailor.temperature=0.8",
    "tailor.label=teacher",
    "tailor.max_prompts=80",
    "tune.method=lora",
    "tune.epochs=1",
    "evaluate.limit=10",
    "evaluate.shots=[0]",
    "evaluate.answer_tokens=24",
]
# What was drafted, chosen, scored, paired, written, trained on and answered, to the byte.
_DATA = (
    "elicit/questions.jsonl",
    "elicit/rationales.jsonl",
    "calibrate/preference_set.jsonl",
    "prefer/scores.jsonl",
    "align/pairs.jsonl",
    "tailor/train.jsonl",
    "tune/rows.jsonl",
    "evaluate/answers.jsonl",
)


def start(runs: Path) -> subprocess.Popen[bytes]:
    model = "smollm2-135m-instruct"
    command = [sys.executable, "-m", "arte_edge", "distill", "--task", "home_intents", "--force", "--json"]
    command += ["--teacher", model, "--student", model, "--name", "run", "--runs", str(runs)]
    for assignment in _SMALL:
        command += ["--set", assignment]
    log = (runs / "log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log)


def finish(runs: Path) -> None:
    process = start(runs)
    assert process.wait(timeout=560) == 0, (runs / "log").read_text(errors="replace")[-3000:]


def calls(runs: Path) -> Counter[str]:
    return Counter(json.loads(line)["key"] for line in (runs / "run/calls.jsonl").read_text().splitlines())


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_killed_ten_times_makes_no_call_twice_and_ends_with_the_same_data(
    smollm2: LocalModel, tmp_path: Path
) -> None:
    smollm2.checkpoint()
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir()
    killed.mkdir()
    began = time.monotonic()
    finish(alone)
    whole_s = time.monotonic() - began

    moments = random.Random(2406)
    done_early = 0
    for _ in range(_KILLS):
        process = start(killed)
        try:
            process.wait(timeout=moments.uniform(0.03, 0.16) * whole_s)
            done_early += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert done_early < _KILLS, "no kill hit a run that was still at work"
    finish(killed)

    keys = calls(killed)
    assert keys and max(keys.values()) == 1
    for name in _DATA:
        assert (killed / "run" / name).read_bytes() == (alone / "run" / name).read_bytes(), name
    assert keys == calls(alone)
