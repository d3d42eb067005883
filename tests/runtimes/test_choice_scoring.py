import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.runtimes.choice_scoring import spans


def test_the_tokens_that_count():
    assert spans([[1, 2, 8], [1, 2, 9]], [1, 2]) == [(2, 3), (2, 3)]
    assert spans([list("Q(A)"), list("Q(B)")], list("Q")) == [(2, 3), (2, 3)]
    assert spans([["a", "bT"], ["a", "bF"]], ["a", "b"]) == [(1, 2), (1, 2)]
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
