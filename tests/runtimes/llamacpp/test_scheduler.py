"""The scheduler against a context that only keeps books: which token of which sequence it holds where."""

from itertools import groupby
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from arte_edge.runtimes.llamacpp.scheduler import Job, run
from arte_edge.runtimes.prefix_tree import MAX_LEVELS

N_VOCAB = 16


class Books:
    """A context whose logits name the sum of a sequence's tokens, and which refuses what llama.cpp would."""

    def __init__(self, slots: int, n_batch: int = 64) -> None:
        self.n_seq, self.n_batch = slots + MAX_LEVELS, n_batch
        self.cached: list[list[int]] = [[] for _ in range(self.n_seq)]
        self.batches: list[list[tuple[int, int]]] = []  # (sequence, rows), in order

    def copy(self, source: int, target: int) -> None:
        assert not self.cached[target], "a copy over a sequence that is in use"
        self.cached[target] = list(self.cached[source])

    def drop(self, sequence: int, start: int = -1) -> None:
        del self.cached[sequence][max(start, 0) :]

    def decode_arrays(
        self, tokens: NDArray[Any], positions: NDArray[Any], sequences: NDArray[Any], wanted: NDArray[Any]
    ) -> NDArray[np.float32]:
        assert 0 < len(tokens) <= self.n_batch
        out = []
        for token, position, sequence, want in zip(tokens, positions, sequences, wanted, strict=True):
            assert len(self.cached[sequence]) == position, "a token that does not follow"
            self.cached[sequence].append(int(token))
            if want:
                out.append(np.eye(N_VOCAB, dtype=np.float32)[sum(self.cached[sequence]) % N_VOCAB])
        self.batches.append([(key, len(list(rows))) for key, rows in groupby(sequences.tolist())])
        return np.array(out)


class Writer:
    """Writes greedily until a token is 0 or there are `most`."""

    def __init__(self, tokens: list[int], most: int) -> None:
        self.prompt, self.most, self.written = list(tokens), most, list[int]()
        self.job = Job(list(tokens), frozenset([len(tokens) - 1]), self.on_logits)

    def on_logits(self, position: int, logits: NDArray[np.float32]) -> int | None:
        assert position == len(self.prompt) + len(self.written) - 1
        self.written.append(int(logits.argmax()))
        return None if len(self.written) == self.most or self.written[-1] == 0 else self.written[-1]

    def alone(self) -> list[int]:
        """Return what it writes with nobody beside it."""
        tokens, out = list(self.prompt), list[int]()
        while len(out) < self.most and (not out or out[-1] != 0):
            out.append(sum(tokens) % N_VOCAB)
            tokens.append(out[-1])
        return out


def scheduled(writers: list[Writer], slots: int, **sizes: int) -> Books:
    books = Books(slots, **sizes)
    run(books, [writer.job for writer in writers])  # type: ignore[arg-type]
    return books


PROMPT = st.lists(st.integers(1, 15), min_size=1, max_size=30)


@given(st.lists(st.tuples(PROMPT, st.integers(1, 12)), min_size=1, max_size=25), st.integers(1, 7), PROMPT)
def test_sequences_do_not_disturb_each_other(cases: list[tuple[list[int], int]], slots: int, common: list[int]) -> None:
    writers = [Writer(common * 2 + tokens, most) for tokens, most in cases]
    scheduled(writers, slots)
    assert [writer.written for writer in writers] == [writer.alone() for writer in writers]


@given(st.lists(PROMPT, min_size=1, max_size=12), st.integers(1, 5))
def test_the_running_sequences_have_no_gaps_and_come_in_order(prompts: list[list[int]], slots: int) -> None:
    books = scheduled([Writer([3] * 20 + tokens, 9) for tokens in prompts], slots)
    for batch in books.batches:
        sequences = [sequence for sequence, _ in batch]
        alone = len(sequences) == 1 and sequences[0] >= slots  # a prefix
        assert alone or sequences == list(range(len(sequences)))


def test_a_shared_prefix_is_decoded_once() -> None:
    writers = [Writer([5] * 40 + [7] * 10 + [d] * 20 + [q], 2) for d in (1, 2) for q in range(1, 7)]
    books = scheduled(writers, 4)
    prefixes = [batch[0][1] for batch in books.batches if batch[0][0] >= 4]
    assert prefixes == [50, 20, 20]
    assert {writer.job.shared for writer in writers} == {70}


def test_a_finished_sequence_makes_room_at_once() -> None:
    writers = [Writer([9, 4, i], 3 if i % 2 else 12) for i in range(1, 15)]
    books = scheduled(writers, 4)
    sizes = [len(batch) for batch in books.batches]
    assert sizes.index(min(sizes)) >= len(sizes) - 12  # only the tail runs with free slots
    assert min(sizes[: len(sizes) - 12]) >= 3


def test_long_prompts_are_fed_in_pieces_that_fit_beside_the_running_ones() -> None:
    writers = [Writer([i] * 100, 5) for i in range(1, 6)]
    scheduled(writers, 3, n_batch=32)
    assert [writer.written for writer in writers] == [writer.alone() for writer in writers]
