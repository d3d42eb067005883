"""Many sequences in one decode: a shared prefix computed once, slots refilled as sequences end.

Prefill of new sequences and single decode steps of running ones travel in the same
batch (continuous batching), because on a CPU the weights are read once a batch
whatever its size: that is where a batch is faster than one sequence after another.

The prefix is decoded alone, always in the same pieces, so its cached values do not
depend on what follows. Sequence 0 holds it; slots 1..n copy it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from arte_edge.engines.llama_runtime import LlamaContext, Row

__all__ = ["Job", "common_prefix", "run"]

_SHORTEST_PREFIX = 8  # tokens; below this a copy costs more than decoding again


@dataclass
class Job:
    """One sequence: its tokens, the positions whose logits are wanted, and what to do with them.

    `on_logits(position, logits)` gets each wanted row ``[v]`` and returns the next token to
    append, or None to end the sequence once all its tokens are decoded.
    """

    tokens: list[int]
    wanted: frozenset[int]
    on_logits: Callable[[int, NDArray[np.float32]], int | None]
    _next: int = field(default=0, repr=False)  # first token that is not decoded yet


def common_prefix(lists: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all lists share, leaving each at least one of its own."""
    shortest = min(len(tokens) for tokens in lists)
    first = lists[0]
    for i in range(shortest - 1):
        if any(tokens[i] != first[i] for tokens in lists):
            return i
    return shortest - 1


def run(context: LlamaContext, jobs: Sequence[Job]) -> int:
    """Decode every job to its end in a cleared context; return how many leading tokens they shared."""
    shared = common_prefix([job.tokens for job in jobs]) if len(jobs) > 1 else 0
    shared = min([shared, *(min(job.wanted) for job in jobs)])
    if shared < _SHORTEST_PREFIX:
        shared = 0
    prefix = jobs[0].tokens[:shared]
    for start in range(0, shared, context.n_batch):
        piece = prefix[start : start + context.n_batch]
        context.decode([Row(token, start + i, 0) for i, token in enumerate(piece)])

    waiting = deque(jobs)
    free = list(range(context.n_seq - 1, 0, -1))
    live: dict[int, Job] = {}
    while waiting or live:
        while waiting and free:
            slot = free.pop()
            job = live[slot] = waiting.popleft()
            job._next = shared
            if shared:
                context.copy(0, slot)
        _step(context, live, free)
    return shared


def _step(context: LlamaContext, live: dict[int, Job], free: list[int]) -> None:
    """Fill one batch from the live slots, decode it, hand out its logits."""
    rows: list[Row] = []
    wanted: list[tuple[int, int]] = []
    # Running sequences first: they need one row each, the rest of the batch is for prefill.
    for slot in sorted(live, key=lambda s: len(live[s].tokens) - live[s]._next):
        job = live[slot]
        room = context.n_batch - len(rows)
        for position in range(job._next, min(len(job.tokens), job._next + room)):
            want = position in job.wanted or position >= max(job.wanted)
            rows.append(Row(job.tokens[position], position, slot, want))
            if want:
                wanted.append((slot, position))
        job._next = min(len(job.tokens), job._next + room)
    logits = context.decode(rows)
    for (slot, position), row in zip(wanted, logits, strict=True):
        job = live[slot]
        token = job.on_logits(position, row)
        if token is not None:
            job.tokens.append(token)
        elif position == len(job.tokens) - 1:
            context.drop(slot)
            del live[slot]
            free.append(slot)
