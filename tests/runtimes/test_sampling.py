"""Drawing tokens: greedy, sampled with a generator of the request's own, and loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.runtimes import sampling
from arte_edge.runtimes.choice_scoring import log_softmax_at
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.sampling import Repeats, draw, in_loop, request_rng

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))


def frequencies(settings: Sampling, n: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(0)
    drawn = [draw(LOGITS, settings, rng) for _ in range(n)]
    return np.bincount(drawn, minlength=4) / n


def test_temperature_0_is_the_most_likely_token_and_draws_nothing() -> None:
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert draw(LOGITS, Sampling(temperature=0.0), rng) == 0
    assert rng.bit_generator.state == before


def test_temperatures_and_top_p() -> None:
    assert frequencies(Sampling(temperature=1.0)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    weights = np.sqrt([0.5, 0.3, 0.15, 0.05])
    assert frequencies(Sampling(temperature=2.0)) == pytest.approx(weights / weights.sum(), abs=0.03)
    assert frequencies(Sampling(temperature=1.0, top_p=0.7)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert frequencies(Sampling(temperature=1.0, top_p=0.01))[0] == 1.0


@given(st.lists(st.floats(0, 30), min_size=1, max_size=40), st.floats(0.01, 0.999))
def test_leaving_out_what_is_least_likely_changes_no_nucleus(nats: list[float], top_p: float) -> None:
    weight = np.exp(-np.array(nats))
    order = np.argsort(-weight, kind="stable")
    wanted = order[: int(np.searchsorted(np.cumsum(weight[order]) / weight.sum(), top_p)) + 1]
    assert sampling._nucleus(weight, top_p).tolist() == wanted.tolist()


def test_a_token_that_is_masked_is_never_drawn() -> None:
    masked = np.array([-np.inf, 0.0, -np.inf, 0.0], dtype=np.float32)
    rng = np.random.default_rng(0)
    assert {draw(masked, Sampling(temperature=1.0), rng) for _ in range(200)} == {1, 3}


def test_a_generator_belongs_to_prompt_seed_and_sample() -> None:
    def first(prompt: str, sample: int = 0, seed: int = 0) -> float:
        return float(request_rng(Request(prompt, sample), Sampling(seed=seed)).random())

    assert first("a") == first("a")
    others = [first("a"), first("b"), first("a", sample=1), first("a", seed=1)]
    assert len(set(others)) == 4


def test_log_probabilities_are_those_of_the_whole_vocabulary() -> None:
    assert log_softmax_at(LOGITS + 100, [2, 0]) == pytest.approx(np.log([0.15, 0.5]), abs=1e-4)


@pytest.mark.parametrize("period", [1, 3, 7, 32])
def test_a_phrase_said_again_and_again_is_a_loop(period: int) -> None:
    tokens = list(range(100, 150)) + list(range(period)) * (128 // period + 4)
    assert in_loop(tokens)


def test_what_only_looks_like_a_loop_is_none() -> None:
    assert not in_loop([])
    assert not in_loop(list(range(200)))
    assert not in_loop([5] * 20)  # "no, no, no" is still a text
    assert not in_loop([*list(range(10)) * 10, 99])  # the loop was left
    assert not in_loop(list(range(40)) * 4)  # longer than any phrase looked for
    assert not in_loop(list(range(10)) * 3)  # three times is emphasis


LINE = 9  # the token that ends a line
ZEROS = np.zeros(10, dtype=np.float32)


def penalties(prompt: list[int], written: list[int]) -> dict[int, float]:
    repeats = Repeats(prompt, 0.8, lambda token: token == LINE)
    for token in written:
        repeats.push(token)
    lessened = repeats.lessened(ZEROS)
    assert not ZEROS.any()
    return {int(token): float(-lessened[token]) for token in np.flatnonzero(lessened)}


def test_the_longer_a_phrase_repeats_the_less_likely_its_next_token() -> None:
    prompt = [1, 2, 3, 4, 5, LINE]
    assert penalties(prompt, [1]) == {}
    assert penalties(prompt, [1, 2]) == pytest.approx({3: 0.8})
    assert penalties(prompt, [1, 2, 3]) == pytest.approx({4: 0.8 * 1.75})
    assert penalties(prompt, [1, 2, 3, 4]) == pytest.approx({5: 0.8 * 1.75**2})
    assert penalties(prompt, [1, 2, 3, 6]) == {}
    assert penalties(prompt, [7, 2, 3]) == pytest.approx({4: 0.8})
    # A text's own phrases count as well, and of several places the longest match does.
    assert penalties([LINE], [1, 2, 3, LINE, 1, 2]) == pytest.approx({3: 0.8})
    assert penalties(prompt, [7, 2, 3, 4, LINE, 1, 2, 3]) == pytest.approx({4: 0.8 * 1.75})


def test_what_spans_lines_and_what_the_prompt_says_often_is_free() -> None:
    assert penalties([1, LINE, 2, 3, 4], [LINE, 2]) == {}
    assert penalties([1, 2, LINE], [1, 2]) == {}  # a line may end where another did
    often = [1, 2, 3, 4, LINE, 1, 2, 3, 5, LINE, 1, 2, 3, 6, LINE]
    assert penalties(often, [1, 2]) == {}
    assert penalties(often, [1, 2, 3]) == pytest.approx(dict.fromkeys((4, 5, 6), 0.8 * 1.75))
    assert penalties(often[5:], [1, 2]) == pytest.approx({3: 0.8})
