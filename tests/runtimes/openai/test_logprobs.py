import numpy as np
import pytest
from tiny import choose, opened

from arte_edge.errors import EngineError


def expected_scores(model, contexts, choices, start, end):
    """What `choose` must give: the sum over the choice's tokens `start:end` after the context."""
    scores = []
    for context in contexts:
        row = []
        for choice in choices:
            before, row_sum = model.tokens(context), 0.0
            for i, token in enumerate(model.tokens(choice)[:end]):
                row_sum += model.log_probability(before, token) if i >= start else 0.0
                before = [*before, token]
            row.append(row_sum)
        scores.append(row)
    return scores


@pytest.mark.parametrize(
    ("echo", "ends_at_once"), [("right", False), ("shifted", False), ("off", False), ("off", True)]
)
@pytest.mark.parametrize(
    ("choices", "start", "end"),
    [((" True", " False"), 0, 1), (("(A)", "(B)", "(C)"), 1, 2), (("(A)",), 0, 3)],
)
def test_choices_are_scored_however_it_echoes(serve, tiny_model, echo, ends_at_once, choices, start, end):
    model = tiny_model(echo=echo, ends_at_once=ends_at_once)
    suffixes = ["yes one.", "no two.", "no."]
    engine = opened(serve(model))
    scores = choose(engine, "one two. ", suffixes, choices)
    assert engine._scorer._echoes is (echo == "right")
    contexts = ["one two. " + suffix for suffix in suffixes]
    assert scores == pytest.approx(np.array(expected_scores(model, contexts, choices, start, end)))


def test_a_choice_outside_the_candidates_counts_as_the_least_of_them(serve, tiny_model):
    model = tiny_model(echo="off")
    scores = choose(opened(serve(model)), "one", [""], ["maybe", " True"])
    values = [model.log_probability(model.tokens("one"), word) for word in model.vocabulary]
    assert scores[0, 0] == pytest.approx(min(values))


def test_scoring_is_refused_clearly_where_it_cannot_be_done(serve, tiny_model):
    with pytest.raises(EngineError, match="chat mode"):
        choose(opened(serve(), mode="chat"), "a", ["b"], ["c", "d"])
    with pytest.raises(EngineError, match="no log-probabilities"):
        choose(opened(serve(tiny_model(logprobs=False))), "a", ["b"], ["c", "d"])
