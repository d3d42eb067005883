"""One check of the gate with the table of several, and the default thresholds for each quantization type.

A recipe can override them. Perplexity thresholds are published losses of models of 0.5 to 2 billion parameters with an
importance matrix (wikitext, Qwen2.5-0.5B and 1.5B; llama.cpp pull requests 4930, 4969 and 6936): Q8_0 +0.5 %, Q6_K +0.7
%, Q5_K_M +2 %, Q4_K_M +4 %, int8 +0.5 %, plain int4 +10 %. SmolLM2-135M meets them with an importance matrix (see
docs/verify.md); its Q5_K_M without one does not. Those of divergence and agreement leave room for a tuned student,
which has sharper distributions and loses more nats (0.12 for Q4_K_M of the quick start); larger models lose less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from arte_edge.console import ResultTable
from arte_edge.errors import InputError, nearest

if TYPE_CHECKING:
    from rich.table import Table


_SHORT = 64  # characters of a note that fit into the table, on two lines


@dataclass(frozen=True)
class Check:
    """A measured value and its threshold; None: reported only.

    `note` is one sentence: the most likely cause for a check that fails, else details or empty.
    """

    name: str
    measured: float | None
    threshold: float | None
    passed: bool
    note: str = ""
    bound: Literal["at most", "at least"] = "at most"


def checks_table(checks: Sequence[Check]) -> Table:
    """Return the checks as a table of 80 columns; long notes are in `long_notes`."""
    from rich.text import Text

    table = ResultTable(box=None, pad_edge=False)
    for title in ("check", "measured", "limit", "", ""):
        number = title in ("measured", "limit")
        table.add_column(title, justify="right" if number else "left", no_wrap=bool(title))
    for check in checks:
        state = "FAILED" if not check.passed else "-" if check.threshold is None else "ok"
        style = "bold red" if not check.passed else ""
        note = check.note if check.passed and len(check.note) <= _SHORT else "see below"
        measured = "" if check.measured is None else _formatted(check.name, check.measured)
        limit = ""
        if check.threshold is not None:
            sign = "≥" if check.bound == "at least" else "≤"
            limit = f"{sign} {_formatted(check.name, check.threshold)}"
        table.add_row(check.name, measured, limit, Text(state, style=style), Text(note))
    return table


def long_notes(checks: Sequence[Check]) -> list[str]:
    """Return the notes that do not fit into the table; failed checks last."""
    passed = [check for check in checks if check.passed and len(check.note) > _SHORT]
    notes = [f"{check.name} (passed): {check.note}" for check in passed]
    return notes + [f"{check.name}: {check.note}" for check in checks if not check.passed]


def _formatted(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    if name.startswith("kl"):
        return f"{value:.2g}" if value < 0.01 else f"{value:.3f}"
    if name == "perplexity ratio":
        return f"{value:.4f}"
    if name == "accuracy drop":
        return f"{value:.1%}".replace("-0.0%", "0.0%")
    return f"{value:.1%}" if name.startswith("top-1") else f"{value:.0f}"


class Thresholds(BaseModel):
    """Thresholds of the gate; None ("off" in a recipe): measured, not gated. Divergences in nats per token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_differences: int | None = Field(default=0, ge=0, description="test strings that may be tokenized differently")
    runtime_differences: int | None = Field(
        default=5, ge=0, description="texts that the runtime may tokenize differently from its correct tokenizer file"
    )
    template_differences: int | None = Field(
        default=0, ge=0, description="conversations that may render to a different text or different ids"
    )
    stop_differences: int | None = Field(default=0, ge=0, description="stop tokens that may be missing or additional")
    kl_mean: float | None = Field(default=None, ge=0, description="mean KL divergence, nats per token")
    kl_p99: float | None = Field(default=None, ge=0, description="its 99th percentile")
    top1: float | None = Field(
        default=None, ge=0, le=1, description="smallest share of positions with the same most likely token"
    )
    perplexity_ratio: float | None = Field(
        default=None, gt=0, description="perplexity of the artifact over that of the reference"
    )
    accuracy_drop: float | None = Field(
        default=None, ge=0, le=1, description="largest significant drop of accuracy on a task"
    )
    drift: float | None = Field(
        default=1.5,
        ge=1,
        description="times its limit that the mean divergence of all tokens may reach where answers are compared; "
        "1: all tokens are held to every limit, and answers are not compared",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """Read "off" as None, which TOML does not have."""
        return None if value == "off" else value


def _limits(kl_mean: float, kl_p99: float, top1: float, ratio: float, drop: float, drift: float = 1.5) -> Thresholds:
    return Thresholds(
        kl_mean=kl_mean, kl_p99=kl_p99, top1=top1, perplexity_ratio=ratio, accuracy_drop=drop, drift=drift
    )


_EXACT = _limits(0.001, 0.01, 0.985, 1.002, 0.0, drift=1.0)
_FIVE = _limits(0.03, 0.3, 0.90, 1.02, 0.02)
_FOUR = _limits(0.25, 2.5, 0.75, 1.06, 0.03)
_THREE = _limits(0.40, 4.0, 0.65, 1.15, 0.05)
_TWO = _limits(1.00, 6.0, 0.50, 1.60, 0.10)
# Names as `arte_edge.gguf.reader.FILE_TYPES` has them, and the ONNX precisions in lower case;
# a label such as "optimum-int8" has precedence over the precision alone.
TYPES: dict[str, Thresholds] = {
    "F32": _EXACT,
    "F16": _EXACT,
    "BF16": _limits(0.003, 0.03, 0.97, 1.003, 0.0, 1.0),  # the runtime also rounds activations to bfloat16
    "Q8_0": _limits(0.012, 0.12, 0.95, 1.005, 0.01),
    "Q6_K": _limits(0.03, 0.3, 0.91, 1.007, 0.01),
    **dict.fromkeys(("Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1"), _FIVE),
    "Q4_K_M": _limits(0.20, 2.0, 0.78, 1.04, 0.02),
    **dict.fromkeys(("Q4_K_S", "IQ4_XS", "IQ4_NL", "Q4_1"), _FOUR),
    "Q4_0": _limits(0.30, 3.0, 0.70, 1.10, 0.03),
    **dict.fromkeys(("MXFP4_MOE", "NVFP4"), _limits(0.30, 3.0, 0.70, 1.10, 0.03)),
    **dict.fromkeys(("Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"), _THREE),
    **dict.fromkeys(("Q2_K", "Q2_K_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"), _TWO),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "Q2_0", "Q1_0"), _limits(2.0, 9.0, 0.35, 3.0, 0.2)),
    "fp32": _EXACT,
    "fp16": _EXACT,
    "int8": _limits(0.02, 0.2, 0.92, 1.005, 0.01),
    # Activations are quantized too, with one scale per batch of tokens.
    "optimum-int8": _limits(0.15, 1.0, 0.78, 1.04, 0.02),
    "int4": _limits(0.35, 3.5, 0.68, 1.10, 0.03),
}
STRICTEST = "F16"


def thresholds_for(type: str) -> Thresholds:
    """Return the default thresholds of a quantization type: a GGUF file type, ``fp32``, ``int8``, ``int4``.

    Raises InputError: an unknown type.
    """
    by_fold = {name.casefold(): name for name in TYPES}
    found = by_fold.get(type.casefold())
    if found is None:
        raise InputError(f"No thresholds for the unknown type '{type}'", nearest(type, TYPES))
    return TYPES[found]
