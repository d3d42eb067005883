"""The smallest real run that passes through every stage; one 135M model is teacher and student."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODEL = "smollm2-135m-instruct"
SETTINGS = [
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
    "check.own_labels=false",  # a minute of training each, and `tests/distill/stages` has them
    "tune.target=reasoning-first",  # so that rationales are written, scored and aligned on
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


def start(runs: Path) -> subprocess.Popen[bytes]:
    """Start the run ``run`` below `runs`; its output is in ``runs/log``."""
    command = [sys.executable, "-m", "arte_edge", "distill", "--task", "home_intents", "--force", "--json"]
    command += ["--teacher", MODEL, "--student", MODEL, "--name", "run", "--runs", str(runs)]
    for assignment in SETTINGS:
        command += ["--set", assignment]
    log = (runs / "log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log)


def finish(runs: Path) -> None:
    """Run it to its end."""
    with start(runs) as process:
        try:
            assert process.wait(timeout=560) == 0, (runs / "log").read_text(errors="replace")[-3000:]
        finally:
            process.kill()
