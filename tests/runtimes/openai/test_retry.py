import threading
import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.runtimes.openai.client import (
    CallFailed,
    CircuitBreaker,
    RetryPolicy,
    Transient,
    is_transient,
    retry_after_s,
    run_with_retries,
)


def attempts(*outcomes):
    """An attempt that goes through `outcomes`; exceptions are raised."""
    left = list(outcomes)

    def attempt():
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return attempt


def test_only_failures_that_may_pass_are_tried_again():
    assert [status for status in range(400, 600) if is_transient(status)] == [
        408,
        409,
        425,
        429,
        *range(500, 600),
    ]


def test_the_first_success_is_returned_and_every_retry_is_heard_of():
    heard = []
    found = run_with_retries(
        RetryPolicy(base_s=0.001),
        attempts(Transient("one"), Transient("two"), "answer"),
        where="here",
        stop=threading.Event(),
        on_retry=heard.append,
    )
    assert found == "answer" and [str(failure) for failure in heard] == ["one", "two"]


def test_a_final_failure_is_raised_as_it_is():
    with pytest.raises(CallFailed, match="no"):
        run_with_retries(
            RetryPolicy(),
            attempts(CallFailed("no", status=400)),
            where="here",
            stop=threading.Event(),
            on_retry=lambda failure: pytest.fail("retried"),
        )


def test_stopping_ends_a_long_wait_and_all_attempts():
    stop, tried = threading.Event(), []

    def attempt():
        tried.append(time.monotonic())
        raise Transient("busy", wait_s=60.0)

    threading.Timer(0.1, stop.set).start()
    with pytest.raises(CallFailed):
        run_with_retries(
            RetryPolicy(attempts=1000), attempt, where="here", stop=stop, on_retry=lambda failure: None
        )
    assert len(tried) <= 2 and tried[-1] - tried[0] < 30


@given(st.integers(1, 40), st.none() | st.floats(0, 100))
def test_waits_are_jittered_bounded_and_never_shorter_than_the_server_asks(attempt, asked_s):
    policy = RetryPolicy(base_s=0.5, longest_s=8.0)
    wait_s = policy.wait_s(attempt, asked_s)
    if asked_s is None:
        assert 0 <= wait_s <= min(8.0, 0.5 * 2 ** (attempt - 1))
    else:
        assert asked_s <= wait_s <= asked_s + 1.0


def test_jitter_reaches_down_to_nothing_and_up_to_the_bound():
    waits = [RetryPolicy(base_s=1.0, longest_s=4.0).wait_s(9, None) for _ in range(400)]
    assert min(waits) < 0.4 and max(waits) > 3.6


@pytest.mark.parametrize(
    ("text", "seconds"), [("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("", None), ("soon", None), ("nan", 0.0)]
)
def test_retry_after_in_seconds(text, seconds):
    assert retry_after_s({"retry-after": text}) == seconds


def test_retry_after_as_a_date():
    assert retry_after_s({"retry-after": formatdate(time.time() + 30, usegmt=True)}) == pytest.approx(
        30, abs=2
    )
    assert retry_after_s({"retry-after": formatdate(time.time() - 30, usegmt=True)}) == 0.0
    assert retry_after_s({}) is None


@given(st.text(max_size=30))
def test_no_header_breaks_the_reader(text):
    found = retry_after_s({"retry-after": text})
    assert found is None or found >= 0


def test_a_breaker_trips_on_failures_in_a_row_and_on_fatal_ones():
    lost, refused = CallFailed("no answer"), CallFailed("too long", status=400)
    breaker = CircuitBreaker(limit=3)
    for outcome in (lost, lost, None, lost, lost, refused, refused):
        breaker.succeeded() if outcome is None else breaker.failed(outcome)
    assert breaker.tripped is None
    breaker.failed(lost)
    assert breaker.tripped is lost
    breaker = CircuitBreaker(limit=3)
    breaker.failed(CallFailed("wrong key", status=401, fatal=True))
    assert breaker.tripped is not None
