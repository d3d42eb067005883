"""The YAML front matter of a model card: add missing keys, replace our results, keep everything else.

People edit cards by hand, so an existing key is not changed, nor its place and comments, down to the
byte. Two exceptions: a key given on the command line, and the results in ``model-index`` that carry
our mark, which a rerun replaces; other results in it stay.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from arte_edge.errors import InputError

MARK = {"measured_by": "arte-edge"}  # in metrics[].args: this result is ours to replace

# As the Hub reads a card (huggingface_hub.repocard: REGEX_YAML_BLOCK).
_BLOCK = re.compile(r"\A(\ufeff?\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z))")


@dataclass(frozen=True)
class FrontMatter:
    """A card in its parts, which make up the whole text in order. Without front matter the first three are empty."""

    opening: str
    block: str
    closing: str
    body: str
    newline: str

    @property
    def text(self) -> str:
        return self.opening + self.block + self.closing + self.body


def split_card(text: str) -> FrontMatter:
    """Return the parts of a card."""
    newline = "\r\n" if "\r\n" in text else "\n"
    if not (found := _BLOCK.match(text)):
        return FrontMatter("", "", "", text, newline)
    return FrontMatter(found[1], found[2], found[3], text[found.end() :], newline)


def read_head(card: FrontMatter) -> dict[str, Any]:
    """Return the keys of a card's front matter.

    Raises InputError: it is not a YAML mapping; the message names the line.
    """
    import yaml

    try:
        found = yaml.safe_load(card.block) if card.block.strip() else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 2}" if mark else ""
        reason = getattr(error, "problem", None) or "not readable"
        raise InputError(f"README.md{line}: its front matter is not valid YAML: {reason}", "Fix it by hand.") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError(
            "README.md: its front matter is not a mapping of keys", "Write 'key: value' lines between the ---."
        )
    return found


def merge_head(card: FrontMatter, new: Mapping[str, Any], replace: Collection[str] = ()) -> FrontMatter:
    """Return `card` with the keys of `new` in its front matter: the missing ones, and those in `replace`.

    A key of `replace` whose value is None is removed.

    Raises InputError: the front matter is not a YAML mapping in block style.
    """
    there = read_head(card)
    spans = _spans(card.block) if there else {}
    edits: list[tuple[int, int, str]] = []
    added = ""
    for key, value in new.items():
        text = "" if value is None else dump_yaml({key: value}, card.newline)
        if key not in there:
            added += text
        elif key in replace and (value is None or there[key] != value):
            edits.append((*spans[key], text))
    block = card.block
    for begin, end, text in sorted(edits, reverse=True):
        whole = end == len(block)  # the last line has no line end of its own
        block = block[:begin] + (text.rstrip("\r\n") if whole else text) + block[end:]
    if added:
        gap = card.newline if block and not block.endswith(("\n", "\r")) else ""
        block = block + gap + added.rstrip("\r\n")
    if card.closing or not added:
        return dataclasses.replace(card, block=block)
    bom = "\ufeff" if card.body.startswith("\ufeff") else ""
    rest, newline = card.body.removeprefix("\ufeff"), card.newline
    return FrontMatter(f"{bom}---{newline}", block, f"{newline}---{newline}", rest, newline)


def merge_model_index(there: Any, ours: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Return the ``model-index`` `there` with our earlier results replaced by `ours`; None if none is left.

    Parts of it that are not in the Hub's form are not changed.
    """
    if not isinstance(there, list) or not there:
        return ours or None
    others = [entry for entry in map(_without_ours, there) if entry is not None]
    if not ours:
        return others or None
    for entry in others:
        if isinstance(entry, dict) and entry.get("name") == ours[0]["name"]:
            entry["results"] = [*(entry.get("results") or []), *ours[0]["results"]]
            return others
    return [*others, *ours]


def _without_ours(entry: Any) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get("results"), list):
        return entry
    results = []
    for result in entry["results"]:
        if isinstance(result, dict) and isinstance(result.get("metrics"), list):
            metrics = [metric for metric in result["metrics"] if not _is_ours(metric)]
            if not metrics and result["metrics"]:
                continue
            result = {**result, "metrics": metrics}
        results.append(result)
    return None if entry["results"] and not results else {**entry, "results": results}


def _is_ours(metric: Any) -> bool:
    args = metric.get("args") if isinstance(metric, dict) else None
    return isinstance(args, dict) and all(args.get(key) == value for key, value in MARK.items())


def _spans(block: str) -> dict[str, tuple[int, int]]:
    """Return the character positions of each top-level key with its value, without comments after it."""
    import yaml

    root = yaml.compose(block, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise InputError("README.md: its front matter is in flow style (braces)", "Write one 'key: value' a line.")
    starts = [*(key.start_mark.index for key, _ in root.value), len(block)]
    spans = {}
    for (key, _), (begin, after) in zip(root.value, pairwise(starts), strict=True):
        lines = block[begin:after].splitlines(keepends=True)
        while len(lines) > 1 and (not lines[-1].strip() or lines[-1].startswith("#")):
            lines.pop()
        spans[str(key.value)] = (begin, begin + len("".join(lines)))
    return spans


def dump_yaml(value: Any, newline: str = "\n") -> str:
    """Return `value` as YAML in block style, keys in their order, long texts on one line."""
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10_000, line_break=newline))
