"""Generate many completions in a packed KV cache: prefixes computed once, slots refilled as sequences end.

Each step decodes a sequence's last token together with proposed next tokens, found by prompt lookup: the tokens that
followed the same few tokens before (speculative decoding without a second model, arXiv 2211.17192). A small model
repeats the example, the question and what it wrote to other questions, and texts of other sequences are searched
too. A proposed token costs one row of a batch that is decoded anyway; a right one saves a whole step, a wrong one is
discarded, so the text does not change. The cells of discarded tokens are masked and freed. Where a row costs the same
however many there are, as in float32 on a CPU from some dozen on, nothing is proposed beyond these.

Prefixes are computed in a row of their own and copied to the rows whose sequences extend them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.runtimes.prefix_tree import SharedPrefix, group_by_prefix
from arte_edge.runtimes.transformers.packed_kv_cache import CacheRow, NewTokens, forward_rows, load_prefix
from arte_edge.runtimes.transformers.tokenizer import Writer

if TYPE_CHECKING:
    import torch

_LONGEST = 3  # tokens that are looked up at most
_MOST = 8  # tokens of a proposal


class NgramIndex:
    """Where each n-gram occurred last, in token lists that may still grow."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], tuple[list[int], int]] = {}

    def note(self, tokens: list[int], start: int) -> None:
        """Index the tokens from `start` on by what precedes them; the list is referenced, not copied."""
        for at in range(max(start, 1), len(tokens)):
            for n in range(1, min(_LONGEST, at) + 1):
                self._places[tuple(tokens[at - n : at])] = (tokens, at)

    def find(self, end: tuple[int, ...], most: int) -> list[int]:
        """Return up to `most` tokens that followed `end` the last time."""
        tokens, at = self._places.get(end, ([], 0))
        return tokens[at : at + most]


class PromptLookup:
    """Proposed tokens for one text: fewer after a wrong proposal, more after right ones.

    None for a sampled text, whose tokens are too seldom those of another one.
    """

    def __init__(self, prompt: Sequence[int], shared: NgramIndex, *, sampled: bool = False) -> None:
        self._tokens, self._own, self._shared = list(prompt), NgramIndex(), shared
        self._sampled = sampled
        if not sampled:
            self._own.note(self._tokens, 0)
        self._most = _MOST // 2
        self._proposal: list[int] = []

    def propose(self) -> list[int]:
        """Return the tokens to try next; none where no n-gram matches."""
        self._proposal = []
        if self._sampled:
            return self._proposal
        for n in range(min(_LONGEST, len(self._tokens)), 0, -1):
            end = tuple(self._tokens[-n:])
            self._proposal = self._own.find(end, self._most) or self._shared.find(end, self._most)
            if self._proposal:
                break
        return self._proposal

    def shorten(self, n: int) -> None:
        """Note that only the first `n` tokens of the proposal are tried."""
        del self._proposal[n:]

    def add(self, tokens: Sequence[int]) -> None:
        """Append what was generated since the proposal: the right part of it and one more token."""
        if self._proposal:
            right = len(tokens) - 1
            self._most = min(self._most + 1, _MOST) if right == len(self._proposal) else right + 1
        start = len(self._tokens)
        self._tokens.extend(tokens)
        if not self._sampled:
            self._own.note(self._tokens, start)
            self._shared.note(self._tokens, start)


_ROWS, _SLOTS = 4, 12  # rows, and sequences in each: attention grows with the square of a row
_MOST_NEW = 512  # tokens of a row in one call: its mask has so many rows and a column a cell
FLOAT32_ROWS = 16  # packed weights, Zen 2: a product of 8 rows takes 1.7 times one of a row, of 32 rows 2.6 times that
_REFILL_SHARE = 8  # new sequences enter when one slot in so many is free
_DEAD_SHARE = 0.15  # of a row's cells masked for all sequences: then they are freed

View = NDArray[np.bool_]  # [n_cells]: which cells of a row a sequence sees
Draw = Callable[[int, Writer], int]  # row of the logits, its writer: the token drawn there


def generate_packed(
    model: Any,
    device: torch.device,
    prompts: Sequence[Sequence[int]],
    writers: Sequence[Writer],
    drawing: Callable[[torch.Tensor], Draw],
    most_rows: int = 0,
) -> list[int]:
    """Generate after every prompt; return how many tokens of each prompt came from a shared prefix ``[n]``.

    `drawing` (logits ``[n, v]``) returns a function that draws a token from one of their rows. Proposed tokens fill a
    step up to `most_rows` tokens; 0: any number is proposed.
    """
    return _Schedule(model, device, prompts, writers, drawing, most_rows).run()


@dataclass
class _Sequence:
    writer: Writer
    lookup: PromptLookup
    pending: list[int]  # tokens not decoded yet
    n_proposed: int  # how many of them, the last ones, are a proposal
    position: int  # of the first of them
    seen: View

    def shorten_proposal(self, most: int) -> None:
        surplus = max(self.n_proposed - most, 0)
        self.pending = self.pending[: len(self.pending) - surplus]
        self.n_proposed -= surplus
        self.lookup.shorten(self.n_proposed)

    def read(self, n: int, view: NDArray[np.bool_]) -> None:
        """Mark the first `n` tokens of a prompt too long for one call as read; `view` is the mask of the last one."""
        self.pending = self.pending[n:]
        self.position += n
        self.seen = view.copy()

    def advance(self, draw: Draw, row: int, views: NDArray[np.bool_]) -> bool:
        """Draw tokens from `row` on while they equal the proposal; return whether the text continues.

        `views` ``[1 + n_proposed, n_cells]`` are the masks of the tokens after which tokens are drawn.
        """
        proposal = self.pending[len(self.pending) - self.n_proposed :]
        written: list[int] = []
        for expected in (*proposal, None):
            written.append(draw(row + len(written), self.writer))
            if not self.writer.push(written[-1]):
                return False
            if written[-1] != expected:
                break
        right = len(written) - 1
        self.seen = views[right].copy()  # a view would keep the whole mask
        self.position += len(self.pending) - self.n_proposed + right
        self.lookup.add(written)
        proposal = self.lookup.propose()[: self.writer.room - 1]
        self.pending, self.n_proposed = [written[-1], *proposal], len(proposal)
        return True


@dataclass
class _Group:
    """The sequences of one row, and the prefix that was copied to it last."""

    row: CacheRow = field(default_factory=CacheRow)
    live: list[_Sequence] = field(default_factory=list)
    prefix: SharedPrefix | None = None
    prefix_view: View = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))

    def part(self, most_proposed: int) -> tuple[NewTokens, list[int], list[int]]:
        """Return what is decoded next, how many tokens of each sequence, and after which of them tokens are drawn.

        Generating sequences come first; prompts are read in pieces that fit into `_MOST_NEW`.
        """
        taken: list[int] = []
        for one in self.live:
            one.shorten_proposal(most_proposed)
            left = max(_MOST_NEW - sum(taken), 0)
            if len(one.pending) > left:
                one.shorten_proposal(0)
            taken.append(min(len(one.pending), left))
        n, total = self.row.n_cells, sum(taken)
        mask = np.zeros((total, n + total), dtype=np.bool_)
        tokens: list[int] = []
        positions: list[int] = []
        outputs: list[int] = []
        for one, m in zip(self.live, taken, strict=True):
            start = len(tokens)
            mask[start : start + m, : len(one.seen)] = one.seen
            mask[start : start + m, n + start : n + start + m] = np.tri(m, dtype=np.bool_)
            tokens += one.pending[:m]
            positions += range(one.position, one.position + m)
            if m == len(one.pending):
                outputs += range(start + m - 1 - one.n_proposed, start + m)
        return NewTokens(self.row, tokens, np.array(positions), mask), taken, outputs

    def advance(self, draw: Draw, first: int, seen: NDArray[np.bool_], taken: Sequence[int]) -> None:
        """Let every sequence draw, from the row `first` of the logits on; ended sequences are removed.

        `seen` ``[n, n_cells]`` are the masks of the decoded tokens, `taken` the number of tokens of each sequence.
        """
        live, row, end = [], first, 0
        for one, m in zip(self.live, taken, strict=True):
            end += m
            if m < len(one.pending):
                if m:
                    one.read(m, seen[end - 1])
                live.append(one)
                continue
            n_drawn = 1 + one.n_proposed
            if one.advance(draw, row, seen[end - n_drawn : end]):
                live.append(one)
            row += n_drawn
        self.live = live
        self._free_cells()

    def _free_cells(self) -> None:
        """Compact the cells in use once too many are masked for all sequences."""
        alive = np.zeros(self.row.n_cells, dtype=np.bool_)
        for view in (self.prefix_view, *(one.seen for one in self.live)):
            alive[: len(view)] |= view
        if alive.sum() >= (1 - _DEAD_SHARE) * len(alive):
            return
        cells = np.flatnonzero(alive)
        self.row.keep(cells)
        for one in self.live:
            one.seen = one.seen[cells[cells < len(one.seen)]]
        self.prefix_view = self.prefix_view[cells[cells < len(self.prefix_view)]]


class _Schedule:
    def __init__(
        self,
        model: Any,
        device: torch.device,
        prompts: Sequence[Sequence[int]],
        writers: Sequence[Writer],
        drawing: Callable[[torch.Tensor], Draw],
        most_rows: int,
    ) -> None:
        self._model, self._device, self._most_rows = model, device, most_rows
        self._prompts, self._writers, self._drawing = prompts, writers, drawing
        self._waiting = deque(group_by_prefix(prompts, [len(prompt) - 1 for prompt in prompts]))
        self._groups = [_Group() for _ in range(_ROWS)]
        self._prefixes = CacheRow()
        self._cached: list[SharedPrefix] = []  # in the cells of `_prefixes`, in order
        self._written = NgramIndex()
        self._shared = [0] * len(prompts)

    def run(self) -> list[int]:
        slots = _ROWS * _SLOTS
        while self._waiting or any(group.live for group in self._groups):
            live = sum(len(group.live) for group in self._groups)
            if self._waiting and (not live or (slots - live) * _REFILL_SHARE >= slots):
                self._refill()
            self._step()
        return self._shared

    def _refill(self) -> None:
        """Assign free slots to waiting sequences: in rows that hold their prefix, else in the emptiest row."""
        while self._waiting:
            i, prefix = self._waiting[0]
            free = [group for group in self._groups if len(group.live) < _SLOTS]
            if not free:
                return
            group = min(free, key=lambda one: (one.prefix is not prefix, len(one.live)))
            self._waiting.popleft()
            if group.prefix is not prefix:
                self._copy(prefix, group)
            start = self._shared[i] = prefix.end if prefix else 0
            prompt = list(self._prompts[i])
            writer = self._writers[i]
            lookup = PromptLookup(prompt, self._written, sampled=writer.sampled)
            group.live.append(_Sequence(writer, lookup, prompt[start:], 0, start, group.prefix_view))

    def _copy(self, prefix: SharedPrefix | None, group: _Group) -> None:
        """Copy a prefix to a group's row, where it replaces the last one."""
        before = group.row.n_cells
        if prefix:
            self._cached = load_prefix(self._model, self._device, self._prefixes, prefix, self._cached)
            group.row.adopt(self._prefixes, np.arange(prefix.end))
        group.prefix, group.prefix_view = prefix, np.arange(group.row.n_cells) >= before

    def _step(self) -> None:
        """Decode the pending tokens of all sequences in one call, and let the sequences draw."""
        groups = [group for group in self._groups if group.live]
        n_live = sum(len(group.live) for group in groups)
        most = max(self._most_rows // n_live - 1, 0) if self._most_rows else _MOST
        made = [group.part(most) for group in groups]
        outputs: list[int] = []
        start = 0
        for part, _, own in made:
            outputs += [start + place for place in own]
            start += len(part.tokens)
        # At least one row of logits, which is unused while all sequences still read their prompts.
        logits = forward_rows(self._model, self._device, [part for part, _, _ in made], outputs or [0])
        draw = self._drawing(logits)
        first = 0
        for group, (part, taken, own) in zip(groups, made, strict=True):
            group.advance(draw, first, part.seen, taken)
            first += len(own)
