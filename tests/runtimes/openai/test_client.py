"""The HTTP client: addresses and keys, retries, rate limits, and what is counted."""

import threading
import time
from email.utils import formatdate
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.errors import InputError
from arte_edge.runtimes.openai.client import (
    CallFailed,
    CircuitBreaker,
    RateLimiter,
    RetryPolicy,
    Server,
    Transient,
    check_base_url,
    is_transient,
    retry_after_s,
)


def server(url):
    return Server(url, timeout_s=1.0, retry=RetryPolicy(), limiter=RateLimiter())


def test_one_server_has_one_address():
    for url in ("https://host/v1", "https://host", "HTTPS://Host:443/v1/", "https://host/"):
        assert str(check_base_url(url)) == "https://host/v1"
    assert str(check_base_url("http://127.0.0.1:8000/api")) == "http://127.0.0.1:8000/api"


@pytest.mark.parametrize("url", ["ftp://host/v1", "host:8000", "http://", "", "http://[::1", "a b"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(InputError):
        check_base_url(url)


@pytest.mark.parametrize("rest", ["user:s3cret@host/v1", "host/v1?key=s3cret", "host/#s3cret"])
def test_a_secret_in_an_address_is_refused_and_not_repeated(rest):
    with pytest.raises(InputError, match="ARTE_EDGE_API_KEY") as caught:
        check_base_url(f"https://{rest}")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://anywhere.example/v1", True),
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://anywhere.example/v1", False),
        ("http://10.0.0.7:8000/v1", False),
    ],
)
def test_the_openai_key_never_goes_over_plain_http_to_another_machine(monkeypatch, url, sent):
    assert "authorization" not in server(url)._client.headers
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    assert ("authorization" in server(url)._client.headers) is sent
    monkeypatch.setenv("ARTE_EDGE_API_KEY", "meant for it")
    assert server(url)._client.headers["authorization"] == "Bearer meant for it"


@pytest.mark.parametrize("key", ["sk-naïve", "sk-two\nlines"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY") as caught:
        server("https://anywhere.example/v1")
    assert "sk-" not in repr([caught.value, caught.value.__cause__, caught.value.__context__])


def test_only_failures_that_may_pass_are_tried_again():
    transient = [status for status in range(400, 600) if is_transient(status)]
    assert transient == [408, 409, 425, 429, *range(500, 600)]


def run(attempt, stop=None, **policy):
    client = Server("http://here", timeout_s=1.0, retry=RetryPolicy(**policy), limiter=RateLimiter())
    client._attempt, client.stop = lambda *_: attempt(), stop or client.stop
    return client.call("/models")


@pytest.mark.parametrize(
    ("failures", "calls"),
    [
        ([Transient("no"), Transient("no")], 3),
        ([CallFailed("no", status=400)] * 2, 1),
        ([Transient("no", attempts=2)] * 9, 2),
        ([Transient("no")] * 9, 4),
    ],
)
def test_a_failure_is_tried_as_often_as_it_may_pass(failures, calls):
    outcome = Mock(side_effect=[*failures, "answer"])
    if len(failures) < calls:
        assert run(outcome, attempts=4, base_s=0.001) == "answer"
    else:
        with pytest.raises(CallFailed, match="no"):
            run(outcome, attempts=4, base_s=0.001)
    assert outcome.call_count == calls


def test_stopping_ends_a_long_wait_and_all_attempts():
    stop, tried = threading.Event(), []

    def attempt():
        tried.append(time.monotonic())
        raise Transient("busy", wait_s=60.0)

    threading.Timer(1.0, stop.set).start()
    with pytest.raises(CallFailed):
        run(attempt, stop, attempts=1000)
    assert len(tried) <= 2 and tried[-1] - tried[0] < 30


@given(st.integers(1, 40), st.none() | st.floats(0, 100))
def test_waits_are_bounded_and_never_shorter_than_the_server_asks(attempt, asked_s):
    wait_s = RetryPolicy(base_s=0.5, longest_s=8.0).wait_s(attempt, asked_s)
    low, high = (0, min(8.0, 0.5 * 2 ** (attempt - 1))) if asked_s is None else (asked_s, asked_s + 1.0)
    assert low <= wait_s <= high


def test_retry_after_in_seconds_and_as_a_date():
    cases = {"3": 3.0, "0.5": 0.5, "-1": 0.0, "": None, "soon": None, "nan": 0.0, "1e999": float("inf")}
    for seconds, expected in ((30, pytest.approx(30, abs=2)), (-30, 0.0)):
        cases[formatdate(time.time() + seconds, usegmt=True)] = expected
    assert {text: retry_after_s({"retry-after": text}) for text in cases} == cases
    assert retry_after_s({}) is None


@given(st.text(max_size=30) | st.dates().map(lambda day: f"Mon, {day:%d %b %Y} 00:00:00 +2359"))
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


class Clock:
    """Time that passes only while someone sleeps."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def limiter(*limits):
    clock = Clock()
    return clock, RateLimiter(*limits, clock=clock, sleep=clock.sleep)


@given(
    st.integers(1, 5),
    st.integers(10, 100),
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 40)), min_size=1, max_size=30),
)
def test_no_window_of_60_seconds_holds_more_than_the_limits(n_requests, n_tokens, calls):
    clock, limits = limiter(n_requests, n_tokens)
    sent = []
    for tokens, pause_s in calls:
        clock.now += pause_s
        sent.append((limits.acquire(tokens).at_s, tokens))
    for at_s, _ in sent:
        window = [tokens for other_s, tokens in sent if at_s <= other_s < at_s + 59.999]
        assert len(window) <= n_requests
        assert sum(window) <= n_tokens or len(window) == 1


def test_waits_no_longer_than_it_must_and_charges_what_was_used():
    clock, limits = limiter(2)
    times = []
    for pause_s in (0, 10, 0, 0, 0):
        clock.now += pause_s
        times.append(limits.acquire(1).at_s - 1000.0)
    assert times == pytest.approx([0, 10, 60, 70, 120])
    _, limits = limiter(None, 100)
    limits.settle(limits.acquire(90), 20)
    assert limits.acquire(80).at_s == 1000.0


def test_a_hold_is_for_everyone_and_no_limit_is_no_wait():
    _, limits = limiter()
    assert [limits.acquire(10**9).at_s for _ in range(50)] == [1000.0] * 50
    limits.hold(7.0)
    limits.hold(3.0)
    assert limits.acquire(1).at_s == pytest.approx(1007.0)
