"""The smallest real run that passes through every stage; one 135M model is teacher and student."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import arte_edge

TASK = Path(arte_edge.__file__).parent / "tasks" / "data" / "home_intents"
N_EXAMPLES = 24  # of validation and test: the gate of an export answers all of them
MODEL = "smollm2-135m-instruct"
SETTINGS = [
    "elicit.questions=4",
    "elicit.shown=8",
    "elicit.temperature=0.8",
    "elicit.rouge=1.0",
    "elicit.one_draw=true",
    "elicit.question_tokens=64",
    "elicit.rationale_tokens=24",
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
    "align.target_kl=0.0",  # two steps instead of eight; `tests/distill/train` has the target, killed too
    "align.fresh_drafts=1",
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
    command = [sys.executable, "-m", "arte_edge", "distill", "--task", str(_task(runs)), "--force", "--json"]
    command += ["--teacher", MODEL, "--student", MODEL, "--name", "run", "--runs", str(runs)]
    for assignment in SETTINGS:
        command += ["--set", assignment]
    log = (runs / "log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log)


def _task(runs: Path) -> Path:
    """Return a copy of the shipped task with few examples; it keeps the name."""
    folder = runs / TASK.name
    if not folder.is_dir():
        shutil.copytree(TASK, folder)
        for split in ("validation", "test"):
            file = folder / f"{split}.jsonl"
            lines = file.read_text("utf-8").splitlines(keepends=True)
            file.write_text("".join(lines[:N_EXAMPLES]), "utf-8")
    return folder


def finish(runs: Path) -> None:
    """Run it to its end."""
    with start(runs) as process:
        try:
            assert process.wait(timeout=560) == 0, (runs / "log").read_text(errors="replace")[-3000:]
        finally:
            process.kill()
