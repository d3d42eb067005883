"""How fast does one student write in each ONNX layout and runtime? Decoding, side by side in one run.

    python benchmarks/onnx_speed.py                              # exports, then measures, one thread
    python benchmarks/onnx_speed.py --threads 2 --prompt 64 512  # exports kept in --folders are used again

Every subject is a process of its own, loaded beforehand; the subjects write in turn, round after
round, so that whatever else the machine does meets all of them alike. One decode is a prompt and
64 greedy tokens after it; the first is not counted, nor is the first round. Both the clock and the
CPU time of the process are kept: with one thread they agree on an idle machine, and on a busy one
only CPU time compares.

"optimum" is what optimum itself writes with its own defaults, run in its ORTModelForCausalLM by
`generate`, in the environment that has it. "portable" is our export of that layout.

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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "onnx"
N_NEW = 64
# name -> folder, runtime
SUBJECTS = {
    "genai int4, onnxruntime-genai": ("genai-int4", "genai"),
    "genai int4, our session": ("genai-int4", "session"),
    "portable int8, our session": ("portable-int8", "session"),
    "portable int8, ORTModelForCausalLM": ("portable-int8", "ortmodel"),
    "optimum int8, ORTModelForCausalLM": ("optimum-int8", "ortmodel"),
    "portable fp32, our session": ("portable-fp32", "session"),
    "optimum fp32, ORTModelForCausalLM": ("optimum-fp32", "ortmodel"),
}
RATIOS = [
    ("genai int4, our session", "optimum int8, ORTModelForCausalLM"),
    ("genai int4, our session", "portable int8, our session"),
    ("portable int8, our session", "optimum int8, ORTModelForCausalLM"),
    ("portable int8, our session", "portable int8, ORTModelForCausalLM"),
    ("portable fp32, our session", "optimum fp32, ORTModelForCausalLM"),
]
Stamp = Callable[[], None]
Decode = Callable[[list[int], int, Stamp], list[int]]


def open_session(folder: Path, threads: int) -> Decode:
    """Return a decoder through `arte_edge.runtimes.onnxruntime`."""
    from arte_edge.runtimes.onnxruntime import OnnxSession

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


def make_stock(checkpoint: Path, folders: Path, arch: str) -> None:
    """Export and quantize as optimum's documentation shows it. `checkpoint` is one that transformers 4 reads."""
    from optimum.onnxruntime import AutoQuantizationConfig, ORTModelForCausalLM, ORTQuantizer

    fp32 = folders / "optimum-fp32"
    ORTModelForCausalLM.from_pretrained(checkpoint, export=True).save_pretrained(fp32)
    config = getattr(AutoQuantizationConfig, arch)(is_static=False, per_channel=True)
    ORTQuantizer.from_pretrained(fp32).quantize(save_dir=folders / "optimum-int8", quantization_config=config)


def export(model: str, folders: Path, arch: str) -> None:
    """Make whichever of the exports is not there yet."""
    from arte_edge.models import resolve
    from arte_edge.onnx import genai_builder, optimum_exporter
    from arte_edge.onnx.optimum_exporter import for_transformers_4

    checkpoint = resolve(model).checkpoint()
    if not (out := folders / "genai-int4").exists():
        genai_builder.build(checkpoint, out, genai_builder.GenaiSettings(precision="int4"))
    fp32 = folders / "portable-fp32"
    if not fp32.exists():
        optimum_exporter.build(checkpoint, fp32, "fp32")
    if not (out := folders / "portable-int8").exists():
        optimum_exporter.build(checkpoint, out, "int8", arch, fp32=fp32)
    if not (folders / "optimum-int8").exists():
        with tempfile.TemporaryDirectory() as name:
            readable = Path(name)
            for path in checkpoint.glob("*.safetensors"):
                (readable / path.name).symlink_to(path)
            config = for_transformers_4(json.loads((checkpoint / "config.json").read_text("utf-8")))
            (readable / "config.json").write_text(json.dumps(config), "utf-8")
            command = [str(optimum_exporter.find_python()), __file__, "--folders", str(folders), "--arch", arch]
            subprocess.run([*command, "--make-stock", name], check=True)


def main() -> None:
    """Export, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--folders", type=Path, default=Path("runs") / "onnx_speed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arch", default="avx512", choices=["arm64", "avx2", "avx512"])
    parser.add_argument("--prompt", type=int, nargs="+", default=[64, 512], help="tokens of the prompt")
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--make-stock", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve[0], Path(options.serve[1]), options.threads)
    if options.make_stock:
        return make_stock(options.make_stock, options.folders, options.arch)
    from arte_edge.onnx.optimum_exporter import find_python

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
    rows = []
    for turn in range(options.rounds + 1):
        for n_prompt in options.prompt:
            # ids of plain words, the same for every subject
            prompt = [(7919 * i) % 20_000 + 1_000 for i in range(n_prompt)]
            for name, process in subjects.items():
                row = {"subject": name, "prompt": n_prompt, "round": turn, **ask(process, prompt)}
                speeds = f"{row['wall_tokens_per_s']:7.1f} {row['cpu_tokens_per_s']:7.1f}"
                print(f"{turn} {n_prompt:4} {name:36} {speeds}", flush=True)
                rows.append(row)
    for process in subjects.values():
        process.communicate()
    write(rows, options)


def ask(process: subprocess.Popen[str], prompt: list[int] | None = None) -> Any:
    """Send a prompt, if any, and return the subject's next answer."""
    assert process.stdin and process.stdout
    if prompt is not None:
        process.stdin.write(json.dumps(prompt) + "\n")
        process.stdin.flush()
    return json.loads(process.stdout.readline())


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the raw rows and their medians, and print the medians as a Markdown table."""
    import onnxruntime
    import onnxruntime_genai

    keys = ("wall_tokens_per_s", "cpu_tokens_per_s")
    prompts = {}
    for n_prompt in options.prompt:
        counted = [row for row in rows if row["round"] and row["prompt"] == n_prompt]
        median = {
            name: {k: statistics.median(row[k] for row in counted if row["subject"] == name) for k in keys}
            for name in SUBJECTS
        }
        ratio = {f"{a} / {b}": {k: median[a][k] / median[b][k] for k in keys} for a, b in RATIOS}
        prompts[n_prompt] = {"median": median, "ratio": ratio}
        print(f"\n{n_prompt} tokens of prompt\n\n| subject | tokens/s, clock | tokens/s, CPU time |\n|---|---:|---:|")
        for name, row in [*median.items(), *ratio.items()]:
            print(f"| {name} | {row[keys[0]]:.2f} | {row[keys[1]]:.2f} |")
    summary = {
        "command": shlex.join(["python", "benchmarks/onnx_speed.py", *sys.argv[1:]]),
        "machine": platform.machine(),
        "threads": options.threads,
        "arch": options.arch,
        "onnxruntime": onnxruntime.__version__,
        "onnxruntime_genai": onnxruntime_genai.__version__,
        "load_average": os.getloadavg(),
        "prompts": prompts,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
