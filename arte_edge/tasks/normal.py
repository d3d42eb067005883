"""Normal forms of text: what two strings may differ in and still say the same.

Kept apart from the answer kinds, because the same forms decide whether two
choices of a task are distinct.
"""

from __future__ import annotations

import re
import string
import unicodedata

__all__ = ["fold_label", "fold_text", "tidy_text"]

# Brackets are not here: for some tasks they are the answer.
_EDGE = string.whitespace + ".,;:!?\"'`*“”‘’„‚«»‹›…。，；：！？"
_SPACE = re.compile(r"\s+")
_SPACE_AT_BRACKET = re.compile(r"\s*([()\[\]{}<>,])\s*")
_NOT_WORD = re.compile(r"[\W_]+")


def tidy_text(text: str) -> str:
    """Return `text` in NFKC, blanks collapsed, quotes and punctuation at its edges removed; case kept."""
    tidy = _SPACE.sub(" ", unicodedata.normalize("NFKC", text))
    return tidy.strip(_EDGE)


def fold_text(text: str) -> str:
    """Return the form in which free texts are compared.

    As `tidy_text`, with case folded and no blanks beside brackets and commas, so that
    ``set_heat( Bedroom,21 )`` and ``set_heat(bedroom, 21)`` are one answer.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _SPACE_AT_BRACKET.sub(r"\1", tidy_text(folded))


def fold_label(text: str) -> str:
    """Return the form in which fixed labels are compared: letters and digits, case folded, one blank between.

    ``Light on``, ``light_on`` and ``"light-on".`` are one label.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _NOT_WORD.sub(" ", folded).strip()
