"""Write many completions side by side in rows of one cache (`hf_row`): prefixes once, places refilled as texts end.

Each step decodes a sequence's last token and a guess of the next ones (`guess`) in one call; a guessed token
counts where it is the one that is drawn there. The cells of the others are seen by nobody and given back.

Prefixes are computed in a row of their own and copied to the rows whose sequences go on from them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.runtimes.prefix_tree import Stem, grow_stems
from arte_edge.runtimes.transformers.packed_kv_cache import Part, Row, extend, hold
from arte_edge.runtimes.transformers.tokenizer import Writer

if TYPE_CHECKING:
    import torch

__all__ = ["Guesser", "Memory", "write_rows"]

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


_ROWS, _PLACES = 4, 12  # rows, and sequences in each: attention grows with the square of a row
_MOST_NEW = 512  # tokens of a row in one call: its mask is so many by all its cells
_REFILL_SHARE = 8  # new ones enter when one place in so many is free
_DEAD_SHARE = 0.15  # of a row's cells: then those that nobody sees are given back

View = NDArray[np.bool_]  # [n_cells]: which cells of a row a sequence sees
Draw = Callable[[int, Writer], int]  # row of the logits, who writes it: the token drawn there


def write_rows(
    model: Any,
    device: torch.device,
    prompts: Sequence[Sequence[int]],
    writers: Sequence[Writer],
    drawing: Callable[[torch.Tensor], Draw],
) -> list[int]:
    """Let every writer write after its prompt; return how many tokens of each prompt came from a prefix ``[n]``.

    `drawing` (logits ``[n, v]``) returns what draws a token from a row of them.
    """
    return _Schedule(model, device, prompts, writers, drawing).run()


@dataclass
class _Sequence:
    writer: Writer
    guesser: Guesser
    pending: list[int]  # tokens not decoded yet
    guessed: int  # how many of them, the last ones, are a guess
    position: int  # of the first of them
    seen: View

    def forget_guess(self) -> None:
        self.pending = self.pending[: len(self.pending) - self.guessed]
        self.guessed = 0

    def read(self, n: int, view: NDArray[np.bool_]) -> None:
        """Take in the first `n` tokens of a prompt too long for one call; `view` is what the last of them saw."""
        self.pending = self.pending[n:]
        self.position += n
        self.seen = view.copy()

    def advance(self, draw: Draw, row: int, views: NDArray[np.bool_]) -> bool:
        """Draw tokens from `row` on for as long as they are those of the guess; return whether more are wanted.

        `views` ``[1 + guessed, n_cells]`` says what each of the tokens that are drawn after saw.
        """
        guess = self.pending[len(self.pending) - self.guessed :]
        written: list[int] = []
        for expected in (*guess, None):
            written.append(draw(row + len(written), self.writer))
            if not self.writer.push(written[-1]):
                return False
            if written[-1] != expected:
                break
        right = len(written) - 1
        self.seen = views[right].copy()  # a view would keep the whole mask
        self.position += len(self.pending) - self.guessed + right
        self.guesser.add(written)
        guess = self.guesser.guess()[: self.writer.room - 1]
        self.pending, self.guessed = [written[-1], *guess], len(guess)
        return True


@dataclass
class _Group:
    """The sequences of one row, and the prefix that was copied to it last."""

    row: Row = field(default_factory=Row)
    live: list[_Sequence] = field(default_factory=list)
    stem: Stem | None = None
    prefix: View = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))

    def part(self) -> tuple[Part, list[int], list[int]]:
        """Return what is decoded next, how many tokens of each sequence, and after which of them tokens are drawn.

        The sequences that write come first; prompts are read in pieces that `_MOST_NEW` has room for.
        """
        taken: list[int] = []
        for one in self.live:
            left = max(_MOST_NEW - sum(taken), 0)
            if len(one.pending) > left:
                one.forget_guess()
            taken.append(min(len(one.pending), left))
        n, total = self.row.n_cells, sum(taken)
        mask = np.zeros((total, n + total), dtype=np.bool_)
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for one, m in zip(self.live, taken, strict=True):
            start = len(tokens)
            mask[start : start + m, : len(one.seen)] = one.seen
            mask[start : start + m, n + start : n + start + m] = np.tri(m, dtype=np.bool_)
            tokens += one.pending[:m]
            positions += range(one.position, one.position + m)
            if m == len(one.pending):
                wanted += range(start + m - 1 - one.guessed, start + m)
        return Part(self.row, tokens, np.array(positions), mask), taken, wanted

    def advance(self, draw: Draw, first: int, seen: NDArray[np.bool_], taken: Sequence[int]) -> None:
        """Let every sequence draw, from the row `first` of the logits on; those that are done leave.

        `seen` ``[n, n_cells]`` says what each decoded token saw, `taken` how many of them are each sequence's.
        """
        going, row, end = [], first, 0
        for one, m in zip(self.live, taken, strict=True):
            end += m
            if m < len(one.pending):
                if m:
                    one.read(m, seen[end - 1])
                going.append(one)
                continue
            n_drawn = 1 + one.guessed
            if one.advance(draw, row, seen[end - n_drawn : end]):
                going.append(one)
            row += n_drawn
        self.live = going
        self._give_back()

    def _give_back(self) -> None:
        """Move the cells that somebody sees together once too many are dead."""
        alive = np.zeros(self.row.n_cells, dtype=np.bool_)
        for view in (self.prefix, *(one.seen for one in self.live)):
            alive[: len(view)] |= view
        if alive.sum() >= (1 - _DEAD_SHARE) * len(alive):
            return
        cells = np.flatnonzero(alive)
        self.row.keep(cells)
        for one in self.live:
            one.seen = one.seen[cells[cells < len(one.seen)]]
        self.prefix = self.prefix[cells[cells < len(self.prefix)]]


class _Schedule:
    def __init__(
        self,
        model: Any,
        device: torch.device,
        prompts: Sequence[Sequence[int]],
        writers: Sequence[Writer],
        drawing: Callable[[torch.Tensor], Draw],
    ) -> None:
        self._model, self._device = model, device
        self._prompts, self._writers, self._drawing = prompts, writers, drawing
        self._waiting = deque(grow_stems(prompts, [len(prompt) - 1 for prompt in prompts]))
        self._groups = [_Group() for _ in range(_ROWS)]
        self._prefixes = Row()
        self._held: list[Stem] = []  # in the cells of `_prefixes`, one behind the other
        self._written = Memory()
        self._shared = [0] * len(prompts)

    def run(self) -> list[int]:
        places = _ROWS * _PLACES
        while self._waiting or any(group.live for group in self._groups):
            live = sum(len(group.live) for group in self._groups)
            if self._waiting and (not live or (places - live) * _REFILL_SHARE >= places):
                self._refill()
            self._step()
        return self._shared

    def _refill(self) -> None:
        """Give waiting sequences the free places: in rows that have their prefix, else in the emptiest ones."""
        while self._waiting:
            i, stem = self._waiting[0]
            free = [group for group in self._groups if len(group.live) < _PLACES]
            if not free:
                return
            group = min(free, key=lambda one: (one.stem is not stem, len(one.live)))
            self._waiting.popleft()
            if group.stem is not stem:
                self._copy(stem, group)
            start = self._shared[i] = stem.end if stem else 0
            prompt = list(self._prompts[i])
            guesser = Guesser(prompt, self._written)
            group.live.append(_Sequence(self._writers[i], guesser, prompt[start:], 0, start, group.prefix))

    def _copy(self, stem: Stem | None, group: _Group) -> None:
        """Copy a prefix to a group's row, where it takes the last one's place."""
        before = group.row.n_cells
        if stem:
            self._held = hold(self._model, self._device, self._prefixes, stem, self._held)
            group.row.adopt(self._prefixes, np.arange(stem.end))
        group.stem, group.prefix = stem, np.arange(group.row.n_cells) >= before

    def _step(self) -> None:
        """Decode what is pending of all sequences in one call, and let them draw."""
        groups = [group for group in self._groups if group.live]
        made = [group.part() for group in groups]
        wanted: list[int] = []
        start = 0
        for part, _, own in made:
            wanted += [start + place for place in own]
            start += len(part.tokens)
        # Logits of one token at least: where all are still reading, nobody draws from them.
        logits = extend(self._model, self._device, [part for part, _, _ in made], wanted or [0])
        draw = self._drawing(logits)
        first = 0
        for group, (part, taken, own) in zip(groups, made, strict=True):
            group.advance(draw, first, part.seen, taken)
            first += len(own)
