"""Does the roofline tell the truth: predictions against published rows and against this machine.

    python benchmarks/roofline.py                         # published Raspberry Pi 5 rows only
    python benchmarks/roofline.py A.gguf B.gguf … --out benchmarks/results/roofline

Published rows. One constant, the bandwidth, is fitted to eight rows (least squares of the log of the
rate); each row is also predicted with the constant that the other seven give, and rows that had no
part in the fit are predicted as well.

This machine. Rates of weight types and the cost of a layer come from models that hold only zeros
(`arte_edge.device.kernels`); the files themselves are never run to make a prediction. Probe and files
take turns for some rounds, since a shared machine's speed drifts, and medians over rounds are
compared. One factor (`roofline._MAPPED`) was fitted to such files once and is fixed since; the table
shows the error without it too.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arte_edge.device import kernels, roofline
from arte_edge.device.detect import detect
from arte_edge.device.profile import load_profile
from arte_edge.device.shape import ModelShape
from arte_edge.engines.llama_runtime import LlamaContext, LlamaModel, Row

_PROFILE = "raspberry-pi-5"
_ROWS = Path(__file__).parent / "roofline_rows.json"
_TOKENS = 64
_WARM = 8


def published_rows() -> list[dict[str, Any]]:
    """Return the published rows, each with bytes a token, tokens/s and its source."""
    rows: list[dict[str, Any]] = json.loads(_ROWS.read_text(encoding="utf-8"))["rows"]
    return rows


def row_shape(row: dict[str, Any]) -> ModelShape:
    """Return the sizes of a published row: bytes a token and layers; its cache is too short to count."""
    sizes = dict.fromkeys(
        ("n_params", "n_kv_head", "head_dim", "n_embd", "n_ff", "n_vocab", "n_ctx_train"), 0
    )
    size_bytes = int(row["token_bytes"])
    return ModelShape(
        row["model"], "gguf", "", "", size_bytes, size_bytes, n_layer=row["n_layer"], kv_values=0, **sizes
    )


def fitted_bandwidth(rows: list[dict[str, Any]]) -> float:
    """Return the bytes/s that fit the rows best: the mean, in logarithms, of what each implies."""
    overhead = roofline._LAYER_S
    implied = [r["token_bytes"] / (1 / r["tokens_per_s"] - r["n_layer"] * overhead) for r in rows]
    return math.exp(statistics.fmean(map(math.log, implied)))


def compare_published() -> list[dict[str, Any]]:
    """Return each published row with the profile's prediction and the one that leaves the row out."""
    profile, rows = load_profile(_PROFILE), published_rows()
    fitted = [row for row in rows if row["fitted"]]
    results = []
    for row in rows:
        shape, rate = row_shape(row), row["tokens_per_s"]
        told = roofline.expected(shape, profile)
        others = fitted_bandwidth([other for other in fitted if other is not row])
        seconds = row["token_bytes"] / others + row["n_layer"] * roofline._LAYER_S
        assert told is not None
        results.append(
            row
            | {
                "expected_ts": round(told.decode_tokens_per_s, 2),
                "error": told.decode_tokens_per_s / rate - 1,
            }
            | {"error_left_out": 1 / seconds / rate - 1}
        )
    return results


def measure_files(paths: list[Path], threads: int, rounds: int) -> dict[str, Any]:
    """Probe and measure in turns; return predictions, measurements and every round's figures."""
    shapes = {path: ModelShape.of(path) for path in paths}
    wanted = {
        path: {
            kind: kernels.whole_blocks(kind, roofline.probe_width(shape))
            for kind in roofline.types_that_matter(shape)
        }
        for path, shape in shapes.items()
    }
    probes = sorted({item for widths in wanted.values() for item in widths.items()})
    layer_s: list[float] = []
    token_s: dict[tuple[str, tuple[int, int]], list[float]] = {probe: [] for probe in probes}
    measured_s: dict[Path, list[float]] = {path: [] for path in paths}
    for _ in range(rounds):
        layer_s.append(kernels.layer_seconds(threads))
        for kind, width in probes:
            token_s[kind, width].append(kernels.token_seconds(kind, width, threads))
        for path in paths:
            measured_s[path].append(decode_seconds(path, threads))
    layer = statistics.median(layer_s)
    rates = {
        (kind, width): kernels.rate(kind, width, statistics.median(seconds), layer)
        for (kind, width), seconds in token_s.items()
    }
    rows = []
    for path, shape in shapes.items():
        found = kernels.Kernels(
            {kind: rates[item] for item in wanted[path].items() for kind in item[:1]}, layer
        )
        told = roofline.expected(shape, found, context_tokens=_TOKENS // 2)
        without = replace(found, copied=tuple(found.rates))
        plain = roofline.expected(shape, without, context_tokens=_TOKENS // 2)
        rate = 1 / statistics.median(measured_s[path])
        assert told is not None and plain is not None
        rows.append(
            {
                "file": path.name,
                "token_bytes": shape.token_bytes,
                "expected_ts": round(told.decode_tokens_per_s, 2),
                "measured_ts": round(rate, 2),
                "error": told.decode_tokens_per_s / rate - 1,
                "error_without_factor": plain.decode_tokens_per_s / rate - 1,
                "rounds_ts": [round(1 / seconds, 2) for seconds in measured_s[path]],
                "basis": told.basis,
            }
        )
    return {
        "threads": threads,
        "rounds": rounds,
        "factor": roofline._MAPPED,
        "layer_us": [round(seconds * 1e6, 1) for seconds in layer_s],
        "rates_gb_per_s": {f"{kind} {w[0]}x{w[1]}": round(r / 1e9, 2) for (kind, w), r in rates.items()},
        "files": rows,
    }


def decode_seconds(path: Path, threads: int) -> float:
    """Return the median time of a decoded token of a file."""
    model = LlamaModel(path)
    context = LlamaContext(model, 1, 512, threads)
    times = []
    for position in range(_TOKENS):
        start = time.perf_counter()
        context.decode([Row(100 + position, position, 0, want=True)])
        times.append(time.perf_counter() - start)
    context.close()
    model.close()
    return statistics.median(times[_WARM:])


def main() -> int:
    """Print both tables, write them to --out, and end with 1 if a row that counts misses by over 20 %."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="*", type=Path, help="GGUF files to predict and measure here")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    facts = detect()
    rows = compare_published()
    fitted = fitted_bandwidth([row for row in rows if row["fitted"]])
    print(f"Raspberry Pi 5, published; the fit gives {fitted / 1e9:.2f} GB/s")
    for row in rows:
        mark = "" if row["fitted"] else "  (not fitted)"
        print(
            f"  {row['model']:<28}{row['tokens_per_s']:>7.2f}{row['expected_ts']:>8.2f} {row['error']:>+7.1%}"
            f"{row['error_left_out']:>+8.1%}{mark}"
        )
    document: dict[str, Any] = {"published": rows, "fitted_gb_per_s": round(fitted / 1e9, 3)}
    counted = [row["error"] for row in rows if row["fitted"]]
    if args.models:
        here = measure_files(args.models, args.threads or facts.cores, args.rounds)
        device = facts.model_dump(mode="json", include={"cpu", "arch", "cores", "features", "virtual"})
        software = {"llama_cpp": version("llama-cpp-python"), "python": platform.python_version()}
        document["here"] = here | {"device": device, "software": software}
        print(f"Here, {facts.cpu}, {here['threads']} threads, {here['rounds']} rounds")
        for row in here["files"]:
            print(
                f"  {row['file']:<42}{row['measured_ts']:>7.1f}{row['expected_ts']:>8.1f} {row['error']:>+7.1%}"
                f"{row['error_without_factor']:>+8.1%}"
            )
        counted += [row["error"] for row in here["files"]]
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "roofline.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(any(abs(error) > 0.2 for error in counted))


if __name__ == "__main__":
    sys.exit(main())
