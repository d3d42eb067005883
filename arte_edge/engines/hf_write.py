"""Write many completions side by side in one row (`hf_row`): prefixes once, places refilled as texts end.

Each step decodes a sequence's last token and a guess of the next ones (`guess`) in one call; a guessed token
counts where it is the one that is drawn there. The cells of the others are seen by nobody and given back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.engines.guess import Guesser, Memory
from arte_edge.engines.hf_row import Row
from arte_edge.engines.hf_text import Writer
from arte_edge.engines.llama_stems import Stem, grow_stems

if TYPE_CHECKING:
    import torch

__all__ = ["write_rows"]

_PLACES = 48  # sequences that write at once: attention to the others' cells grows with their square
_REFILL_SHARE = 8  # new ones enter when one place in so many is free
_DEAD_SHARE = 0.15  # of the cells: then those that nobody sees are given back


Draw = Callable[[int, "Writer"], int]  # row of the logits, who writes it: the token drawn there


@dataclass
class _Sequence:
    writer: Writer
    guesser: Guesser
    pending: list[int]  # tokens not decoded yet
    guessed: int  # how many of them, the last ones, are a guess
    position: int  # of the first of them
    seen: NDArray[np.bool_]  # [n_cells] at the time

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


class _Schedule:
    def __init__(
        self,
        model: Any,
        device: torch.device,
        prompts: Sequence[Sequence[int]],
        writers: Sequence[Writer],
        drawing: Callable[[torch.Tensor], Draw],
    ) -> None:
        self._row = Row(model, device)
        self._prompts, self._writers, self._drawing = prompts, writers, drawing
        self._waiting = deque(grow_stems(prompts, [len(prompt) - 1 for prompt in prompts]))
        self._held: list[tuple[Stem, NDArray[np.bool_]]] = []  # the way to the last stem, and what each sees
        self._live: list[_Sequence] = []
        self._written = Memory()
        self._shared = [0] * len(prompts)

    def run(self) -> list[int]:
        while self._waiting or self._live:
            free = _PLACES - len(self._live)
            if self._waiting and (not self._live or free * _REFILL_SHARE >= _PLACES):
                self._refill()
            self._step()
        return self._shared

    def _refill(self) -> None:
        while self._waiting and len(self._live) < _PLACES:
            i, stem = self._waiting.popleft()
            seen = self._hold(stem)
            start = self._shared[i] = stem.end if stem else 0
            prompt = list(self._prompts[i])
            guesser = Guesser(prompt, self._written)
            self._live.append(_Sequence(self._writers[i], guesser, prompt[start:], 0, start, seen))

    def _hold(self, stem: Stem | None) -> NDArray[np.bool_]:
        """Decode a stem after those it hangs on; return the cells that hold it."""
        if stem is None:
            return np.zeros(self._row.n_cells, dtype=np.bool_)
        for known, seen in self._held:
            if known is stem:
                return seen
        before = self._hold(stem.parent)
        at = np.arange(stem.start, stem.end)
        n = self._row.n_cells
        mask = np.zeros((len(at), n + len(at)), dtype=np.bool_)
        mask[:, : len(before)] = before
        mask[:, n:] = np.tri(len(at), dtype=np.bool_)
        self._row.extend(stem.tokens[stem.start :], at, mask, [len(at) - 1])
        self._held = [pair for pair in self._held if pair[0].level < stem.level]
        held: NDArray[np.bool_] = mask[-1].copy()
        self._held.append((stem, held))
        return held

    def _step(self) -> None:
        """Decode what is pending of all sequences in one call; draw, and let those that are done leave."""
        n = self._row.n_cells
        total = sum(len(one.pending) for one in self._live)
        mask = np.zeros((total, n + total), dtype=np.bool_)
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for one in self._live:
            start, m = len(tokens), len(one.pending)
            mask[start : start + m, : len(one.seen)] = one.seen
            mask[start : start + m, n + start : n + start + m] = np.tri(m, dtype=np.bool_)
            tokens += one.pending
            positions += range(one.position, one.position + m)
            wanted += range(start + m - 1 - one.guessed, start + m)
        draw = self._drawing(self._row.extend(tokens, np.array(positions), mask, wanted))
        going, row = [], 0
        for one in self._live:
            n_drawn = 1 + one.guessed
            if one.advance(draw, row, mask[wanted[row : row + n_drawn]]):
                going.append(one)
            row += n_drawn
        self._live = going
        self._give_back()

    def _give_back(self) -> None:
        """Move the cells that somebody sees together once too many are dead."""
        views = [one.seen for one in self._live] + [seen for _, seen in self._held]
        alive = np.zeros(self._row.n_cells, dtype=np.bool_)
        for view in views:
            alive[: len(view)] |= view
        if alive.sum() >= (1 - _DEAD_SHARE) * len(alive):
            return
        cells = np.flatnonzero(alive)
        self._row.keep(cells)
        for one in self._live:
            one.seen = one.seen[cells[cells < len(one.seen)]]
        self._held = [(stem, seen[cells[cells < len(seen)]]) for stem, seen in self._held]
