"""Predicted against published decode rates of a Raspberry Pi 5.

    python benchmarks/roofline.py [--out benchmarks/results/roofline]

One constant, the bandwidth, is fitted to eight rows (least squares of the log of the rate); each row
is also predicted with the constant fitted to the other seven, and rows that had no part in the fit
are predicted as well.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from arte_edge.device import roofline
from arte_edge.device.model_size import ModelSize
from arte_edge.device.profiles import find_device

_PROFILE = "raspberry-pi-5"
_ROWS = Path(__file__).parent / "roofline_rows.json"


def published_rows() -> list[dict[str, Any]]:
    """Return the published rows, each with bytes a token, tokens/s and its source."""
    rows: list[dict[str, Any]] = json.loads(_ROWS.read_text(encoding="utf-8"))["rows"]
    return rows


def row_shape(row: dict[str, Any]) -> ModelSize:
    """Return the sizes of a published row: bytes a token and layers; its cache is too short to count."""
    sizes = dict.fromkeys(("n_params", "n_kv_head", "head_dim", "n_embd", "n_ff", "n_vocab", "n_ctx_train"), 0)
    size_bytes = int(row["token_bytes"])
    return ModelSize(row["model"], "gguf", "", "", size_bytes, size_bytes, n_layer=row["n_layer"], kv_values=0, **sizes)


def fitted_bandwidth(rows: list[dict[str, Any]]) -> float:
    """Return the bytes/s that fit the rows best: the mean, in logarithms, of what each implies."""
    overhead = roofline._LAYER_S
    implied = [r["token_bytes"] / (1 / r["tokens_per_s"] - r["n_layer"] * overhead) for r in rows]
    return math.exp(statistics.fmean(map(math.log, implied)))


def compare_published() -> list[dict[str, Any]]:
    """Return each published row with the profile's prediction and the one that leaves the row out."""
    profile, rows = find_device(_PROFILE), published_rows()
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
            | {"expected_ts": round(told.decode_tokens_per_s, 2), "error": told.decode_tokens_per_s / rate - 1}
            | {"error_left_out": 1 / seconds / rate - 1}
        )
    return results


def main() -> int:
    """Print the table, write it to --out, and return 1 if a fitted row misses by more than 20 %."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
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
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "roofline.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(any(abs(error) > 0.2 for error in counted))


if __name__ == "__main__":
    sys.exit(main())
