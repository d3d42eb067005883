"""The HTTP client: addresses and keys, retries, rate limits, what is counted and what it costs."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.errors import InputError
from arte_edge.runtimes.openai.client import (
    CallFailed,
    CircuitBreaker,
    Prices,
    RateLimiter,
    RetryPolicy,
    Server,
    Transient,
    Usage,
    UsageMeter,
    check_base_url,
    is_transient,
    retry_after_s,
    run_with_retries,
)


def server(url):
    return Server(url, timeout_s=1.0, retry=RetryPolicy(), limiter=RateLimiter(), meter=UsageMeter())


def test_an_address_without_a_path_gets_the_usual_one():
    assert str(check_base_url("http://127.0.0.1:8000")) == "http://127.0.0.1:8000/v1"
    assert str(check_base_url("https://host/api/v1/")) == "https://host/api/v1"


@pytest.mark.parametrize("url", ["ftp://host/v1", "host:8000", "http://", "", "http://[::1", "a b"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(InputError):
        check_base_url(url)


@pytest.mark.parametrize(
    "url", ["https://user:s3cret@host/v1", "https://host/v1?key=s3cret", "https://host/#s3cret"]
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(url):
    with pytest.raises(InputError, match="ARTE_EDGE_API_KEY") as caught:
        check_base_url(url)
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
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    assert ("authorization" in server(url)._client.headers) is sent
    monkeypatch.setenv("ARTE_EDGE_API_KEY", "meant for it")
    assert server(url)._client.headers["authorization"] == "Bearer meant for it"


def test_no_key_no_header():
    assert "authorization" not in server("https://anywhere.example/v1")._client.headers


def test_only_failures_that_may_pass_are_tried_again():
    transient = [status for status in range(400, 600) if is_transient(status)]
    assert transient == [408, 409, 425, 429, *range(500, 600)]


def run(attempt, *, on_retry=lambda failure: None, stop=None, **policy):
    settings = {"where": "here", "stop": stop or threading.Event(), "on_retry": on_retry}
    return run_with_retries(RetryPolicy(**policy), attempt, **settings)


def test_the_first_success_is_returned_and_every_retry_is_reported():
    outcome = Mock(side_effect=[Transient("one"), Transient("two"), "answer"])
    heard = []
    assert run(outcome, on_retry=heard.append, base_s=0.001) == "answer"
    assert [str(failure) for failure in heard] == ["one", "two"]


def test_a_final_failure_is_raised_as_it_is():
    outcome = Mock(side_effect=CallFailed("no", status=400))
    with pytest.raises(CallFailed, match="no"):
        run(outcome)
    assert outcome.call_count == 1


def test_stopping_ends_a_long_wait_and_all_attempts():
    stop, tried = threading.Event(), []

    def attempt():
        tried.append(time.monotonic())
        raise Transient("busy", wait_s=60.0)

    threading.Timer(0.1, stop.set).start()
    with pytest.raises(CallFailed):
        run(attempt, stop=stop, attempts=1000)
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
    for seconds, expected in ((30, pytest.approx(30, abs=2)), (-30, 0.0)):
        assert retry_after_s({"retry-after": formatdate(time.time() + seconds, usegmt=True)}) == expected
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


def test_counts_from_many_threads_add_up():
    meter = UsageMeter(Prices(prompt_usd_per_million=1.0, completion_usd_per_million=4.0))

    def count(_):
        meter.request()
        meter.retry()
        meter.tokens(3, 2)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(500)))
    usage = meter.usage
    assert (usage.requests, usage.retries) == (500, 500)
    assert (usage.prompt_tokens, usage.completion_tokens) == (1500, 1000)
    assert usage.cost_usd == pytest.approx((1500 * 1.0 + 1000 * 4.0) / 1e6)


def test_without_prices_nothing_costs():
    meter = UsageMeter()
    meter.tokens(10, 10)
    assert meter.usage == Usage(prompt_tokens=10, completion_tokens=10)
