"""Which tokens decide between several continuations of one prompt.

Choices are tokenised together with the prompt, so that a token which spans the seam
is the one the model would write. A choice then counts the tokens from where the
choices part to where it stands alone: what is before is the same for all, and what
follows is a question that no other choice is asked ("(A)" against "(B)" is "A"
against "B"). The probabilities of a closed set then never add up to more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

__all__ = ["spans"]

Token = TypeVar("Token", int, str)


def spans(lists: Sequence[Sequence[Token]], prompt: Sequence[Token]) -> list[tuple[int, int]]:
    """Return for each token list (prompt and choice) the range ``start, end`` that counts.

    With one choice there is nothing to part from: all tokens after `prompt` count.
    """
    start = _parting([lists[0], prompt] if len(lists) == 1 else lists)
    return [(start, _alone(tokens, lists, start)) for tokens in lists]


def _parting(lists: Sequence[Sequence[Token]]) -> int:
    shortest = min(len(tokens) for tokens in lists)
    return next((i for i in range(shortest) if len({tokens[i] for tokens in lists}) > 1), shortest)


def _alone(tokens: Sequence[Token], lists: Sequence[Sequence[Token]], start: int) -> int:
    if len(lists) > 1:
        for end in range(start + 1, len(tokens)):
            if sum(list(other[:end]) == list(tokens[:end]) for other in lists) == 1:
                return end
    return len(tokens)
