"""How fast are a draft's preference questions answered? arte-edge and its peers on identical work.

    python benchmarks/preference_scoring.py run MODEL.gguf --checkpoint DIR --draft 0 --threads 2
    python benchmarks/preference_scoring.py report

The work: one draft example (a question and a rationale that a teacher wrote, `drafts.json`) before
each of 40 validation questions of `home_intents`, greedy, at most 64 tokens, the same stop strings;
prompts as the pipeline renders them. Each subject is a process of its own (`preference_peers.py`),
one after the other in every run, so that the machine's moods meet all of them. Run it on an idle
machine: llama.cpp with as many threads as cores collapses when something else runs.

"ceiling" is no peer: rows of one token each with logits, as fast as `llama_decode` takes them, best of
four sequence counts, with and without flash attention, at the depth that the work has on average. Rows
go to results/preference_scoring.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from preference_peers import SUBJECTS

RESULTS = Path(__file__).parent / "results" / "preference_scoring"
K, TOKENS = 40, 64
OURS = "arte-edge"


def make_work(gguf: Path, checkpoint: str, drafts: list[int], threads: int) -> dict[str, Any]:
    """Return prompts and settings for some drafts of `drafts.json`."""
    from arte_edge.distill.prompts import (
        ANSWER_CLOSE,
        ANSWER_PREFILL,
        ANSWER_STOPS,
        STEP_BY_STEP,
        Shot,
        student_messages,
    )
    from arte_edge.runtimes.llamacpp.engine import LlamaCppEngine
    from arte_edge.runtimes.prompt_render import render
    from arte_edge.tasks.loaders import load_task

    task = load_task("home_intents")
    examples = task.validation[:K]
    rows = json.loads((RESULTS / "drafts.json").read_text("utf-8"))
    shots = [Shot(rows[i]["question"], rows[i]["rationale"]) for i in drafts]
    engine = LlamaCppEngine(gguf, sha256="", threads=threads)
    messages = [student_messages(task, example.input, [shot]) for shot in shots for example in examples]
    prompts = [render(engine, message, STEP_BY_STEP) for message in messages]
    lengths = [engine.count_tokens(prompt) for prompt in prompts]
    options = [[o + ANSWER_CLOSE for o in task.answer.options(e.input)] for e in examples]
    return {
        "gguf": str(gguf),
        "checkpoint": checkpoint,
        "threads": threads,
        "k": K,
        "tokens": TOKENS,
        "stop": list(ANSWER_STOPS),
        "prompts": prompts,
        "forced": [render(engine, message, ANSWER_PREFILL) for message in messages],
        "choices": options * len(shots),
        "targets": [example.target for example in examples] * len(shots),
        "ceiling_depth": round(statistics.mean(lengths)) + TOKENS // 4,
    }


def measure(subject: str, label: str, work: dict[str, Any], name: str, drafts: list[int]) -> dict[str, Any]:
    """Run one subject in a process of its own; return its row."""
    from arte_edge.tasks.answers import extract
    from arte_edge.tasks.loaders import load_task

    answer = load_task("home_intents").answer
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(work, file)
        file.flush()
        command = [sys.executable, str(Path(__file__).with_name("preference_peers.py")), subject, file.name]
        environment = os.environ | {"ARTE_EDGE_PROBE": "0", "OMP_NUM_THREADS": str(work["threads"])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{subject}: {done.stderr[-2000:]}")
    out = json.loads(done.stdout.strip().splitlines()[-1])
    answers = [extract(text, answer) for text in out["texts"]] if subject != "ceiling" else out["texts"]
    row = {"model": name, "subject": label, "drafts": drafts, "k": K, "threads": work["threads"]}
    row |= {"seconds": out["seconds"], "tokens": out["tokens"]}
    row["tokens_per_s"] = out["tokens"] if subject == "ceiling" else round(out["tokens"] / out["seconds"], 1)
    return row | {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "answers": answers}


def run(arguments: argparse.Namespace) -> None:
    work = make_work(arguments.gguf, arguments.checkpoint, arguments.draft, arguments.threads)
    for subject in arguments.subjects or [s for s in SUBJECTS if s != "transformers bf16"]:
        label = subject
        if subject.startswith(OURS) and len(arguments.draft) > 1:
            label = f"{subject}, {len(arguments.draft)} drafts"
        row = measure(subject, label, work, arguments.name, arguments.draft)
        with (arguments.rows or RESULTS / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{label:32} {row['seconds']:8.2f} s {row['tokens_per_s']:8.1f} tokens/s", flush=True)


def report() -> str:
    """Return the table of all rows as Markdown: medians, ratios, and answers that agree with ours."""
    text = (RESULTS / "rows.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        lines += [f"## {model}", ""]
        lines += ["| subject | runs | s a draft | tokens/s | share of the ceiling | answers as ours |"]
        lines += ["|---|---|---|---|---|---|"]
        by_subject = defaultdict(list)
        for row in mine:
            by_subject[row["subject"]].append(row)
        rates = {s: statistics.median(r["tokens_per_s"] for r in found) for s, found in by_subject.items()}
        reference = [row for row in mine if row["subject"].split(",")[0] == OURS]
        for subject, found in sorted(by_subject.items(), key=lambda item: -rates[item[0]]):
            seconds = statistics.median(r["seconds"] / len(r["drafts"]) for r in found)
            share = f"{rates[subject] / rates['ceiling']:.0%}" if "ceiling" in rates else ""
            cells = [subject, str(len(found)), f"{seconds:.1f}", f"{rates[subject]:.0f}", share]
            if subject == "ceiling" or "likelihood" in subject:
                cells[2:] = ["", cells[3], "", ""] if subject == "ceiling" else [cells[2], "", "", ""]
                lines.append(f"| {' | '.join(cells)} |")
                continue
            lines.append(f"| {' | '.join([*cells, _agreement(found, reference)])} |")
        lines += ["", *_findings(by_subject)]
        lines.append("")
    return "\n".join(lines)


def _findings(by_label: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Say for each of our engines what the fastest peer takes for the same drafts, and what a score costs."""
    by_subject = defaultdict(list)
    for label, rows in by_label.items():
        by_subject[label.split(",")[0]] += rows
    lines = []
    for name in [name for name in by_subject if name.startswith(OURS)]:
        for drafts in sorted({tuple(row["drafts"]) for row in by_subject[name]}):
            mine = _seconds(by_subject[name], drafts)
            label = f"- {name}, drafts {', '.join(map(str, drafts))}: {mine:.2f} s; "
            if "likelihood" in name:
                if writing := _seconds(by_subject[name.replace(" likelihood", "")], drafts):
                    lines.append(f"{label}writing by the same engine takes {writing / mine:.1f} × that.")
                continue
            peers = {
                peer: seconds
                for peer, rows in by_subject.items()
                if not peer.startswith((OURS, "ceiling")) and (seconds := _seconds(rows, drafts))
            }
            if peers:
                best = min(peers, key=lambda peer: peers[peer])
                lines.append(f"{label}the fastest peer, {best}, takes {peers[best] / mine:.2f} × that.")
    return lines


def _seconds(rows: list[dict[str, Any]], drafts: tuple[int, ...]) -> float:
    """Return the median time for these drafts, in one call or one by one, whichever is less; 0 if not measured."""
    together = [row["seconds"] for row in rows if tuple(row["drafts"]) == drafts]
    single = [[row["seconds"] for row in rows if row["drafts"] == [draft]] for draft in drafts]
    ways = [statistics.median(together)] if together else []
    if all(single):
        ways.append(sum(statistics.median(times) for times in single))
    return min(ways, default=0.0)


def _agreement(found: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str:
    reference = {tuple(row["drafts"]): row["answers"] for row in ours}
    pairs = [
        (a, b)
        for row in found
        if (known := reference.get(tuple(row["drafts"])))
        for a, b in zip(row["answers"], known, strict=True)
    ]
    return f"{sum(a == b for a, b in pairs) / len(pairs):.1%} of {len(pairs)}" if pairs else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="measure, and append rows")
    one.add_argument("gguf", type=Path)
    one.add_argument("--checkpoint", required=True, help="the same weights as safetensors, for transformers")
    one.add_argument("--name", required=True, help="of the model, in the table")
    one.add_argument("--draft", type=int, nargs="+", default=[0], help="numbers in drafts.json")
    one.add_argument("--subjects", nargs="+", choices=SUBJECTS, help="all unless given")
    one.add_argument("--threads", type=int, default=os.cpu_count())
    one.add_argument("--rows", type=Path, help="another file for the rows")
    commands.add_parser("report", help="print the table")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments)
    else:
        print(report())


if __name__ == "__main__":
    main()
