import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.runtimes.openai.client import RateLimiter


class Clock:
    """Time that passes only while someone sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@given(
    st.integers(1, 5),
    st.integers(10, 100),
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 40)), min_size=1, max_size=30),
)
def test_no_window_of_60_seconds_holds_more_than_the_limits(n_requests, n_tokens, calls):
    clock = Clock()
    limiter = RateLimiter(n_requests, n_tokens, clock=clock, sleep=clock.sleep)
    sent = []
    for tokens, pause_s in calls:
        clock.now += pause_s
        ticket = limiter.acquire(tokens)
        sent.append((ticket.at_s, tokens))
    for at_s, _ in sent:
        window = [tokens for other_s, tokens in sent if at_s <= other_s < at_s + 59.999]
        assert len(window) <= n_requests
        assert sum(window) <= n_tokens or len(window) == 1


def test_waits_no_longer_than_it_must():
    clock = Clock()
    limiter = RateLimiter(2, clock=clock, sleep=clock.sleep)
    times = []
    for pause_s in (0, 10, 0, 0, 0):
        clock.now += pause_s
        times.append(limiter.acquire(1).at_s - 1000.0)
    assert times == pytest.approx([0, 10, 60, 70, 120])


def test_a_settled_request_is_charged_with_what_it_took():
    clock = Clock()
    limiter = RateLimiter(None, 100, clock=clock, sleep=clock.sleep)
    limiter.settle(limiter.acquire(90), 20)
    assert limiter.acquire(80).at_s == 1000.0


def test_a_hold_is_for_everyone_and_no_limit_is_no_wait():
    clock = Clock()
    limiter = RateLimiter(clock=clock, sleep=clock.sleep)
    assert [limiter.acquire(10**9).at_s for _ in range(50)] == [1000.0] * 50
    limiter.hold(7.0)
    limiter.hold(3.0)
    assert limiter.acquire(1).at_s == pytest.approx(1007.0)
