"""How fast does one student write in each ONNX layout and runtime? Decoding, side by side in one run.

    python benchmarks/onnx_speed.py smollm2-135m-instruct           # exports, then measures
    python benchmarks/onnx_speed.py --folders /tmp/onnx --rounds 7  # exports kept there are used again

Every subject is a process of its own, loaded beforehand; the subjects write in turn, round after
round, so that whatever else the machine does meets all of them alike. One decode is a prompt of
64 tokens and 64 greedy tokens after it; the first is not counted, nor is the first round. Both
the clock and the CPU time of the process are kept: with one thread they agree on an idle machine,
and on a busy one only CPU time compares.

ORTModelForCausalLM runs in the environment that has optimum, through `generate`, as its users do.

Writes rows.jsonl (one line a decode) and summary.json under benchmarks/results/onnx/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "onnx"
N_PROMPT, N_NEW = int(os.environ.get("NP", "64")), 64
# name -> folder, runtime
SUBJECTS = {
    "genai int4, onnxruntime-genai": ("genai-int4", "genai"),
    "genai int4, arte-edge session": ("genai-int4", "session"),
    "optimum int8, arte-edge session": ("optimum-int8", "session"),
    "optimum int8, ORTModelForCausalLM": ("optimum-int8", "ortmodel"),
    "optimum fp32, arte-edge session": ("optimum-fp32", "session"),
    "optimum fp32, ORTModelForCausalLM": ("optimum-fp32", "ortmodel"),
}
RATIOS = [
    ("genai int4, arte-edge session", "optimum int8, arte-edge session"),
    ("genai int4, onnxruntime-genai", "optimum int8, arte-edge session"),
    ("optimum int8, arte-edge session", "optimum int8, ORTModelForCausalLM"),
    ("optimum fp32, arte-edge session", "optimum fp32, ORTModelForCausalLM"),
]
Stamp = Callable[[], None]
Decode = Callable[[list[int], int, Stamp], list[int]]


def open_session(folder: Path, threads: int) -> Decode:
    """Return a decoder through `arte_edge.export.onnx_session`."""
    from arte_edge.export.onnx_session import OnnxSession

    session = OnnxSession(folder, threads)

    def decode(ids: list[int], n_new: int, stamp: Stamp) -> list[int]:
        session.reset()
        out = []
        for token in session.write(ids, n_new, stop=()):
            stamp()
            out.append(token)
        return out

    return decode


def open_genai(folder: Path, threads: int) -> Decode:
    """Return a decoder through onnxruntime-genai, told how many threads to use."""
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(options))
    model = og.Model(config)

    def decode(ids: list[int], n_new: int, stamp: Stamp) -> list[int]:
        params = og.GeneratorParams(model)
        # min_length as well: an end token must not make one subject's text shorter
        params.set_search_options(max_length=len(ids) + n_new, min_length=len(ids) + n_new, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(ids, np.int32))
        out = []
        while len(out) < n_new and not generator.is_done():
            generator.generate_next_token()
            stamp()
            out.append(int(generator.get_next_tokens()[0]))
        return out

    return decode


def open_ortmodel(folder: Path, threads: int) -> Decode:
    """Return a decoder through optimum's ORTModelForCausalLM."""
    import torch
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(threads)
    options = SessionOptions()
    options.intra_op_num_threads = threads
    model = ORTModelForCausalLM.from_pretrained(folder, session_options=options, local_files_only=True)
    model.generation_config.eos_token_id = None

    def decode(ids: list[int], n_new: int, stamp: Stamp) -> list[int]:
        class Watch(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                stamp()
                return torch.zeros(len(input_ids), dtype=torch.bool)

        prompt = torch.tensor([ids])
        with torch.inference_mode():
            text = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=n_new,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Watch()]),
            )
        return [int(token) for token in text[0, len(ids) :]]

    return decode


def serve(kind: str, folder: Path, threads: int) -> None:
    """Load one subject, then decode once for each line of input; one line of JSON is the answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the answers
    decode = {"session": open_session, "genai": open_genai, "ortmodel": open_ortmodel}[kind](folder, threads)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        stamps: list[tuple[float, float]] = []

        def stamp(kept: list[tuple[float, float]] = stamps) -> None:
            kept.append((time.perf_counter(), time.process_time()))

        ids = decode(json.loads(line), N_NEW, stamp)
        (wall0, cpu0), (wall1, cpu1) = stamps[0], stamps[-1]
        n = len(stamps) - 1
        row = {"wall_tokens_per_s": n / (wall1 - wall0), "cpu_tokens_per_s": n / (cpu1 - cpu0), "ids": ids}
        print(json.dumps(row), file=answers, flush=True)


def export(model: str, folders: Path, arch: str) -> None:
    """Make whichever of the exports is not there yet."""
    from arte_edge.export import onnx_genai, onnx_optimum
    from arte_edge.models import resolve

    checkpoint = resolve(model).checkpoint()
    if not (out := folders / "genai-int4").exists():
        onnx_genai.build(checkpoint, out, onnx_genai.GenaiSettings(precision="int4"))
    fp32 = folders / "optimum-fp32"
    if not fp32.exists():
        onnx_optimum.build(checkpoint, fp32, onnx_optimum.OptimumSettings(precision="fp32"))
    if not (out := folders / "optimum-int8").exists():
        settings = onnx_optimum.OptimumSettings.model_validate({"precision": "int8", "arch": arch})
        onnx_optimum.build(checkpoint, out, settings, fp32=fp32)


def main() -> None:
    """Export, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--folders", type=Path, default=Path("runs") / "onnx_speed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arch", default="avx512", choices=["arm64", "avx2", "avx512"])
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve[0], Path(options.serve[1]), options.threads)
    from arte_edge.export.onnx_optimum import find_python

    export(options.model, options.folders, options.arch)
    subjects = {}
    for name, (folder, kind) in SUBJECTS.items():
        python = str(find_python()) if kind == "ortmodel" else sys.executable
        command = [python, __file__, "--threads", str(options.threads)]
        command += ["--serve", kind, str((options.folders / folder).absolute())]
        subjects[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert ask(subjects[name]) == "ready", name
    # A text with no end token in it: ids of plain words, the same for every subject.
    prompt = [(7919 * i) % 20_000 + 1_000 for i in range(N_PROMPT)]
    rows = []
    for turn in range(options.rounds + 1):
        for name, process in subjects.items():
            row = {"subject": name, "round": turn, **ask(process, prompt)}
            print(
                f"{turn} {name:36} {row['wall_tokens_per_s']:7.1f} {row['cpu_tokens_per_s']:7.1f}", flush=True
            )
            rows.append(row)
    for process in subjects.values():
        process.communicate()
    write([row for row in rows if row["round"]], rows, options)


def ask(process: subprocess.Popen[str], prompt: list[int] | None = None) -> Any:
    """Send a prompt, if any, and return the subject's next answer."""
    assert process.stdin and process.stdout
    if prompt is not None:
        process.stdin.write(json.dumps(prompt) + "\n")
        process.stdin.flush()
    return json.loads(process.stdout.readline())


def write(counted: list[dict[str, Any]], rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the raw rows and their medians, and print the medians as a Markdown table."""
    median = {
        name: {
            key: statistics.median(row[key] for row in counted if row["subject"] == name)
            for key in ("wall_tokens_per_s", "cpu_tokens_per_s")
        }
        for name in SUBJECTS
    }
    import onnxruntime
    import onnxruntime_genai

    summary = {
        "command": shlex.join(["python", "benchmarks/onnx_speed.py", *sys.argv[1:]]),
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "arch": options.arch,
        "onnxruntime": onnxruntime.__version__,
        "onnxruntime_genai": onnxruntime_genai.__version__,
        "load_average": os.getloadavg(),
        "median": median,
        "ratio": {
            f"{fast} / {slow}": {key: median[fast][key] / median[slow][key] for key in median[fast]}
            for fast, slow in RATIOS
        },
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print("\n| subject | tokens/s, clock | tokens/s, CPU time |\n|---|---:|---:|")
    for name, row in median.items():
        print(f"| {name} | {row['wall_tokens_per_s']:.1f} | {row['cpu_tokens_per_s']:.1f} |")
    for name, row in summary["ratio"].items():
        print(f"{name}: {row['wall_tokens_per_s']:.2f} clock, {row['cpu_tokens_per_s']:.2f} CPU")


if __name__ == "__main__":
    main()
