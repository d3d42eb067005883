"""Boolean expressions of two to six literals, half of them true."""

from __future__ import annotations

from dataclasses import dataclass

from arte_edge.tasks.task import BOOLEANS, Example
from shipped_tasks.draw import Draw, fill

__all__ = ["SEED", "generate"]

SEED = 1847
_N_LITERALS = (2, 6)


@dataclass(frozen=True)
class _Part:
    """An expression, its value, and what it looks like from outside: atom, "not", "and" or "or"."""

    text: str
    value: bool
    shape: str = "atom"


def generate() -> dict[str, list[Example]]:
    """Return the three splits."""
    draw = Draw(SEED)

    def make(_label: str) -> tuple[str, Example]:
        part = _expression(draw, draw.integer(*_N_LITERALS))
        return part.text, Example(f"{part.text} is", str(part.value))

    return fill(make, BOOLEANS, draw)


def _expression(draw: Draw, n_literals: int) -> _Part:
    if n_literals == 1:
        value = draw.chance(0.5)
        return _maybe_not(draw, _Part(str(value), value))
    n_left = draw.integer(1, n_literals - 1)
    left, right = _expression(draw, n_left), _expression(draw, n_literals - n_left)
    if draw.chance(0.5):
        # "and" binds tighter than "or", so an "or" inside it needs its brackets
        text = " and ".join(_bracket(p) if p.shape == "or" else p.text for p in (left, right))
        joined = _Part(text, left.value and right.value, "and")
    else:
        joined = _Part(f"{left.text} or {right.text}", left.value or right.value, "or")
    return _maybe_not(draw, joined)


def _maybe_not(draw: Draw, part: _Part) -> _Part:
    if draw.chance(0.3):
        text = part.text if part.shape in ("atom", "not") else _bracket(part)
        return _Part(f"not {text}", not part.value, "not")
    if part.shape != "atom" and draw.chance(0.3):
        return _Part(_bracket(part), part.value)
    return part


def _bracket(part: _Part) -> str:
    return f"( {part.text} )"
