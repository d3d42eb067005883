"""A proposal is what came after the same few tokens the last time, and grows and shrinks with its luck."""

from hypothesis import given
from hypothesis import strategies as st

from arte_edge.runtimes.transformers.packed_generate import NgramIndex, PromptLookup


def test_a_text_that_repeats_its_prompt_is_proposed_from_it() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 1, 2], NgramIndex())
    assert lookup.propose() == [3, 4, 5, 6]


def test_the_longest_end_that_is_known_decides_and_the_latest_of_its_places() -> None:
    lookup = PromptLookup([1, 2, 3, 9, 2, 4, 5, 1, 2], NgramIndex())
    assert lookup.propose()[0] == 3, "'1 2' before the '2' alone, which came later"
    lookup = PromptLookup([1, 2, 3, 1, 2, 4, 1, 2], NgramIndex())
    assert lookup.propose()[0] == 4


def test_what_a_neighbour_wrote_is_proposed_where_the_own_text_knows_nothing() -> None:
    shared = NgramIndex()
    neighbour = PromptLookup([1, 2], shared)
    neighbour.add([30, 31, 32, 33])
    assert PromptLookup([8, 30, 31], shared).propose() == [32, 33]
    assert PromptLookup([30, 31, 7, 7, 30, 31], shared).propose()[:2] == [7, 7], "its own first"
    assert PromptLookup([8, 9], shared).propose() == []


def test_a_wrong_proposal_makes_the_next_one_shorter_and_right_ones_make_it_longer() -> None:
    prompt = [*range(1, 30), 1]
    lookup = PromptLookup(prompt, NgramIndex())
    assert lookup.propose() == [2, 3, 4, 5]
    lookup.add([2, 3, 4, 5, 6])
    assert lookup.propose() == [7, 8, 9, 10, 11]
    lookup.add([7, 20])
    assert lookup.propose() == [21, 22]
    lookup.add([5])
    assert lookup.propose() == [6]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.lists(st.integers(0, 3), max_size=60))
def test_every_proposal_followed_its_end_before(prompt: list[int], text: list[int]) -> None:
    lookup, tokens, written = PromptLookup(prompt, NgramIndex()), list(prompt), list(text)
    while written:
        proposal = lookup.propose()
        assert len(proposal) <= 8
        if proposal:
            places = [i for i in range(1, len(tokens)) if tokens[i - 1] == tokens[-1]]
            assert any(tokens[i : i + len(proposal)] == proposal for i in places)
        right = next((i for i, (a, b) in enumerate(zip(proposal, written, strict=False)) if a != b), len(proposal))
        taken, written = written[: right + 1], written[right + 1 :]
        lookup.add(taken)
        tokens += taken
