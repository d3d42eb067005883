"""Normal forms of texts, labels and numbers, for comparing answers and the choices of a task.

Numbers are parsed strictly: a text with two different numbers ("2 + 3 = 5", "3,5", "twenty-one") has no
answer, because guessing would count luck as skill.
"""

from __future__ import annotations

import re
import string
import unicodedata
from decimal import Decimal

# Brackets are not here: for some tasks they are the answer.
_EDGE = string.whitespace + ".,;:!?\"'`*“”‘’„‚«»‹›…。，；：！？"
_SPACE = re.compile(r"\s+")
_SPACE_AT_BRACKET = re.compile(r"\s*([()\[\]{}<>,])\s*")
_BETWEEN_WORDS = re.compile(r"(?<=[^\W_])[\s_-]+(?=[^\W_])")


def tidy_text(text: str) -> str:
    """Return `text` in NFKC with collapsed blanks and without quotes and punctuation at its ends."""
    tidy = _SPACE.sub(" ", unicodedata.normalize("NFKC", text))
    return tidy.strip(_EDGE)


def fold_text(text: str) -> str:
    """Return the form in which free texts are compared: `tidy_text`, case folded, no blanks at brackets and commas.

    ``set_heat( Bedroom,21 )`` and ``set_heat(bedroom, 21)`` are equal.
    """
    folded = text.casefold()
    if not text.isascii():
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _SPACE_AT_BRACKET.sub(r"\1", tidy_text(folded))


def fold_label(text: str) -> str:
    """Return the most tolerant form of a label: `fold_text` without brackets around it, ``_`` and ``-`` as blanks.

    ``Light on``, ``light_on`` and ``"light-on".`` are equal; ``C`` and ``C++``, ``<50`` and ``>50`` are not.
    """
    return _BETWEEN_WORDS.sub(" ", fold_text(text)).strip(_EDGE + "()[]{}_")


WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
_WORD = re.compile(rf"\b(minus |negative )?({'|'.join(WORDS)})\b")
# With one of these words, a number has another value.
_SCALE = re.compile(
    r"\b(thirty|forty|fifty|sixty|seventy|eighty|ninety|hundreds?|thousands?|millions?|billions?|dozens?"
    r"|half|halves|thirds?|quarters?)\b"
)
# A minus after a word or bracket is not a sign; digits inside a word ("m2", "v2") are not a number; a `tail`
# after a unit ("2x3") makes the text ambiguous.
_FIGURE = re.compile(
    r"(?P<sign>(?<![^\W_])(?<!\))-\s?[$€£¥]?\s?|\b(?:minus|negative) )?(?<![^\W_])(?<![.,])"
    r"(?P<digits>\.?\d[\d.,]*)(?:e(?P<exponent>[+-]?\d{1,2})(?!\w))?(?:[^\W\d_]*)(?P<tail>\w*)"
)
_GROUPED = re.compile(r"\d{1,3}(,\d{3})+(\.\d+)?|\d*\.?\d+")
_MINUS_SIGNS = str.maketrans(dict.fromkeys("‐‑‒–—−", "-"))


def canonical_number(text: str) -> str | None:
    """Return the number in `text` as ``-1234.5``, None if there is none or several.

    Thousands commas, units, currency signs, a trailing dot and number words up to twenty are accepted; the same
    number written twice ("5 (five)") is one number.
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
