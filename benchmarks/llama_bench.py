"""Do our figures agree with llama-bench's, on the very same library, file and number of threads?

llama-bench is compiled from the source that the installed llama-cpp-python was built from, and linked
with the shared objects of that package, so that both call the same kernels with the same flags. Then
the two take turns on each file.

    python benchmarks/llama_bench.py --llama-cpp DIR --threads 1,2 MODEL.gguf ...

DIR is llama.cpp as it lies in the sdist of the installed llama-cpp-python (``vendor/llama.cpp``).
Needs CMake and a C++ compiler; the build takes ten minutes on one core and is kept in --work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from arte_edge.bench.runner import run_case
from arte_edge.bench.settings import BenchSettings, cases, describe
from arte_edge.device.detect import detect

RESULTS = Path(__file__).parent / "results" / "llama_bench"
LIMITS = {"tg": 0.95, "pp": 0.90}  # of llama-bench's figure

# llama.cpp's own build files for its common library and for llama-bench, with the installed library in
# the place of the one that they would compile.
CMAKE = """\
cmake_minimum_required(VERSION 3.18)
project(llama-bench-of-the-installed-library C CXX)
set(CMAKE_CXX_STANDARD 17)
set(LLAMA_BUILD_COMMON ON)
set(LLAMA_VERSION_BASE 0.0.0)
set(LLAMA_VERSION_MAJOR 0)
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT vendored)
set(BUILD_COMPILER installed)
set(BUILD_TARGET installed)
set(CMAKE_SOURCE_DIR ${LLAMA_CPP})
function(llama_add_compile_flags)
endfunction()
include(${LLAMA_CPP}/cmake/license.cmake)
include_directories(${LLAMA_CPP}/include ${LLAMA_CPP}/ggml/include)
add_library(llama INTERFACE)
foreach(name llama ggml ggml-cpu ggml-base)
  target_link_libraries(llama INTERFACE ${LIBRARIES}/lib${name}.so)
endforeach()
target_include_directories(llama INTERFACE ${LLAMA_CPP}/include ${LLAMA_CPP}/ggml/include ${LLAMA_CPP}/src)
add_subdirectory(${LLAMA_CPP}/vendor vendor EXCLUDE_FROM_ALL)
add_subdirectory(${LLAMA_CPP}/common common EXCLUDE_FROM_ALL)
add_subdirectory(${LLAMA_CPP}/tools/llama-bench tool)
"""


def build(llama_cpp: Path, work: Path) -> Path:
    """Return the llama-bench that is linked with the installed library, compiled if it is not there."""
    import llama_cpp as package

    tool = work / "build" / "tool" / "llama-bench"
    if tool.is_file():
        return tool
    if not (llama_cpp / "tools" / "llama-bench" / "llama-bench.cpp").is_file():
        sys.exit(f"{llama_cpp}: not llama.cpp's source; unpack the sdist of llama-cpp-python and give it")
    work.mkdir(parents=True, exist_ok=True)
    (work / "CMakeLists.txt").write_text(CMAKE)
    libraries = Path(package.__file__).parent / "lib"
    options = [f"-DLLAMA_CPP={llama_cpp.resolve()}", f"-DLIBRARIES={libraries}", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(["cmake", "-S", str(work), "-B", str(work / "build"), *options], check=True)
    subprocess.run(["cmake", "--build", str(work / "build"), "--target", "llama-bench"], check=True)
    return tool


def theirs(tool: Path, model: Path, threads: int, repetitions: int) -> dict[str, list[float]]:
    """Return llama-bench's samples in tokens/s by test."""
    command = [str(tool), "-m", str(model), "-t", str(threads), "-r", str(repetitions), "-o", "json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {
        f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}": row["samples_ts"]
        for row in json.loads(done.stdout)
    }


def ours(model: Path, threads: int, repetitions: int) -> dict[str, list[float]]:
    """Return our samples in tokens/s by test, each test from a child process of its own."""
    device, target = detect(), describe(model)
    settings = BenchSettings(threads=(threads,), repetitions=repetitions, warmup_s=2.0, roofline=False)
    found = {}
    for case in cases(model, settings, device):
        row = run_case(target, case, device)
        if not row.ok:
            sys.exit(f"{row.test}: {row.status}: {row.reason}")
        found[row.test] = list(row.samples_ts)
    return found


def compare(tool: Path, model: Path, threads: int, rounds: int, repetitions: int) -> list[dict[str, Any]]:
    """Measure both in turn and return a row a test."""
    samples: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        both: list[tuple[str, Callable[[], dict[str, list[float]]]]] = [
            ("llama-bench", partial(theirs, tool, model, threads, repetitions)),
            ("arte-edge", partial(ours, model, threads, repetitions)),
        ]
        for name, measure in both if number % 2 == 0 else reversed(both):
            for test, rates in measure().items():
                samples.setdefault(test, {}).setdefault(name, []).extend(rates)
    return [summed_up(model.name, threads, test, found) for test, found in samples.items()]


def summed_up(model: str, threads: int, test: str, found: dict[str, list[float]]) -> dict[str, Any]:
    """Return the row of one test from all samples of both."""
    a, b = (statistics.median(found[name]) for name in ("llama-bench", "arte-edge"))
    return {
        "model": model,
        "threads": threads,
        "test": test,
        "llama_bench_ts": round(a, 2),
        "arte_edge_ts": round(b, 2),
        "ratio": round(b / a, 4),
        "ratio_of_best": round(max(found["arte-edge"]) / max(found["llama-bench"]), 4),
        "limit": LIMITS[test[:2]],
        "samples_ts": {name: [round(rate, 2) for rate in rates] for name, rates in found.items()},
    }


def pooled(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of an earlier call and of this one, the samples of the same test put together."""
    found: dict[tuple[str, int, str], dict[str, list[float]]] = {}
    for row in [*before, *rows]:
        samples = found.setdefault((row["model"], row["threads"], row["test"]), {})
        for name, rates in row["samples_ts"].items():
            samples.setdefault(name, []).extend(rates)
    return [summed_up(*key, samples) for key, samples in found.items()]


def readme(rows: list[dict[str, Any]]) -> str:
    """Return the page that says what was measured."""
    import llama_cpp as package

    device = detect()
    lines = [
        "# arte-edge bench beside llama-bench",
        "",
        f"llama-bench compiled from the source of llama-cpp-python {package.__version__} and linked with its shared",
        "objects; the two took turns on each file. Medians of all repetitions in tokens/s, their ratio, and the ratio",
        "of the best repetitions; samples in `rows.jsonl`.",
        f"On: {device.cpu}, {device.cores} cores ({device.virtual or 'bare metal'}).",
        "",
        "    python benchmarks/llama_bench.py --llama-cpp DIR --threads 1,2 MODEL.gguf ...",
        "",
        "| file | threads | test | llama-bench | arte-edge | ratio | of the best | at least |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shown = f"{row['llama_bench_ts']} | {row['arte_edge_ts']} | {row['ratio']:.3f}"
        shown += f" | {row['ratio_of_best']:.3f} | {row['limit']}"
        lines.append(f"| {row['model']} | {row['threads']} | {row['test']} | {shown} |")
    n = [len(rates) for row in rows for rates in row["samples_ts"].values()]
    worst = {kind: min((r["ratio"] for r in rows if r["test"].startswith(kind)), default=0.0) for kind in LIMITS}
    lines += ["", f"Lowest ratio: writing {worst['tg']:.3f}, reading {worst['pp']:.3f}."]
    lines += [
        f"{min(n)} to {max(n)} repetitions of each, from several processes: a process may be slow as a whole.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Build, measure, write, and return 1 if a ratio is below its limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="DIR")
    parser.add_argument("--threads", default="1", help="comma list")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=2, help="in each round")
    parser.add_argument("--work", type=Path, default=Path("build-llama-bench"), help="folder of the build")
    parser.add_argument("--keep", action="store_true", help="add the samples to those that are there")
    args = parser.parse_args()
    tool = build(args.llama_cpp, args.work)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "rows.jsonl"
    rows: list[dict[str, Any]] = []
    if args.keep and file.is_file():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    for threads in map(int, args.threads.split(",")):
        for model in args.models:
            found = compare(tool, model, threads, args.rounds, args.repetitions)
            for row in found:
                print(f"{row['model']} {row['threads']} {row['test']}: {row['ratio']:.3f}", flush=True)
            # Written file by file: what was measured stays if the rest is stopped.
            rows = sorted(pooled(rows, found), key=lambda row: (row["model"], row["threads"], row["test"]))
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            (RESULTS / "README.md").write_text(readme(rows))
    return int(any(row["ratio"] < row["limit"] for row in rows))


if __name__ == "__main__":
    if shutil.which("cmake") is None:
        sys.exit("cmake is not installed")
    sys.exit(main())
