"""Trees of continuations against a unified context that only keeps books: every path gets its own logits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from arte_edge.runtimes.llamacpp.engine import MOST_LEAVES, run_trees
from arte_edge.runtimes.prefix_tree import MAX_LEVELS, Context, Tree, cells_of, longest_paths, plan_groups

N_VOCAB = 97


class Books:
    """A unified cache: cells with a token, a position and the sequences that see it; refuses what llama.cpp would."""

    def __init__(self, cells: int, n_batch: int = 64) -> None:
        self.n_batch, self.cells = n_batch, cells
        self.cached: list[tuple[int, int, set[int]]] = []
        self.batches: list[int] = []

    def _of(self, sequence: int) -> list[tuple[int, int]]:
        return sorted((at, token) for token, at, owners in self.cached if sequence in owners)

    def copy(self, source: int, target: int) -> None:
        assert not self._of(target), "a copy over a sequence that is in use"
        for _, _, owners in self.cached:
            if source in owners:
                owners.add(target)

    def drop(self, sequence: int, start: int = -1) -> None:
        for _, at, owners in self.cached:
            if at >= start:
                owners.discard(sequence)
        self.cached = [cell for cell in self.cached if cell[2]]

    def decode_arrays(
        self,
        tokens: NDArray[Any],
        positions: NDArray[Any],
        sequences: NDArray[Any],
        wanted: NDArray[Any],
        counts: NDArray[Any] | None = None,
    ) -> NDArray[np.float32]:
        assert 0 < len(tokens) <= self.n_batch
        counts = np.ones(len(tokens), dtype=int) if counts is None else counts
        assert counts.sum() == len(sequences)
        out, start = [], 0
        coupled: dict[int, set[int]] = {}
        for token, position, count, want in zip(tokens, positions, counts, wanted, strict=True):
            owners = set(sequences[start : start + count].tolist())
            start += count
            assert len(owners) == count and max(owners) < MAX_LEVELS + MOST_LEAVES
            for owner in owners:
                assert len(self._of(owner)) == position, "a token that does not follow"
                # llama.cpp lets the set of sequences that share a token only shrink along the path.
                assert coupled.setdefault(owner, owners) >= owners
                coupled[owner] = owners
            self.cached.append((int(token), int(position), owners))
            assert len(self.cached) <= self.cells
            if want:
                # Attention looks at the cells of the first sequence of a row.
                path = [t for _, t in self._of(min(owners))]
                out.append(np.eye(N_VOCAB, dtype=np.float32)[hashed(path)])
        self.batches.append(len(tokens))
        return np.array(out, dtype=np.float32).reshape(-1, N_VOCAB)


def hashed(path: Sequence[int]) -> int:
    value = 7
    for token in path:
        value = (value * 31 + token) % N_VOCAB
    return value


def tree_of(contexts: Sequence[Context], seen: list[tuple[Context, int]]) -> Tree:
    def note(context: Context, logits: NDArray[np.float32]) -> None:
        seen.append((context, int(logits.argmax())))

    return Tree(longest_paths(contexts), {context: [note] for context in contexts})


CONTEXT = st.lists(st.integers(0, 3), min_size=1, max_size=14).map(tuple)
QUESTION = st.tuples(CONTEXT, st.lists(CONTEXT, min_size=1, max_size=5))


@settings(deadline=None)
# Ways that part before the shortest of them ends.
@example([((0,), [(0, 0)]), ((0,), [(0, 0, 0)]), ((0,), [(0, 0), (1, 0)])], (0,) * 7, 20)
@given(st.lists(QUESTION, min_size=1, max_size=12), CONTEXT, st.integers(20, 90))
def test_each_context_gets_the_logits_of_its_own_path(
    questions: list[tuple[Context, list[Context]]], common: Context, most_rows: int
) -> None:
    seen: list[list[tuple[Context, int]]] = [[] for _ in questions]
    wanted = [sorted({common * 2 + own + tail for tail in tails}) for own, tails in questions]
    groups = plan_groups([tree_of(*pair) for pair in zip(wanted, seen, strict=True)], most_rows, MOST_LEAVES)
    run_trees(Books(cells_of(groups)), groups)  # type: ignore[arg-type]
    for contexts, found in zip(wanted, seen, strict=True):
        assert sorted(found) == [(context, hashed(context)) for context in contexts]


def draft_questions(drafts: int, questions: int) -> list[list[Context]]:
    """Return the wanted contexts of a small grid: instructions, a draft, a question, two paths on."""
    return [
        [(*[9] * 30, *[d] * 15, q, *[8] * 9), (*[9] * 30, *[d] * 15, q, *[8] * 9, 7, 7)]
        for d in range(1, drafts + 1)
        for q in range(1, questions + 1)
    ]


def run_on_books(grid: list[list[Context]], most_rows: int) -> list[int]:
    seen: list[tuple[Context, int]] = []
    groups = plan_groups([tree_of(contexts, seen) for contexts in grid], most_rows, MOST_LEAVES)
    books = Books(cells_of(groups), n_batch=2048)
    run_trees(books, groups)  # type: ignore[arg-type]
    assert sorted(seen) == sorted((context, hashed(context)) for contexts in grid for context in contexts)
    return books.batches


def test_a_large_draft_has_its_prefix_decoded_once_and_its_questions_in_equal_batches() -> None:
    batches = run_on_books(draft_questions(2, 20), 100)
    assert batches[0] == 30 and batches.count(15) == 2
    questions = [n for n in batches if n not in (30, 15)]
    assert sum(questions) == 2 * 20 * 12 and len(questions) == 6 and min(questions) >= 72


def test_small_drafts_share_a_batch_with_their_prefixes_in_it() -> None:
    batches = run_on_books(draft_questions(6, 2), 200)
    assert batches == [30, *[pytest.approx(6 * 39 / 2, abs=20)] * 2]
    assert run_on_books(draft_questions(2, 2), 200) == [30 + 2 * 39]


def test_equal_prompts_are_decoded_once() -> None:
    assert run_on_books(draft_questions(1, 1) * 3, 200) == [30 + 15 + 12]


def test_more_ways_than_sequences_are_decoded_in_turn() -> None:
    contexts = [(*[3] * 20, *divmod(n, 90)) for n in range(400)]
    seen: list[tuple[Context, int]] = []
    trees = [tree_of(contexts[i : i + MOST_LEAVES], seen) for i in range(0, 400, MOST_LEAVES)]
    groups = plan_groups(trees, 512, MOST_LEAVES)
    run_trees(Books(cells_of(groups), n_batch=2048), groups)  # type: ignore[arg-type]
    assert sorted(seen) == sorted((context, hashed(context)) for context in contexts)


def test_a_prompt_longer_than_a_batch_is_decoded_in_pieces() -> None:
    seen: list[tuple[Context, int]] = []
    contexts = [(*range(90), n) for n in (1, 2)]
    groups = plan_groups([tree_of(contexts, seen)], 40, MOST_LEAVES)
    books = Books(cells_of(groups), n_batch=40)
    run_trees(books, groups)  # type: ignore[arg-type]
    assert sorted(seen) == [(context, hashed(context)) for context in contexts]
    assert max(books.batches) <= 40
