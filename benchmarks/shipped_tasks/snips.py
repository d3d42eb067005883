"""Intents with their slots, drawn from the SNIPS data: the one shipped task whose sentences people wrote.

The source is a checkout of https://github.com/sonos/nlu-benchmark (CC0 1.0), named by `ARTE_EDGE_SNIPS`. Test rows are
drawn from its validation files, the others from its training files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from arte_edge.tasks.structured import compact, schema_text
from arte_edge.tasks.task import SPLITS, Example
from shipped_tasks.draw import SIZES, Draw, quotas

__all__ = ["SEED", "generate", "read", "source", "write_schema"]

SEED = 1806
_INTENTS = (
    *("AddToPlaylist", "BookRestaurant", "GetWeather", "PlayMusic", "RateBook", "SearchCreativeWork"),
    "SearchScreeningEvent",
)
_Row = tuple[str, dict[str, str]]  # a sentence and its slots


def source() -> Path | None:
    """Return the folder of the seven intents, None without a checkout."""
    folder = os.environ.get("ARTE_EDGE_SNIPS")
    return Path(folder) / "2017-06-custom-intent-engines" if folder else None


def generate() -> dict[str, list[Example]]:
    """Return the three splits; raise `FileNotFoundError` without the source."""
    draw, every = Draw(SEED), _every()
    rows = {key: draw.shuffled(found) for key, found in every.items()}
    schema = schema_text(_schema(every))
    used: set[str] = set()
    splits: dict[str, list[Example]] = {}
    for split in reversed(SPLITS):  # the test split first: what it holds is in no other
        picked: list[Example] = []
        for intent, n in quotas(draw.shuffled(_INTENTS), SIZES[split]).items():
            full = len(picked) + n
            for text, slots in rows["test" if split == "test" else "train", intent]:
                example = Example(text, compact({"intent": intent, "slots": slots}, schema))
                if len(picked) < full and example.key not in used:
                    used.add(example.key)
                    picked.append(example)
        splits[split] = draw.shuffled(picked)
    return {split: splits[split] for split in SPLITS}


def write_schema(folder: Path) -> None:
    """Write ``answer.schema.json``: each intent with the slots that it ever has."""
    text = json.dumps(_schema(_every()), indent=1)
    (folder / "answer.schema.json").write_text(f"{text}\n", encoding="utf-8", newline="\n")


def _every() -> dict[tuple[str, str], list[_Row]]:
    """Return all rows of the source by part (train or test) and intent."""
    if (folder := source()) is None:
        raise FileNotFoundError("snips_slots needs ARTE_EDGE_SNIPS=<checkout of github.com/sonos/nlu-benchmark>")
    files = {"train": "train_{}_full.json", "test": "validate_{}.json"}
    return {
        (part, intent): read(folder / intent / name.format(intent), intent)
        for intent in _INTENTS
        for part, name in files.items()
    }


def read(path: Path, intent: str) -> list[_Row]:
    """Return the sentences of one file with their slots, without those that name a slot twice or are damaged."""
    found: list[_Row] = []
    for row in json.loads(path.read_text(encoding="utf-8", errors="replace"))[intent]:
        named = [(part["entity"], " ".join(part["text"].split())) for part in row["data"] if "entity" in part]
        sentence = " ".join("".join(part["text"] for part in row["data"]).split())
        if len(dict(named)) == len(named) and "\ufffd" not in sentence:
            found.append((sentence, dict(named)))
    return found


def _schema(every: dict[tuple[str, str], list[_Row]]) -> dict[str, object]:
    slots = {
        intent: {name for part in ("train", "test") for _, row in every[part, intent] for name in row}
        for intent in _INTENTS
    }
    text = {"type": "string"}
    properties = {
        intent: {"intent": {"const": intent}, "slots": _object(dict.fromkeys(sorted(names), text), [])}
        for intent, names in slots.items()
    }
    return {"anyOf": [_object(named, list(named)) for named in properties.values()]}


def _object(properties: Mapping[str, object], required: list[str]) -> dict[str, object]:
    more = {"required": required} if required else {}
    return {"type": "object", "properties": dict(properties), **more, "additionalProperties": False}
