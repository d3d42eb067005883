"""What does an importance matrix of the task's own prompts buy, and what does Q4_0 cost?

    python benchmarks/imatrix_effect.py                      # both models, about an hour on one core
    python benchmarks/imatrix_effect.py --models smollm2-135m-instruct --weights off-grid

For each model: an importance matrix from the seed questions of two shipped tasks, rendered as
the student is asked and answered, and on the validation questions (never the test split)
the divergence KL(F16 ‖ quantized), in nats a token, of each type with and without it.
Positions that several prompts share, such as the system turn, count once.

The real checkpoints at hand were themselves unpacked from 4-bit files (Q4_1 and Q4_K_M), so
their weights lie on a 4-bit grid, which flatters some types and harms others. "off-grid"
moves every weight by up to half a step of a 4-bit block of 32 (uniform, seed 0): a worse
model with the statistics of one that was never quantized. "as-is" leaves the weights.

Writes rows.jsonl (one line a prompt and file) and summary.json under
benchmarks/results/imatrix/, and prints the summary as a Markdown table. Cells that rows.jsonl
has are not measured again; files in --work are not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from arte_edge.distill.prompts import direct_messages, tagged
from arte_edge.gguf.from_base import checkpoint_to_gguf
from arte_edge.gguf.imatrix import collect, read_imatrix
from arte_edge.gguf.quantize import quantize
from arte_edge.models import resolve
from arte_edge.runtimes.loader import open_model
from arte_edge.runtimes.prompt_render import render
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Example, Task
from arte_edge.verify.logits import compare_logits

RESULTS = Path(__file__).parent / "results" / "imatrix"
MODELS = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct")
TASKS = ("date_understanding", "object_counting")
TYPES = ("Q4_K_M", "Q4_0")
_STEP_BLOCK = 32


def texts(model: Any, task: Task, rows: Sequence[Example]) -> list[str]:
    """Return question and right answer of `rows` as one rendered text each."""
    return [render(model, direct_messages(task, row.input), tagged(row.target)) for row in rows]


def off_grid(checkpoint: Path, out: Path) -> Path:
    """Copy a checkpoint with every matrix moved off the 4-bit grid it was unpacked from."""
    import torch
    from safetensors.torch import load_file, save_file

    if out.is_dir():
        return out
    staged = out.with_name(out.name + ".partial")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(checkpoint, staged)
    weights = load_file(staged / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            blocks = tensor.float().reshape(tensor.shape[0], -1, _STEP_BLOCK)
            step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / 15
            noise = torch.rand(blocks.shape, generator=generator) - 0.5
            weights[name] = (blocks + noise * step).reshape(tensor.shape).to(tensor.dtype)
    save_file(weights, staged / "model.safetensors", metadata={"format": "pt"})
    return staged.rename(out)


def make_files(name: str, weights: str, n_train: int, work: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """Return label -> file ("F16", "Q4_0", "Q4_0 imatrix", …) and what is known of how they were made."""
    model = resolve(name)
    folder = work / f"{name}-{weights}"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = model.checkpoint()
    if weights == "off-grid":
        checkpoint = off_grid(checkpoint, folder / "checkpoint")
    files = {"F16": folder / "F16.gguf"}
    if not files["F16"].is_file():
        checkpoint_to_gguf(checkpoint, model.gguf, files["F16"])
    opened = open_model(files["F16"])
    tasks = [load_task(task) for task in TASKS]
    prompts = [text for task in tasks for text in texts(opened, task, task.seed[:n_train])]
    opened.close()
    matrix = collect(checkpoint, prompts, folder / "imatrix.gguf", dataset="seeds of " + ", ".join(TASKS))
    about: dict[str, Any] = {"prompts": len(prompts), "tokens": read_imatrix(matrix).n_token, "files": {}}
    for kind in TYPES:
        for label, imatrix in ((kind, None), (f"{kind} imatrix", matrix)):
            files[label] = folder / f"{label.replace(' ', '-')}.gguf"
            facts = files[label].with_suffix(".json")
            if not facts.is_file():
                report = quantize(files["F16"], files[label], kind, imatrix=imatrix)
                said = {"bits_per_weight": round(report.bits_per_weight, 3), "types": report.tensor_types}
                said |= {"fallbacks": len(report.fallbacks), "size_bytes": report.size_bytes}
                facts.write_text(json.dumps(said))
            about["files"][label] = json.loads(facts.read_text())
    return files, about


def measure(files: dict[str, Path], n_held: int, done: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield one row a prompt and quantized file; all files are open at once, so F16 runs once a prompt."""
    opened = {label: open_model(path) for label, path in files.items()}
    reference = opened.pop("F16")
    tasks = [load_task(task) for task in TASKS]
    prompts = {
        f"{task.name}/{number}": text
        for task in tasks
        for number, text in enumerate(texts(reference, task, task.validation[:n_held]))
    }
    earlier: list[list[int]] = []
    for key, prompt in prompts.items():
        ids = reference.tokenize(prompt)
        known = max((common(ids, other) for other in earlier), default=0)
        earlier.append(ids)
        missing = [label for label in opened if (label, key) not in done]
        if not missing:
            continue
        exact = reference.logits(ids)
        for label in missing:
            found = compare_logits(exact, opened[label].logits(ids), ids).after(known)
            gap = found.nll_artifact - found.nll_reference
            yield {
                "file": label,
                "prompt": key,
                "positions": len(found.kl),
                "kl_sum": float(found.kl.sum()),
                "kl_max": float(found.kl.max()),
                "same_top": int(found.same_top.sum()),
                "nll_gap_sum": float(gap.sum()),
                "nll_reference_sum": float(found.nll_reference.sum()),
            }
        print(f"{key}, {len(earlier)} of {len(prompts)}", file=sys.stderr, flush=True)
    for model in (reference, *opened.values()):
        model.close()


def common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def interval(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, list[float]]:
    """Return mean a position and its 95 % interval: 10,000 bootstraps over prompts, percentiles."""
    draws = np.random.default_rng(0).integers(0, len(sums), (10_000, len(sums)))
    means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    return float(sums.sum() / sizes.sum()), [float(edge) for edge in np.percentile(means, [2.5, 97.5])]


def summarise(rows: list[dict[str, Any]], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one entry a model, weights and type; the difference pairs prompts."""
    summary = []
    for cell in dict.fromkeys((row["model"], row["weights"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["weights"]) == cell]
        facts = about["/".join(cell)]
        entry: dict[str, Any] = {"model": cell[0], "weights": cell[1], "types": {}}
        entry["imatrix"] = {"prompts": facts["prompts"], "tokens": facts["tokens"]}
        for kind in TYPES:
            with_, without = (
                sorted((row for row in mine if row["file"] == label), key=lambda row: str(row["prompt"]))
                for label in (f"{kind} imatrix", kind)
            )
            sizes = np.array([row["positions"] for row in without], dtype=float)
            kl = {"imatrix": np.array([row["kl_sum"] for row in with_])}
            kl["plain"] = np.array([row["kl_sum"] for row in without])
            found: dict[str, Any] = {"n_prompts": len(sizes), "n_positions": int(sizes.sum())}
            for key, sums in (*kl.items(), ("difference", kl["imatrix"] - kl["plain"])):
                mean, edges = interval(sums, sizes)
                found[key] = {"kl_mean": round(mean, 5), "ci95": [round(edge, 5) for edge in edges]}
            for key, part in (("imatrix", with_), ("plain", without)):
                found[key]["top1"] = round(sum(row["same_top"] for row in part) / sizes.sum(), 4)
                gap = sum(row["nll_gap_sum"] for row in part) / (sizes.sum() - len(sizes))
                found[key]["perplexity_ratio"] = round(float(np.exp(gap)), 4)
                found[key] |= facts["files"][kind if key == "plain" else f"{kind} imatrix"]
            entry["types"][kind] = found
        summary.append(entry)
    return summary


def table(summary: list[dict[str, Any]]) -> str:
    lines = ["| model | weights | type | bits a weight | KL plain | KL with imatrix | difference, 95 % | n |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for entry in summary:
        for kind, found in entry["types"].items():
            plain, own, change = found["plain"], found["imatrix"], found["difference"]
            lines.append(
                f"| {entry['model']} | {entry['weights']} | {kind} | {plain['bits_per_weight']:.2f} / "
                f"{own['bits_per_weight']:.2f} | {plain['kl_mean']:.4f} | {own['kl_mean']:.4f} | "
                f"{change['kl_mean']:+.4f} ({change['ci95'][0]:+.4f} to {change['ci95'][1]:+.4f}) | "
                f"{found['n_positions']} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--weights", nargs="+", default=("as-is", "off-grid"), choices=("as-is", "off-grid"))
    parser.add_argument("--train", type=int, default=30, help="seed questions a task for the matrix")
    parser.add_argument("--held", type=int, default=12, help="validation questions a task to compare on")
    parser.add_argument("--work", type=Path, default=Path("runs/imatrix_effect"), help="where the files go")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log, last = args.out / "rows.jsonl", args.out / "summary.json"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    about = json.loads(last.read_text())["about"] if last.is_file() else {}
    for name in args.models:
        for weights in args.weights:
            files, about[f"{name}/{weights}"] = make_files(name, weights, args.train, args.work)
            mine = [row for row in rows if (row["model"], row["weights"]) == (name, weights)]
            done = {(row["file"], row["prompt"]) for row in mine}
            with log.open("a") as file:
                for found in measure(files, args.held, done):
                    rows.append({"model": name, "weights": weights} | found)
                    file.write(json.dumps(rows[-1]) + "\n")
                    file.flush()
            made = {"tasks": TASKS} | {name: version(name) for name in ("llama-cpp-python", "torch", "numpy")}
            summary = summarise(rows, about)
            text = json.dumps({"made_with": made, "about": about, "summary": summary}, indent=1)
            last.write_text(text + "\n")
    print(table(summarise(rows, about)))


if __name__ == "__main__":
    main()
