"""Continuous batching: many sequences in one decode, prefixes computed once, slots refilled as sequences end.

Prefill of new sequences and single decode steps of running ones share a batch: on a CPU the weights are read once a
batch whatever its size, and products of many rows use the arithmetic units better.

How llama.cpp's split cache handles a batch decides the speed: neighbouring sequences (slots 4, 5, 6) are multiplied
together, a gap or another order cuts the batch into pieces that each read all weights. So the running sequences stay
in slots 0, 1, 2 … without gaps (the last one moves into a gap: one copy in memory, a hundredth of a step), rows are
in the order of their slots, and new sequences enter several at a time, next to each other.

Prefixes (`arte_edge.runtimes.prefix_tree`) are decoded alone, in sequences above the slots, so their cached values do
not depend on what else runs. The schedule is a function of the jobs: the same jobs make the same batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from arte_edge.runtimes.llamacpp.bindings import LlamaContext
from arte_edge.runtimes.prefix_tree import MAX_LEVELS, SharedPrefix, group_by_prefix

_REFILL_SHARE = 8  # new sequences enter when one slot in so many is free
_RIDE = 8  # last tokens of a prompt, decoded one a step
_Rows = list[tuple[int, int, int, int]]  # token, position, sequence, whether its logits are computed


@dataclass
class Job:
    """One sequence: its tokens, the positions whose logits are computed, and what to do with them.

    `on_logits(position, logits)` gets each row of logits ``[v]`` and returns the next token to
    append, or None to end the sequence once all its tokens are decoded.
    """

    tokens: list[int]
    outputs: frozenset[int]
    on_logits: Callable[[int, NDArray[np.float32]], int | None]
    shared: int = 0  # leading tokens that came from a shared prefix; set by `run`
    _next: int = field(default=0, repr=False)  # first token that is not decoded yet
    _last: int = field(default=0, repr=False)  # position from which every token's logits are computed


def run(context: LlamaContext, jobs: Sequence[Job]) -> None:
    """Decode every job to its end in a cleared context, which keeps `MAX_LEVELS` sequences for prefixes."""
    _Schedule(context, jobs).run()


class _Schedule:
    def __init__(self, context: LlamaContext, jobs: Sequence[Job]) -> None:
        self._context = context
        self._slots = context.n_seq - MAX_LEVELS
        # A prefix ends before the first row whose logits are read.
        most = [min(len(job.tokens) - 1, *job.outputs) for job in jobs]
        order = group_by_prefix([job.tokens for job in jobs], most)
        self._waiting = deque((jobs[i], prefix) for i, prefix in order)
        self._cached: list[SharedPrefix | None] = [None] * MAX_LEVELS
        self._live: list[Job] = []  # by slot

    def run(self) -> None:
        while self._waiting or self._live:
            free = self._slots - len(self._live)
            if free and self._waiting and (not self._live or free * _REFILL_SHARE >= self._slots):
                self._refill()
            self._step()

    def _refill(self) -> None:
        while self._waiting and len(self._live) < self._slots:
            job, prefix = self._waiting.popleft()
            job.shared = job._next = prefix.end if prefix else 0
            job._last = max(job.outputs)
            if prefix:
                self._context.copy(self._load_prefix(prefix), len(self._live))
            self._live.append(job)

    def _load_prefix(self, prefix: SharedPrefix) -> int:
        """Decode a prefix, after the shorter ones that it extends; return the sequence that holds it."""
        sequence = self._slots + prefix.level
        if self._cached[prefix.level] is prefix:
            return sequence
        self._context.drop(sequence)
        if prefix.parent:
            self._context.copy(self._load_prefix(prefix.parent), sequence)
        step = self._context.n_batch
        for start in range(prefix.start, prefix.end, step):
            end = min(start + step, prefix.end)
            self._decode([(prefix.tokens[at], at, sequence, 0) for at in range(start, end)])
        self._cached[prefix.level] = prefix
        return sequence

    def _decode(self, rows: _Rows) -> NDArray[np.float32]:
        tokens, positions, sequences, output = np.array(rows, dtype=np.int32).T
        return self._context.decode_arrays(tokens, positions, sequences, output.astype(np.int8))

    def _step(self) -> None:
        """Fill one batch from the live slots, decode it, hand out its logits, close the gaps."""
        rows: _Rows = []
        chunk = self._chunk()
        for slot, job in enumerate(self._live):
            start = job._next
            job._next += chunk if len(job.tokens) - start > _RIDE else 1
            rows.extend(
                (job.tokens[at], at, slot, int(at >= job._last or at in job.outputs)) for at in range(start, job._next)
            )
        logits = self._decode(rows)
        ended = []
        outputs = [(slot, at) for _, at, slot, output in rows if output]
        for (slot, at), row in zip(outputs, logits, strict=True):
            job = self._live[slot]
            token = job.on_logits(at, row)
            if token is not None:
                job.tokens.append(token)
            elif at == len(job.tokens) - 1:
                ended.append(slot)
        self._close_gaps(ended)

    def _chunk(self) -> int:
        """Return how many tokens each sequence with a prompt before it may decode in one batch: the same for all.

        Sequences with unequal numbers of rows would be cut into small pieces, each of which reads
        all weights. So all decode as many as the shortest prompt has left, and the rest later; the last
        few tokens of a prompt are decoded one a step, like generated ones.
        """
        left = [n for job in self._live if (n := len(job.tokens) - job._next) > _RIDE]
        if not left:
            return 1
        return min(min(left), 1 + (self._context.n_batch - len(self._live)) // len(left))

    def _close_gaps(self, ended: list[int]) -> None:
        """Free the slots of ended sequences by moving the last running sequences into them."""
        for slot in sorted(ended, reverse=True):
            last = len(self._live) - 1
            self._context.drop(slot)
            if slot != last:
                self._context.copy(last, slot)
                self._context.drop(last)
                self._live[slot] = self._live[last]
            self._live.pop()
