import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.runtimes.choice_scoring import spans


def test_one_token_choices_count_that_token():
    assert spans([[1, 2, 8], [1, 2, 9]], [1, 2]) == [(2, 3), (2, 3)]


def test_what_is_before_the_parting_and_after_standing_alone_does_not_count():
    assert spans([list("Q(A)"), list("Q(B)")], list("Q")) == [(2, 3), (2, 3)]


def test_a_seam_inside_a_token_is_before_the_choice():
    # The prompt "a b" becomes "a", "bT" or "a", "bF" together with the choices.
    assert spans([["a", "bT"], ["a", "bF"]], ["a", "b"]) == [(1, 2), (1, 2)]


def test_one_choice_counts_all_its_tokens():
    assert spans([[1, 2, 3, 4]], [1, 2]) == [(2, 4)]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=2, max_size=6, unique_by=tuple))
def test_probabilities_of_a_closed_set_add_up_to_at_most_one(choices):
    end = 9  # no choice begins another, as when each ends with its closing tag
    lists = [[5, *choice, end] for choice in choices]
    rng = np.random.default_rng(0)
    model: dict[tuple[int, ...], np.ndarray] = {}

    def probability(before, token):
        return model.setdefault(tuple(before), rng.dirichlet(np.ones(10)))[token]

    total = sum(
        np.prod([probability(tokens[:i], tokens[i]) for i in range(start, stop)])
        for tokens, (start, stop) in zip(lists, spans(lists, [5]), strict=True)
    )
    assert total <= 1 + 1e-9
