"""Extract an answer from a model's output, and decide whether it is correct.

The answer is the content of the **last complete** ``<ans>…</ans>``; one that the end of the text truncates does not
count. docs/tasks.md lists what is accepted of each kind. Nothing else is: "the answer is True" inside the tags is
not an answer. No two labels of a task, and no two answers compared as written (`Answer.exact`), become the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from arte_edge.tasks import structured
from arte_edge.tasks.normalize import canonical_number, fold_label, fold_text, tidy_text
from arte_edge.tasks.task import Answer

# Innermost tags only: in "<ans> so <ans>4</ans>" the first tag was never closed.
_TAG = re.compile(r"<ans>((?:(?!</?ans>).)*)</ans>", re.DOTALL | re.IGNORECASE)
# The letter alone, or followed by the option's own text when a bracket, dot or colon sets it off.
_LETTER = re.compile(r"\s*(?:\(\s*([a-z])\s*\)(?:[\s.:,].*)?|([a-z])\s*(?:[).:].*)?)\s*", re.DOTALL | re.IGNORECASE)
_SEVERAL = re.compile(r"\W*[A-Z]\W*(?:(?:\band\b|\bor\b|[,/&+])\W*[A-Z]\W*)+", re.IGNORECASE)  # "(A) or (B)"
_BOOLEANS = {"true": "True", "yes": "True", "false": "False", "no": "False"}


def extract(text: str, answer: Answer) -> str | None:
    """Return the canonical answer in the last complete ``<ans>…</ans>`` of `text`.

    None without a complete tag, or if its content is not of the kind `answer`.
    """
    tags = _TAG.findall(text)
    return canonical(tags[-1], answer) if tags else None


def canonical(text: str, answer: Answer) -> str | None:
    """Return the canonical form of `text`, a bare answer; None if it is not of the kind `answer`."""
    if answer.kind == "number":
        return canonical_number(text)
    if answer.kind == "text":
        return (text.strip() if answer.exact else tidy_text(text)) or None
    if answer.kind == "boolean":
        return _BOOLEANS.get(fold_label(text))
    if answer.kind == "json":
        try:
            return structured.compact(structured.parse(text, answer.json_schema), answer.json_schema)
        except ValueError:
            return None
    if answer.choices:
        return _choice(text, answer.choices)
    match = None if _SEVERAL.fullmatch(text) else _LETTER.fullmatch(tidy_text(text))
    return f"({(match[1] or match[2]).upper()})" if match else None


def _choice(text: str, choices: tuple[str, ...]) -> str | None:
    """Return the label that `text` is in the strictest form in which it is any, None if it could be several."""
    for form in (str.strip, tidy_text, fold_text, fold_label):
        given = form(text)
        if found := [choice for choice in choices if given and form(choice) == given]:
            return found[0] if len(found) == 1 else None
    return None


def comparable(text: str, answer: Answer) -> str | None:
    """Return the form in which answers are compared; answers with equal forms are equal."""
    form = canonical(text, answer)
    if form is None or answer.kind not in ("text", "json") or answer.exact:
        return form
    if answer.kind == "json":
        return structured.compact(structured.folded(json.loads(form)), answer.json_schema)
    return fold_text(form) or None


def matches(predicted: str | None, target: str, answer: Answer) -> bool:
    """Return True if `predicted`, as returned by `extract`, equals the answer `target`."""
    if predicted is None:
        return False
    form = comparable(predicted, answer)
    return form is not None and form == comparable(target, answer)


def leaf_counts(predicted: str | None, target: str, answer: Answer) -> tuple[int, int, int]:
    """Return how many values of a JSON answer are right, how many were predicted, and how many there are.

    A value counts with its path; texts are compared as by `matches`. No answer predicts nothing.
    """
    forms = [comparable(text, answer) if text is not None else None for text in (predicted, target)]
    given, gold = (structured.leaves(json.loads(form or "{}")) for form in forms)
    return (given & gold).total(), given.total(), gold.total()


def leaf_f1(pairs: Iterable[tuple[str | None, str]], answer: Answer) -> float | None:
    """Return the micro F1 over the values of JSON answers, in [0, 1]: the slot F1 of predictions with their targets.

    None for answers that are not JSON.
    """
    if answer.kind != "json":
        return None
    counts = [leaf_counts(predicted, target, answer) for predicted, target in pairs]
    right, given, gold = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0)
    return 2 * right / (given + gold) if given + gold else 1.0
