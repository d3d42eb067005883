"""The rate of the next step, from what the steps before did."""

import pytest

from arte_edge.distill.train.kl_target import next_rate


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])  # KL after a distance of 1: how easily the model moves
@pytest.mark.parametrize("n_step", [8, 20, 300])
def test_where_kl_grows_with_the_square_of_the_distance_the_last_step_arrives(scale: float, n_step: int) -> None:
    target, done = 0.1, list[tuple[float, float]]()
    for step in range(n_step):
        rate = next_rate(done, n_step - step, 1e-3 / scale**0.5, target)
        travelled = sum(one for one, _ in done) + rate
        done.append((rate, scale * travelled**2))
    assert done[-1][1] == pytest.approx(target, rel=1e-6) == max(kl for _, kl in done)
    rates = [rate for rate, _ in done]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_nothing_measured_yet_lets_the_rate_rise_and_beyond_the_target_it_is_zero() -> None:
    assert next_rate([], 9, 2e-5, 0.1) == 2e-5
    assert next_rate([(2e-5, 0.0)], 8, 2e-5, 0.1) == pytest.approx(6e-5)
    assert next_rate([(2e-5, 1e-9), (6e-5, 1e-8)], 7, 2e-5, 0.1) == pytest.approx(18e-5)
    assert next_rate([(1e-3, 0.2)], 8, 2e-5, 0.1) == 0.0
