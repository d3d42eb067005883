from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from arte_edge.distill.train.common import training_order


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=80),
    st.integers(1, 9),
    st.floats(0.1, 3.5),
    st.integers(0, 5),
)
def test_every_example_is_seen_as_often_as_any_other(
    lengths: list[int], batch_size: int, epochs: float, seed: int
) -> None:
    order = training_order(lengths, batch_size, epochs, seed)
    assert len(order) == max(1, round(len(lengths) * epochs))
    seen = Counter(order)
    counts = [seen[i] for i in range(len(lengths))]
    assert max(counts) - min(counts) <= 1
    assert order == training_order(lengths, batch_size, epochs, seed)


def test_batches_hold_like_lengths_and_come_in_random_order() -> None:
    lengths = [(i * 37) % 200 + 1 for i in range(64)]
    order = training_order(lengths, 8, 1.0, 0)
    batches = [order[i : i + 8] for i in range(0, 64, 8)]
    padded = sum(8 * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest != sorted(longest)
    assert training_order(lengths, 8, 1.0, 1) != order
