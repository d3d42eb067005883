"""One distillation of fixed work, timed stage by stage: this build, an older build, and public parts alone.

    git worktree add --detach ../base-98835bb 98835bb
    python3 -m venv ../base-98835bb/.venv
    ../base-98835bb/.venv/bin/pip install -c ../base-98835bb/constraints.txt -e '../base-98835bb[train,gguf]'
    python benchmarks/whole_run.py --older ../base-98835bb --threads 1 --repeat 1

Sides, each a process of its own, in turns: `ours` and `older` through their own pipelines and run.toml
(`whole_run_stages.py`), `plain` with transformers, peft and TRL alone (`whole_run_plain.py`) on the prompts, choices,
pairs and rows of `ours`. A finished stage of a side is kept in `--folder`: the same command continues. Seconds of CPU
time on one thread are the figure to compare: wall time also holds what else the machine does.

The work is that of the paper (questions and rationales in tags), for the older build knows no other. Left out here,
because the older build lacks it: inputs written for given answers, own-labels students, a step sized by its KL
divergence, several pairs of a question, rank-stabilised LoRA, fresh drafts after the alignment. Left out on both:
direct answers as a vote, adaptive scoring (all cells are measured), tests of the teacher. Still unequal:

* `ours` and `older` ask in their own words, and sampled drafts differ, so calls and tokens do, slightly: they are in
  the rows. In `ours` the student is asked with the bare input, in `older` with the task and a begun answer.
* `ours` measures after the alignment how far the teacher has moved on held-out pairs. Both builds look for a collapse
  before and after it (a text each). `plain` does neither.
* `plain` has no grammar: its rationales end at a stop string, the end token or the limit. It makes the same number of
  calls with the same limits; its tokens are counted. It neither parses nor filters what is written.
* `plain` computes in the floats that a trial finds the fastest, float32 or bfloat16; the builds choose by themselves
  (the GGUF file in llama.cpp, or 8-bit integers).
* TRL tokenizes prompt and completion as one text. Where a token of it spans the two, as after the opened tag of a
  question, one token of that pair is another in `plain`, and so is its loss; rationale pairs and rows are the same.

Off the clock of every side is what a machine does once for a model: the conversion to a checkpoint, the trial of
`plain`, and the layouts that the builds measure for teacher and student; so are imports. The tuned student is another
file in every run, so its layout is measured on the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whole_run_stages import STAGES, read_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "whole_run"
SIDES = ("ours", "older", "plain")
BOTH: dict[str, Any] = {
    "seed": 0,
    "data": "arte",
    "task": {"ref": "home_intents"},
    "teacher": {"shots": 4},
    "check": {"examples": 10},
    "elicit": {
        "questions": 8,
        "shown": 3,
        "asked": 2,
        "temperature": 1.0,
        "top_p": 0.95,
        "question_tokens": 90,
        "rationale_tokens": 60,
        "label": "teacher",
        "grammar": True,
        "opinion_shots": 0,
    },
    "calibrate": {"k": 8, "items": 24, "shots": [0, 2]},
    "prefer": {"score": "likelihood", "race": "off"},
    "align": {
        "question_pairs": 4,
        "rationale_pairs": 4,
        "min_gap": 0.0,
        "learning_rate": 2e-5,
        "batch_size": 2,
        "epochs": 1.0,
        "beta": 0.1,
        "sft_weight": 1.0,
        "lora_rank": 8,
        "lora_targets": ["q_proj", "v_proj"],
        "shots": 0,
        "probe_every": 100,
        "probe_prompts": 1,
    },
    "tailor": {"questions": 12, "label": "teacher", "temperature": 1.0},
    "tune": {"method": "full", "learning_rate": 1e-4, "epochs": 3.0, "batch_size": 8},
    "evaluate": {"limit": 24, "shots": [0], "answer_tokens": 48, "teacher": False},
}
# What the older build does without a key for it.
OURS: dict[str, Any] = {
    "teacher": {"role": "labels"},
    "check": {"own_labels": False},
    "elicit": {"by_label": False},
    "align": {"pairs_per_question": 1, "min_gap_errors": 0.0, "target_kl": 0.0, "rslora": False, "fresh_drafts": 0},
    "tune": {"target": "reasoning-first", "own_labels": False},
}
TINY: dict[str, Any] = {
    "teacher": {"shots": 2},
    "elicit": {"questions": 4, "asked": 2, "question_tokens": 90, "rationale_tokens": 30},
    "calibrate": {"k": 2, "items": 10, "shots": [0]},
    "align": {"question_pairs": 1, "rationale_pairs": 1, "batch_size": 1},
    "tailor": {"questions": 8, "max_prompts": 400},
    "tune": {"epochs": 1.0},
    "evaluate": {"limit": 4, "answer_tokens": 16},
}
# Three times the work: what a side spends once a stage, such as opening a model, weighs as in a real run.
TRIPLE: dict[str, Any] = {
    "elicit": {"questions": 24},
    "align": {"question_pairs": 8, "rationale_pairs": 16},
    "tailor": {"questions": 36},
    "evaluate": {"limit": 72},
}
WORK: dict[str, dict[str, Any]] = {"full": {}, "triple": TRIPLE, "tiny": TINY}
BATCHES = {"full": (8, 16, 32), "triple": (8, 16, 32), "tiny": (2, 4)}
KEPT = {"models", "checkpoints", "hub", "locks", "hashes.json"}  # of a side's cache folder; the rest is measured anew


def merged(*layers: dict[str, Any]) -> dict[str, Any]:
    """Return nested tables laid on top of each other."""
    found: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            found[key] = merged(found.get(key, {}), value) if isinstance(value, dict) else value
    return found


def toml(tables: dict[str, Any]) -> str:
    """Return tables of plain values as TOML; JSON writes such values in the same way."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in tables.items() if not isinstance(value, dict)]
    for name, table in tables.items():
        if isinstance(table, dict):
            lines += [f"\n[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def side_folder(options: argparse.Namespace, side: str, repeat: int) -> Path:
    return Path(options.folder / f"{side}-{repeat}")


def settings_of(options: argparse.Namespace, side: str) -> dict[str, Any]:
    models = {who: {"model": getattr(options, who)} for who in ("teacher", "student")}
    return merged(BOTH, models, WORK[options.work], {} if side == "older" else OURS)


def cold_home(options: argparse.Namespace, side: str, *, cold: bool) -> Path:
    """Return the cache folder of a side: this machine's models and checkpoints made of them, nothing else measured."""
    from arte_edge.cache import cache_subdir

    home = Path(options.folder).parent / "whole-run-home" / side
    home.mkdir(parents=True, exist_ok=True)
    # The older build converts models in its own way.
    for name in ("models",) if side == "older" else ("models", "checkpoints"):
        if not (home / name).exists():
            (home / name).symlink_to(cache_subdir(name))
    for path in home.iterdir() if cold else ():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return home


def run_side(options: argparse.Namespace, side: str, repeat: int) -> None:
    """Run the stages of a side that have no row yet, in a process of its own."""
    folder, first = side_folder(options, side, repeat), side_folder(options, "ours", 0)
    done = {row["stage"] for row in read_rows(folder / "rows.jsonl")}
    if set(options.stages) <= done:
        return
    if side == "plain" and not set(options.stages) <= {row["stage"] for row in read_rows(first / "rows.jsonl")}:
        raise SystemExit(f"plain: {first} has not the inputs of these stages: run the side ours first")
    source = options.older.resolve() if side == "older" else ROOT
    python = source / ".venv" / "bin" / "python" if side == "older" else Path(sys.executable)
    folder.mkdir(parents=True, exist_ok=True)
    run_toml, job_file = folder / "run.toml", folder / "job.json"
    run_toml.write_text(toml(settings_of(options, side)), "utf-8")
    on_llamacpp = any(row.get("engine") == "llamacpp" for row in read_rows(first / "rows.jsonl"))
    job = {
        "side": side,
        "repeat": repeat,
        "threads": options.threads,
        "folder": str(folder),
        "commit": commit(source),
        "run_toml": str(run_toml),
        "settings": settings_of(options, "ours"),
        "stages": options.stages,
        "last": max(options.stages, key=STAGES.index),
        "teacher": options.teacher,
        "texts": str(first) if repeat == 0 and on_llamacpp else "",
        "inputs": str(first),
        "batches": BATCHES[options.work],
    }
    if side == "plain":
        job["checkpoints"] = json.loads((first / "checkpoints.json").read_text("utf-8"))
    job_file.write_text(json.dumps(job, indent=1) + "\n", "utf-8")
    n = str(options.threads)
    environment = {
        **os.environ,
        **dict.fromkeys(("ARTE_EDGE_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), n),
        **dict.fromkeys(("ARTE_EDGE_OFFLINE", "HF_HUB_OFFLINE"), "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "ARTE_EDGE_HOME": str(cold_home(options, side, cold=not done)),
        "PYTHONPATH": str(source),
    }
    script = Path(__file__).with_name(f"whole_run_{'plain' if side == 'plain' else 'stages'}.py")
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        # In a folder without an arte_edge: children of a build look there first.
        code = subprocess.run(
            [python, script, job_file], cwd=folder, env=environment, stderr=log, check=False
        ).returncode
    if code:
        raise SystemExit(f"{side}: exit code {code}; see {folder / 'log.txt'}. The same command continues.")


def commit(source: Path) -> str:
    """Return the commit of a checkout, with a mark if files differ from it."""
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.strip()


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """Return the rows of all sides and repeats that are there, and what goes with them."""
    from arte_edge.runtimes.autotune import machine_id

    found: dict[str, Any] = {"work": options.work, "settings": settings_of(options, "ours")}
    found |= {"machine": machine_id(), "threads": options.threads, "rows": []}
    for repeat in range(options.repeat):
        for side in SIDES:
            rows = read_rows(side_folder(options, side, repeat) / "rows.jsonl")
            found["rows"] += [{k: v for k, v in row.items() if k != "store_bytes"} for row in rows]
    for name, path in (("texts", "older-0/texts.json"), ("plain_trial", "plain-trial.json")):
        if (options.folder / path).is_file():
            found[name] = json.loads((options.folder / path).read_text("utf-8"))
    return found


def report(found: dict[str, Any], stages: Sequence[str]) -> list[str]:
    """Return a table of medians over the repeats, with ratios to `ours`, and the losses; at most 80 columns."""
    by: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        by.setdefault((row["stage"], row["side"]), []).append(row)

    def median(stage: str, side: str, key: str) -> float:
        return float(statistics.median(row[key] for row in by[stage, side]))

    lines = [f"{'stage':<9}{'side':<6}{'cpu s':>8}{'wall s':>8}{'x cpu':>7}{'x wall':>7}"]
    lines[0] += f"{'peak GB':>9}{'calls':>7}{'tokens':>8}{'tok/cpu s':>11}"
    for stage in stages:
        for side in SIDES:
            if (stage, side) not in by:
                continue
            cpu, wall = median(stage, side, "cpu_s"), median(stage, side, "wall_s")
            ratio = [""] * 2
            if (stage, "ours") in by:
                pairs = ((cpu, "cpu_s"), (wall, "wall_s"))
                ratio = [f"{value / median(stage, 'ours', key):.2f}" for value, key in pairs]
            tokens = median(stage, side, "tokens_written")
            rate = f"{tokens / cpu:.1f}" if tokens else ""
            lines.append(
                f"{stage:<9}{side:<6}{cpu:>8.1f}{wall:>8.1f}{ratio[0]:>7}{ratio[1]:>7}"
                f"{median(stage, side, 'peak_rss_bytes') / 1e9:>9.2f}{median(stage, side, 'n_call'):>7.0f}"
                f"{tokens:>8.0f}{rate:>11}"
            )
    totals = {
        side: [sum(median(stage, side, key) for stage in stages) for key in ("cpu_s", "wall_s")]
        for side in SIDES
        if all((stage, side) in by for stage in stages)
    }
    for side, (cpu, wall) in totals.items():
        ours = totals.get("ours")
        ratio = [""] * 2 if ours is None else [f"{cpu / ours[0]:.2f}", f"{wall / ours[1]:.2f}"]
        lines.append(f"{'all':<9}{side:<6}{cpu:>8.1f}{wall:>8.1f}{ratio[0]:>7}{ratio[1]:>7}")
    for stage in ("align", "tune"):
        losses = {side: by[stage, side][0]["losses"] for side in SIDES if (stage, side) in by}
        if losses and stage in stages:
            each = (f"{side} {values[0]:.3f} → {values[-1]:.3f}" for side, values in losses.items())
            lines.append(f"{stage} loss: {', '.join(each)}")
            if {"ours", "plain"} <= losses.keys():
                mine, theirs = losses["ours"], losses["plain"]
                most = max(abs(a / b - 1) for a, b in zip(mine, theirs, strict=False))
                lines.append(
                    f"  ours over plain: {mine[-1] / theirs[-1] - 1:+.2%} at the last of {len(mine)} and "
                    f"{len(theirs)} steps, {most:.2%} at most"
                )
    if texts := found.get("texts"):
        lines.append(f"equal texts of ours and older, greedy, one file: {texts['equal']} of {texts['n']}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", choices=tuple(WORK), default="full")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--teacher", default="qwen2.5-coder-0.5b-instruct", help="a registry name")
    parser.add_argument("--student", default="smollm2-135m-instruct", help="a registry name")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--older", type=Path, default=ROOT.parent / "base-98835bb", help="checkout with a .venv")
    parser.add_argument("--folder", type=Path, help="work folder; empty: runs/whole-run-WORK")
    parser.add_argument("--json", type=Path, help="the result; empty: benchmarks/results/whole_run, tiny: the folder")
    options = parser.parse_args()
    options.folder = (options.folder or ROOT / "runs" / f"whole-run-{options.work}").resolve()
    out = options.json or (options.folder if options.work == "tiny" else RESULTS) / f"rows-{options.work}.json"
    for repeat in range(options.repeat):
        for side in (side for side in SIDES if side in options.sides):  # plain needs the inputs of ours
            run_side(options, side, repeat)
    found = collect(options)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print("\n".join(report(found, options.stages)))


if __name__ == "__main__":
    main()
