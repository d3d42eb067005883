"""Spoken home commands, for two tasks: the intent alone, and the whole call with its slots.

Sentence frames (``home_phrases.toml``) are divided among the splits, half of them to the test split, so that its
phrasings are new; rooms, numbers and small talk occur in every split.
"""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from arte_edge.tasks.task import SPLITS, Example
from shipped_tasks.draw import SIZES, Draw, quotas

__all__ = ["CALL_SEED", "INTENT_SEED", "generate_calls", "generate_intents"]

INTENT_SEED = 1913
CALL_SEED = 1914
# words of an input: for a short context and a small model
_WORDS = {"label": (6, 18), "call": (4, 18)}
# share of an intent's frames, by split
_SHARES = {"seed": 0.2, "validation": 0.3, "test": 0.5}
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class _Intent:
    """One intent of the phrase file; `label` or `call` is empty if a task does not use it."""

    label: str
    call: str
    closing: tuple[str, ...]
    asked: tuple[str, ...]
    hinted: tuple[str, ...]
    after_hint: tuple[str, ...]


def generate_intents() -> dict[str, list[Example]]:
    """Return the three splits of ``home_intents``: utterance to one of eight labels."""
    return _generate("label", INTENT_SEED)


def generate_calls() -> dict[str, list[Example]]:
    """Return the three splits of ``home_commands``: utterance to call, ``set_heat(bedroom, 21)``."""
    return _generate("call", CALL_SEED)


@cache
def _phrases() -> tuple[dict[str, _Intent], dict[str, dict[str, str]], dict[str, list[str]]]:
    """Return intents, fillers as {slot: {spoken: value}}, and small talk."""
    path = Path(__file__).with_name("home_phrases.toml")
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    fillers = {
        slot: values if isinstance(values, dict) else dict.fromkeys(values, "")
        for slot, values in tables.pop("fillers").items()
    }
    small_talk = tables.pop("small_talk")
    intents = {
        name: _Intent(
            table.get("label", ""),
            table.get("call", ""),
            tuple(table["closing"]),
            tuple(table["asked"]),
            tuple(table["hinted"]),
            tuple(table.get("after_hint", small_talk["after_hint"])),
        )
        for name, table in tables.items()
    }
    return intents, fillers, small_talk


def _generate(target: str, seed: int) -> dict[str, list[Example]]:
    draw = Draw(seed)
    intents = {name: intent for name, intent in _phrases()[0].items() if getattr(intent, target)}
    frames = {name: _share_out(draw, intent) for name, intent in intents.items()}
    used: set[str] = set()
    splits: dict[str, list[Example]] = {}
    for split in SPLITS:
        rows: list[Example] = []
        for name, n_rows in quotas(draw.shuffled(tuple(intents)), SIZES[split]).items():
            rows += _rows(draw, intents[name], frames[name][split], target, n_rows, used)
        splits[split] = draw.shuffled(rows)
    return splits


def _share_out(draw: Draw, intent: _Intent) -> dict[str, list[str]]:
    """Give each split its own frames, asked and hinted ones in the same proportion."""
    shared: dict[str, list[str]] = defaultdict(list)
    for frames in (intent.asked, intent.hinted):
        shuffled = draw.shuffled(frames)
        start = 0
        for split in SPLITS:
            stop = start + round(_SHARES[split] * len(frames))
            shared[split] += shuffled[start:stop]
            start = stop
    return shared


def _rows(
    draw: Draw, intent: _Intent, frames: Sequence[str], target: str, n_rows: int, used: set[str]
) -> list[Example]:
    """Return `n_rows` new rows that use each frame about equally often.

    Small talk makes no row new: "lock the back door" and "hey, lock the back door" are one.
    """
    rows: list[Example] = []
    least, most = _WORDS[target]
    turns: list[str] = []
    while len(rows) < n_rows:
        turns = turns or draw.shuffled(frames)
        frame = turns.pop()
        wish, values = _fill_in(draw, frame)
        text = _chat(draw, intent, wish, asked=frame in intent.asked)
        if wish not in used and least <= len(text.split()) <= most:
            used.add(wish)
            answer = intent.label if target == "label" else intent.call.format(**values)
            rows.append(Example(text, answer))
    return rows


def _fill_in(draw: Draw, frame: str) -> tuple[str, dict[str, str]]:
    """Return `frame` with words for its slots, and the slot values they stand for."""
    fillers = _phrases()[1]
    values: dict[str, str] = {}

    def word(match: re.Match[str]) -> str:
        spoken = draw.pick(tuple(fillers[match[1]]))
        values[match[1]] = fillers[match[1]][spoken]
        return spoken

    return _SLOT.sub(word, frame), values


def _chat(draw: Draw, intent: _Intent, wish: str, *, asked: bool) -> str:
    """Return `wish`, at times with small talk before or after it."""
    text = wish
    if draw.chance(0.35):
        text = f"{draw.pick(_phrases()[2]['opening'])}, {text}"
    if draw.chance(0.35):
        text = f"{text}, {draw.pick(intent.closing if asked else intent.after_hint)}"
    return text
