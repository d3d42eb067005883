"""Guess how a text goes on: as something went on that has the same last few tokens.

A small model that answers after an example repeats the example, the question, and what it wrote to other
questions. A guess costs a row in a batch that is decoded anyway, and a right one saves a whole step; a wrong
one is thrown away, so the text stays what it is without guesses (prompt lookup decoding; speculative
decoding without a second model, arXiv 2211.17192). What the sequences beside this one wrote is looked up too.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Guesser", "Memory"]

_LONGEST = 3  # tokens that are looked up at most
_MOST = 8  # tokens of a guess


class Memory:
    """Where each few tokens stood last, in lists that may still grow."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], tuple[list[int], int]] = {}

    def note(self, tokens: list[int], start: int) -> None:
        """Remember what the tokens from `start` on came after; the list is kept, not copied."""
        for at in range(max(start, 1), len(tokens)):
            for n in range(1, min(_LONGEST, at) + 1):
                self._places[tuple(tokens[at - n : at])] = (tokens, at)

    def find(self, end: tuple[int, ...], most: int) -> list[int]:
        """Return up to `most` tokens that came after `end` the last time."""
        tokens, at = self._places.get(end, ([], 0))
        return tokens[at : at + most]


class Guesser:
    """The guesses for one text: shorter after a wrong one, longer after right ones."""

    def __init__(self, prompt: Sequence[int], shared: Memory) -> None:
        self._tokens, self._own, self._shared = list(prompt), Memory(), shared
        self._own.note(self._tokens, 0)
        self._most = _MOST // 2
        self._guess: list[int] = []

    def guess(self) -> list[int]:
        """Return the tokens to try next: none where nothing is known."""
        self._guess = []
        for n in range(min(_LONGEST, len(self._tokens)), 0, -1):
            end = tuple(self._tokens[-n:])
            self._guess = self._own.find(end, self._most) or self._shared.find(end, self._most)
            if self._guess:
                break
        return self._guess

    def add(self, tokens: Sequence[int]) -> None:
        """Take what was written since the guess: the part of it that was right, and one more token."""
        if self._guess:
            right = len(tokens) - 1
            self._most = min(self._most + 1, _MOST) if right == len(self._guess) else right + 1
        start = len(self._tokens)
        self._tokens.extend(tokens)
        self._own.note(self._tokens, start)
        self._shared.note(self._tokens, start)
