"""Test strings for comparing tokenizers.

A converter that misses a pre-tokenizer, a merge or an added token gives the model wrong ids without any error.
Each group in ``hard_strings.json`` covers a known kind of fault: digits (split one by one, in threes, or not at
all), runs of blanks, special tokens in text, scripts without spaces, combining marks, characters that normalizers
drop.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

__all__ = ["HARD_STRINGS", "hard_strings"]

_MAX_ADDED = 48  # added tokens to test; some models have thousands of reserved ones
_GROUPS: dict[str, list[str]] = json.loads(Path(__file__).with_name("hard_strings.json").read_text("utf-8"))
_LONG = "lorem ipsum dolor sit amet " * 1000  # longer than a limit that a tokenizer may have been saved with
HARD_STRINGS: tuple[str, ...] = tuple(dict.fromkeys(chain(*_GROUPS.values(), [_LONG])))


def hard_strings(added: Sequence[str] = ()) -> tuple[str, ...]:
    """Return `HARD_STRINGS`, then each of the model's `added` tokens alone, inside a word and between blanks.

    If there are many, the first and the last: the reserved ones between them are alike.
    """
    half = _MAX_ADDED // 2
    chosen = tuple(added) if len(added) <= _MAX_ADDED else (*added[:half], *added[-half:])
    placed = (
        text for token in chosen for text in (token, f"a{token}b", f"one {token} two", f"{token}\n{token}")
    )
    return tuple(dict.fromkeys(chain(HARD_STRINGS, placed)))
