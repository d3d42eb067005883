"""A guess is what came after the same few tokens the last time, and grows and shrinks with its luck."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arte_edge.runtimes.transformers.packed_generate import Guesser, Memory


def test_a_text_that_repeats_its_prompt_is_guessed_from_it() -> None:
    guesser = Guesser([1, 2, 3, 4, 5, 6, 7, 1, 2], Memory())
    assert guesser.guess() == [3, 4, 5, 6]


def test_the_longest_end_that_is_known_decides_and_the_latest_of_its_places() -> None:
    guesser = Guesser([1, 2, 3, 9, 2, 4, 5, 1, 2], Memory())
    assert guesser.guess()[0] == 3, "'1 2' before the '2' alone, which came later"
    guesser = Guesser([1, 2, 3, 1, 2, 4, 1, 2], Memory())
    assert guesser.guess()[0] == 4


def test_what_a_neighbour_wrote_is_guessed_where_the_own_text_knows_nothing() -> None:
    shared = Memory()
    neighbour = Guesser([1, 2], shared)
    neighbour.add([30, 31, 32, 33])
    assert Guesser([8, 30, 31], shared).guess() == [32, 33]
    assert Guesser([30, 31, 7, 7, 30, 31], shared).guess()[:2] == [7, 7], "its own first"
    assert Guesser([8, 9], shared).guess() == []


def test_a_wrong_guess_makes_the_next_one_shorter_and_right_ones_make_it_longer() -> None:
    prompt = [*range(1, 30), 1]
    guesser = Guesser(prompt, Memory())
    assert guesser.guess() == [2, 3, 4, 5]
    guesser.add([2, 3, 4, 5, 6])
    assert guesser.guess() == [7, 8, 9, 10, 11]
    guesser.add([7, 20])
    assert guesser.guess() == [21, 22]
    guesser.add([5])
    assert guesser.guess() == [6]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.lists(st.integers(0, 3), max_size=60))
def test_every_guess_followed_its_end_before(prompt: list[int], text: list[int]) -> None:
    guesser, tokens, written = Guesser(prompt, Memory()), list(prompt), list(text)
    while written:
        guess = guesser.guess()
        assert len(guess) <= 8
        if guess:
            places = [i for i in range(1, len(tokens)) if tokens[i - 1] == tokens[-1]]
            assert any(tokens[i : i + len(guess)] == guess for i in places)
        right = next((i for i, (a, b) in enumerate(zip(guess, written, strict=False)) if a != b), len(guess))
        taken, written = written[: right + 1], written[right + 1 :]
        guesser.add(taken)
        tokens += taken
