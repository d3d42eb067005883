"""Draws repeat, and splits are filled evenly with different rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shipped_tasks.draw import SIZES, Draw, fill, quotas
from tiny import Patch

from arte_edge.tasks.task import Example


def test_a_seed_gives_the_same_draws_for_ever() -> None:
    draw = Draw(7)
    assert [draw.integer(1, 6) for _ in range(6)] == [2, 1, 4, 1, 4, 3]
    assert draw.shuffled("abcd") == ["c", "a", "d", "b"]


@given(st.integers(), st.lists(st.integers(), min_size=1, max_size=9))
def test_a_sample_takes_different_places(seed: int, options: list[int]) -> None:
    draw = Draw(seed)
    assert sorted(draw.shuffled(options)) == sorted(options)
    assert draw.pick(options) in options
    assert len(draw.sample(options, len(options) - 1)) == len(options) - 1


def test_quotas_are_even_and_complete() -> None:
    assert quotas("abc", 8) == {"a": 3, "b": 3, "c": 2}


def test_filling_gives_full_splits_without_a_repeated_stem() -> None:
    draw = Draw(1)

    def make(label: str) -> tuple[str, Example]:
        n = draw.integer(0, 999)
        return str(n), Example(f"{n} in words {draw.integer(0, 9)}", str(n % 2 == 0))

    splits = fill(make, ("True", "False"), draw)
    assert {split: len(rows) for split, rows in splits.items()} == SIZES
    stems = [row.input.split()[0] for rows in splits.values() for row in rows]
    assert len(set(stems)) == len(stems)


def test_a_generator_that_is_too_narrow_says_so(monkeypatch: Patch) -> None:
    monkeypatch.setattr("shipped_tasks.draw._MAX_TRIES", 50)
    with pytest.raises(RuntimeError, match="the generator is too narrow"):
        fill(lambda label: ("same", Example("same", label)), ("a", "b"), Draw(0))
