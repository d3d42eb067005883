"""Does bench notice other work? The same file with and without a competing process on each core.

    python benchmarks/contention.py [MODEL] --runs 20 --seed 0 --json benchmarks/results/contention/rows.json

Quiet and contended cases take turns in an order drawn from the seed, each in a process of its own as in
`arte-edge bench`. On an otherwise idle machine 0 quiet and all contended ones must be marked. 40 cases of
SmolLM2-135M on two cores take about three minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arte_edge.bench.runner import run_case
from arte_edge.bench.settings import BenchSettings, cases, describe
from arte_edge.cache import write_atomic
from arte_edge.device.detect import detect
from arte_edge.machine import available_cores
from arte_edge.models import resolve
from arte_edge.stats import wilson

KEYS = ("status", "contended", "contended_reason", "n_repeated", "median_ts", "samples_ts", "load_average")


@contextmanager
def other_work(processes: int) -> Iterator[None]:
    """Keep so many processes busy while the block runs."""
    spin = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(spin) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct", help="a file, or a registry name")
    parser.add_argument("--runs", type=int, default=20, help="of each kind")
    parser.add_argument("--contended-only", action="store_true", help="on a machine that is never idle")
    parser.add_argument("--processes", type=int, default=available_cores(), help="that compete")
    parser.add_argument("-t", "--threads", type=int, default=0, help="0: as bench chooses")
    parser.add_argument("-p", "--n-prompt", type=int, default=64)
    parser.add_argument("-r", "--repetitions", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--json", type=Path, help="where to write rows and summary")
    options = parser.parse_args()
    settings = BenchSettings(
        n_prompt=(options.n_prompt,),
        n_gen=(0,),
        threads=(options.threads,),
        repetitions=options.repetitions,
        warmup=False,
        roofline=False,
    )
    facts, target = detect(), describe(resolve(options.model).path)
    (case,) = cases(target.path, settings, facts)
    kinds = ["contended"] * options.runs + ["quiet"] * (0 if options.contended_only else options.runs)
    random.Random(options.seed).shuffle(kinds)
    rows: list[dict[str, Any]] = []
    for number, kind in enumerate(kinds, 1):
        with other_work(options.processes if kind == "contended" else 0):
            row = run_case(target, case, facts)
        cpu = [use.model_dump() for use in row.cpu]
        rows.append({"kind": kind} | {key: getattr(row, key) for key in KEYS} | {"cpu": cpu})
        print(f"{number}/{len(kinds)} {kind}: {row.median_ts:.1f} tokens/s, contended: {row.contended}", flush=True)
    summary = {kind: _summary([row for row in rows if row["kind"] == kind]) for kind in sorted(set(kinds))}
    about = {key: getattr(case, key) for key in ("test", "threads", "repetitions")}
    about |= {"model": target.model_filename, "processes": options.processes, "seed": options.seed}
    document = {"about": about, "device": facts.model_dump(), "summary": summary, "rows": rows}
    print(json.dumps(summary, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.json, (json.dumps(document, indent=1) + "\n").encode())


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many cases were marked, with a 95 % interval, and their rates and shares."""
    marked, n = sum(row["contended"] is True for row in rows), len(rows)
    rates = [row["median_ts"] for row in rows]
    uses = [use for row in rows for use in row["cpu"]]
    most = {
        key: max((use[key] for use in uses if use[key] is not None), default=None)
        for key in ("wait_share", "others_cores", "steal_share")
    }
    low, high = wilson(marked, n)
    return {
        "n": n,
        "marked": marked,
        "share_low": round(low, 4),
        "share_high": round(high, 4),
        "median_ts": round(statistics.median(rates), 2),
        "lowest_ts": round(min(rates), 2),
        "highest_ts": round(max(rates), 2),
        "most_of_a_sample": most,
    }


if __name__ == "__main__":
    main()
