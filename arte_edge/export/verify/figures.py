"""The four figures of fidelity against their limits, with what is most likely wrong if one fails."""

from __future__ import annotations

import math
from typing import Literal

from arte_edge.export.verify.check import Check
from arte_edge.export.verify.fidelity import Fidelity
from arte_edge.export.verify.thresholds import Thresholds

__all__ = ["fidelity_checks"]

_ONE_SIDED_95 = 1.645  # standard normal quantile
_GIBBERISH_KL = 1.0  # nats: beyond what rounding to two bits costs the models we measured


def fidelity_checks(found: Fidelity, limits: Thresholds) -> list[Check]:
    """Hold the four figures against their limits, each with what is most likely wrong if it fails.

    The perplexity ratio fails only where it is above its limit by more than its noise
    (one-sided, 95 %): on a thousand tokens the noise alone can be as large as the limit
    of an 8-bit type.
    """
    cause = _cause(found)
    noise = found.perplexity_ratio_error if math.isfinite(found.perplexity_ratio_error) else 0.0
    least_ratio = found.perplexity_ratio * math.exp(-_ONE_SIDED_95 * noise)
    sample = f"{found.n_tokens} tokens of {found.n_prompts} prompts"
    rows: tuple[tuple[str, float, float | None, bool, str], ...] = (
        ("kl mean", found.kl_mean, limits.kl_mean, _within(found.kl_mean, limits.kl_mean), sample),
        (
            "kl p99",
            found.kl_p99,
            limits.kl_p99,
            _within(found.kl_p99, limits.kl_p99),
            f"max {found.kl_max:.3g}",
        ),
        ("top-1 agreement", found.top1, limits.top1, _within(-found.top1, limits.top1, -1), ""),
        (
            "perplexity ratio",
            found.perplexity_ratio,
            limits.perplexity_ratio,
            _within(least_ratio, limits.perplexity_ratio),
            f"standard error {noise:.2%}",
        ),
    )
    checks: list[Check] = []
    for name, value, limit, passed, note in rows:
        bound: Literal["at least", "at most"] = "at least" if name == "top-1 agreement" else "at most"
        if not passed:
            told = all(check.passed for check in checks)  # the cause once, not four times
            note = f"{value:.4g}, not {bound} {limit:g}" + (f": {cause}." if told else ".")
        checks.append(Check(name, value, limit, passed, note, bound))
    return checks


def _within(value: float, limit: float | None, sign: int = 1) -> bool:
    return limit is None or value <= sign * limit


def _cause(found: Fidelity) -> str:
    if found.kl_mean == float("inf"):
        return "the artifact's logits are not finite, so a tensor holds damaged values"
    if found.kl_mean > _GIBBERISH_KL or found.top1 < 0.3:
        return (
            "far beyond rounding, so weights are damaged, missing, of another model, "
            "or laid out wrongly (such as attention heads that were not permuted)"
        )
    return (
        "more than this type may cost. Either the type is too small for this model (take a larger one, or an "
        "importance matrix), or the weights were rounded twice (such as an adapter merged into a 4-bit base), "
        "a tensor is damaged, or they are not the reference's"
    )
