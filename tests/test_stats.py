"""The intervals and tests are those of their papers, and agree with scipy where it has them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from arte_edge.stats import (
    Interval,
    format_share,
    mcnemar,
    over_seeds_and_questions,
    pearson,
    ratio,
    t_quantile,
    wilson,
)

outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def answers(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    """The two answer lists behind a paired 2 × 2 table."""
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


# R. G. Newcombe, Stat. Med. 17 (1998) 857-872, table I, method 3.
@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 400), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_agrees_with_scipy(n: int, data: st.DataObject, level: float) -> None:
    right = data.draw(st.integers(0, n))
    expected = binomtest(right, n).proportion_ci(level, "wilson")
    found = wilson(right, n, level)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= found.low <= right / n <= found.high <= 1


@pytest.mark.parametrize(("right", "n", "level"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0), (1, 2, 0.0)])
def test_wilson_refuses_impossible_counts_and_levels(right: int, n: int, level: float) -> None:
    assert wilson(0, 0) == Interval(0.0, 1.0)  # no answers exclude nothing
    with pytest.raises(ValueError):
        wilson(right, n, level)


# The first row: Newcombe, Stat. Med. 17 (1998) 2635-2650, method 10. The others: Fagerland,
# Lydersen & Laake, Statistical Analysis of Contingency Tables (2017), chapter 8. They give a minus b.
@pytest.mark.parametrize(
    ("both", "only_a", "only_b", "neither", "low", "high"),
    [(36, 12, 2, 0, 0.0569, 0.3404), (1, 1, 7, 12, -0.5069, -0.0256), (59, 6, 16, 80, -0.1186, -0.0046)],
)
def test_mcnemar_intervals(both: int, only_a: int, only_b: int, neither: int, low: float, high: float) -> None:
    a, b = answers(both, only_a, only_b, neither)
    found = mcnemar(a, b)
    assert (found.n, found.only_a, found.only_b) == (len(a), only_a, only_b)
    assert (-found.high, -found.low) == pytest.approx((low, high), abs=5e-5)
    assert found.difference == pytest.approx((only_b - only_a) / len(a))


@given(outcomes)
def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_pairs(pairs: list[tuple[bool, bool]]) -> None:
    a, b = map(list, zip(*pairs, strict=True))
    found, other = mcnemar(a, b), mcnemar(b, a)
    discordant = found.only_a + found.only_b
    expected = binomtest(found.only_a, discordant).pvalue if discordant else 1.0
    assert found.p_value == pytest.approx(expected) and found.p_value == other.p_value
    assert -1 <= found.low <= found.difference <= found.high <= 1
    turned = (-other.high, -other.difference, -other.low)
    assert (found.low, found.difference, found.high) == pytest.approx(turned)


def test_mcnemar_of_identical_answers_finds_nothing_and_takes_thousands_of_pairs() -> None:
    found = mcnemar([True] * 30 + [False] * 10, [True] * 30 + [False] * 10)
    assert (found.p_value, found.difference) == (1.0, 0.0)
    assert found.low < 0 < found.high
    many = mcnemar(*answers(0, 1500, 1700, 0))
    assert many.p_value == pytest.approx(binomtest(1500, 3200).pvalue)


def test_the_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    # 200 questions; base 40 % right, tuned 52 %, answers correlated as two students' are.
    rng = np.random.default_rng(0)
    shares = np.array([0.32, 0.08, 0.20, 0.40])
    covered = [
        found.low <= 0.12 <= found.high
        for table in rng.multinomial(200, shares, size=1000)
        if (found := mcnemar(*answers(*table.tolist())))
    ]
    assert 0.93 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], [True, False]), ([[True]], [[True]])])
def test_mcnemar_refuses_lists_that_do_not_pair(a: list[bool], b: list[bool]) -> None:
    with pytest.raises(ValueError):
        mcnemar(a, b)


@pytest.mark.parametrize(
    ("base", "forced", "tuned", "share"),
    [
        (0.10, 0.40, 0.70, 0.5),
        (0.10, 0.10, 0.70, 0.0),
        (0.10, 0.05, 0.70, 0.0),  # forcing hurt: none of the gain is format
        (0.10, 0.80, 0.70, 1.0),  # forcing alone does more than the training did
        (0.50, 0.60, 0.50, None),
        (0.50, 0.60, 0.40, None),
    ],
)
def test_format_share(base: float, forced: float, tuned: float, share: float | None) -> None:
    assert format_share(base, forced, tuned) == (None if share is None else pytest.approx(share))


def test_pearson_is_none_where_nothing_varies_or_too_little_is_there() -> None:
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert pearson([1, 1, 1], [1, 2, 3]) is None
    assert pearson([1, 2], [1, 2]) is None


def test_the_interval_is_that_of_welchs_test() -> None:
    # R: t.test(log(c(30, 31, 33)), log(c(20, 20.5, 22, 21))) -> 95 % interval of the difference
    scipy_stats = pytest.importorskip("scipy.stats")
    x, y = np.log([20, 20.5, 22, 21]), np.log([30, 31, 33])
    interval = scipy_stats.ttest_ind(y, x, equal_var=False).confidence_interval()
    found = ratio([20, 20.5, 22, 21], [30, 31, 33])
    assert (np.log(found.low), np.log(found.high)) == pytest.approx((interval.low, interval.high), abs=1e-4)


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (30, 2.04227), (1000, 1.96234)])
def test_the_quantile_is_that_of_the_tables(freedom: float, t: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(t, rel=1e-3)


RATES = st.lists(st.floats(0.01, 1e5), min_size=2, max_size=8)


@given(RATES, RATES)
def test_the_other_way_round_is_the_reciprocal(a: list[float], b: list[float]) -> None:
    there, back = ratio(a, b), ratio(b, a)
    assert there.low <= there.value * (1 + 1e-9) and there.value <= there.high * (1 + 1e-9)
    assert there.value * back.value == pytest.approx(1)
    assert there.beyond_chance == back.beyond_chance or min(abs(there.low - 1), abs(there.high - 1)) < 1e-6


def test_an_interval_over_questions_alone_is_that_of_their_mean_however_many_seeds_answer_them() -> None:
    one = np.random.default_rng(1).choice([-1, 0, 1], 300, p=[0.1, 0.6, 0.3])
    half = 1.96 * one.std() / np.sqrt(300)
    for n_seed in (1, 4):
        mean, (low, high) = over_seeds_and_questions([np.tile(one, (n_seed, 1))])
        assert mean == pytest.approx(one.mean())
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.006)


def test_an_interval_over_seeds_alone_has_the_spread_of_their_mean() -> None:
    seeds = np.random.default_rng(2).normal(0.1, 0.05, 8)
    mean, (low, high) = over_seeds_and_questions([np.repeat(seeds[:, None], 50, axis=1)])
    half = 1.96 * seeds.std(ddof=1) / np.sqrt(8)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.006)


def test_an_interval_of_both_holds_the_true_difference_as_often_as_it_says() -> None:
    random, held = np.random.default_rng(3), 0
    for _ in range(200):
        effect = random.normal(0, 0.06, (6, 1)) + random.normal(0, 0.3, (1, 80))
        grid = random.random((6, 80)) < np.clip(0.5 + effect, 0, 1)
        _, (low, high) = over_seeds_and_questions([grid - 0.5], n_draw=400)
        held += low <= 0 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_two_tasks_count_alike_and_an_empty_one_is_an_error() -> None:
    mean, (low, high) = over_seeds_and_questions([np.ones((2, 10)), np.zeros((3, 90))])
    assert [mean, low, high] == pytest.approx([0.5] * 3)
    for grids in ([], [np.zeros((0, 5))], [np.zeros(5)]):
        with pytest.raises(ValueError):
            over_seeds_and_questions(grids)
