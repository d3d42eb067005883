from hypothesis import given
from hypothesis import strategies as st

from arte_edge.runtimes.transformers.model import plan, shared_prefix

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=30)


@given(ROWS, st.integers(0, 8), st.integers(10, 200))
def test_every_row_is_in_one_batch_and_no_batch_is_too_large(rows, new_tokens, batch_tokens):
    batches = plan(rows, new_tokens, batch_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        size = len(batch) * (max(len(rows[i]) for i in batch) + new_tokens)
        assert size <= batch_tokens or len(batch) == 1


def test_rows_of_long_prefixes_are_not_mixed():
    prefixes = [[k] * 300 for k in range(3)]
    rows = [[*prefixes[i % 3], 7, i] for i in range(30)]
    assert [{i % 3 for i in batch} for batch in plan(rows, 10, 10**6)] == [{0}, {1}, {2}]


def test_rows_without_a_prefix_fill_one_batch():
    rows = [[i, *range(50)] for i in range(40)]
    assert len(plan(rows, 10, 10**6)) == 1


@given(ROWS.map(lambda rows: [[5] * 8 + row for row in rows]))
def test_a_shared_prefix_is_shared_and_leaves_each_row_a_token(rows):
    n = shared_prefix(rows)
    assert all(row[:n] == rows[0][:n] and len(row) > n for row in rows)
    if n and all(len(row) > n + 1 for row in rows):
        assert len({row[n] for row in rows}) > 1, "it could be longer"


def test_too_short_a_prefix_is_not_worth_sharing():
    assert shared_prefix([[1, 2, 3, 4], [1, 2, 3, 5]]) == 0
    assert shared_prefix([]) == shared_prefix([[1] * 50]) == 0
