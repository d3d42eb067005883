"""Normal forms of text and numbers: what two strings may differ in and still be the same answer.

Kept apart from the answer kinds, because the same forms decide whether two choices of a task are
distinct. Numbers are read strictly: a text that states two different numbers ("2 + 3 = 5", "3,5",
"twenty-one") has no readable answer, because guessing which one was meant would score luck.
"""

from __future__ import annotations

import re
import string
import unicodedata
from decimal import Decimal

__all__ = ["WORDS", "canonical_number", "fold_label", "fold_text", "tidy_text"]

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


WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
_WORD = re.compile(rf"\b(minus |negative )?({'|'.join(WORDS)})\b")
# Beside one of these a number word or a figure means something else than it says.
_SCALE = re.compile(
    r"\b(thirty|forty|fifty|sixty|seventy|eighty|ninety|hundreds?|thousands?|millions?|billions?|dozens?"
    r"|half|halves|thirds?|quarters?)\b"
)
# A sign counts only where nothing stands before it that could be subtracted from; digits inside
# a word ("m2", "v2") are no number; `tail` is what is glued to a unit ("2x3") and spoils it.
_FIGURE = re.compile(
    r"(?P<sign>(?<![^\W_])(?<!\))-\s?[$€£¥]?\s?|\b(?:minus|negative) )?(?<![^\W_])(?<![.,])"
    r"(?P<digits>\.?\d[\d.,]*)(?:e(?P<exponent>[+-]?\d{1,2})(?!\w))?(?:[^\W\d_]*)(?P<tail>\w*)"
)
_GROUPED = re.compile(r"\d{1,3}(,\d{3})+(\.\d+)?|\d*\.?\d+")
_MINUS_SIGNS = str.maketrans(dict.fromkeys("‐‑‒–—−", "-"))


def canonical_number(text: str) -> str | None:
    """Return the number that `text` states, plain (``-1234.5``), or None if it states none or several.

    Thousands commas, a unit, a currency sign, a trailing dot and number words up to twenty are
    read; the same number written twice ("5 (five)") is one number.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).translate(_MINUS_SIGNS).casefold().split())
    if _SCALE.search(folded):
        return None
    found: set[str] = set()
    for match in _FIGURE.finditer(folded):
        digits = match["digits"].rstrip(".,")
        if match["tail"].strip("_") or not digits.isascii() or not _GROUPED.fullmatch(digits):
            return None
        value = Decimal(f"{'-' if match['sign'] else ''}{digits.replace(',', '')}e{match['exponent'] or 0}")
        found.add(_plain(value))
    for match in _WORD.finditer(folded):
        value = Decimal(WORDS.index(match[2]))
        found.add(_plain(-value if match[1] else value))
    return found.pop() if len(found) == 1 else None


def _plain(value: Decimal) -> str:
    """Return `value` without exponent, trailing zeros or a negative zero."""
    text = format(value, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
