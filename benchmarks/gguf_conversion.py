"""How long and how much memory a conversion to F16 GGUF takes: ours against llama.cpp's own script.

    python benchmarks/gguf_conversion.py LLAMA_CPP CHECKPOINT [--runs 5]

LLAMA_CPP is a checkout with convert_hf_to_gguf.py. Both run as whole processes, in
turns, after one round that is thrown away, so that the files are cached for both.
Peak memory is the resident set that the system reports of the finished process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = (
    "import sys; from pathlib import Path; from arte_edge.gguf.convert import convert; "
    "convert(Path(sys.argv[1]), Path(sys.argv[2]))"
)


def run(command: list[str]) -> tuple[float, float]:
    """Run a command to its end; return its wall time in seconds and its peak memory in MB."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as chatter:
        child = subprocess.Popen(command, stdout=chatter, stderr=chatter, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        _, status, usage = os.wait4(child.pid, 0)
        wall_s = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            chatter.seek(0)
            sys.exit(f"{command[1]} failed:\n{chatter.read()[-2000:]}")
    per_kib = 1 if sys.platform == "darwin" else 1024
    return wall_s, usage.ru_maxrss * per_kib / 1e6


def main() -> None:
    """Measure both and print one JSON line for each, and how many times faster ours is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out.gguf")
        script = str(given.llama_cpp / "convert_hf_to_gguf.py")
        commands = {
            "arte-edge": [sys.executable, "-c", OURS, str(given.checkpoint), out],
            "llama.cpp": [*(sys.executable, script, str(given.checkpoint)), *("--outfile", out, "--outtype", "f16")],
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for turn in range(given.runs + 1):
            for name, command in commands.items():
                measured = run(command)
                Path(out).unlink()
                if turn:
                    found[name].append(measured)
    medians = {}
    for name, rows in found.items():
        walls = [round(wall_s, 3) for wall_s, _ in rows]
        medians[name] = statistics.median(walls)
        peak_mb = round(max(peak for _, peak in rows), 1)
        line = {"converter": name, "wall_s": walls, "median_wall_s": medians[name], "peak_rss_mb": peak_mb}
        print(json.dumps(line))
    print(json.dumps({"times_faster": round(medians["llama.cpp"] / medians["arte-edge"], 2)}))


if __name__ == "__main__":
    main()
