"""Extract an answer from a model's output, and decide whether it is correct.

The answer is the content of the **last complete** ``<ans>…</ans>``; one that the end of the text truncates
does not count. By kind:

=========  ==========================================  =====================================
kind       canonical form                              accepted variants
=========  ==========================================  =====================================
choice     the letter of an option, ``(A)``            ``a``, ``A.``, ``a)``, ``(A) circle``
choice     one of the task's fixed labels, as written  case, blanks, ``_``, ``-``, edge dots
boolean    ``True`` or ``False``                       case, edge punctuation, yes / no
number     plain decimal, ``-1234.5``                  commas, units, ``4.``, words to twenty
text       the text, tidied, case kept                 case, Unicode forms, blanks, edge
                                                       quotes and punctuation
=========  ==========================================  =====================================

Nothing else is accepted: "the answer is True" inside the tags is not an answer.
"""

from __future__ import annotations

import re

from arte_edge.tasks.normalize import canonical_number, fold_label, fold_text, tidy_text
from arte_edge.tasks.task import Answer

__all__ = ["canonical", "comparable", "extract", "matches"]

# Innermost tags only: in "<ans> so <ans>4</ans>" the first tag was never closed.
_TAG = re.compile(r"<ans>((?:(?!</?ans>).)*)</ans>", re.DOTALL | re.IGNORECASE)
# The letter alone, or followed by the option's own text when a bracket, dot or colon sets it off.
_LETTER = re.compile(
    r"\s*(?:\(\s*([a-z])\s*\)(?:[\s.:,].*)?|([a-z])\s*(?:[).:].*)?)\s*", re.DOTALL | re.IGNORECASE
)
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
        return tidy_text(text) or None
    if answer.kind == "boolean":
        return _BOOLEANS.get(fold_label(text))
    if answer.choices:
        folded = fold_label(text)
        return next((choice for choice in answer.choices if fold_label(choice) == folded), None)
    match = _LETTER.fullmatch(tidy_text(text))
    return f"({(match[1] or match[2]).upper()})" if match else None


def comparable(text: str, answer: Answer) -> str | None:
    """Return the form in which answers are compared; answers with equal forms are equal."""
    form = canonical(text, answer)
    if form is None or answer.kind != "text":
        return form
    return fold_text(form) or None


def matches(predicted: str | None, target: str, answer: Answer) -> bool:
    """Return True if `predicted`, as returned by `extract`, equals the answer `target`."""
    if predicted is None:
        return False
    form = comparable(predicted, answer)
    return form is not None and form == comparable(target, answer)
