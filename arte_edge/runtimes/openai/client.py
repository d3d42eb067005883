"""One OpenAI-compatible server: address, key, and calls with retries, rate limits and usage counts.

*Key*: it comes from the environment and goes into one header. It is in no message, log or repr; should a server's
error text repeat it, it is cut out.

*Retries*: waits are drawn with full jitter (uniform between zero and an exponentially growing bound), so that clients
that failed together do not come back together. A ``Retry-After`` of the server is a minimum of the wait.

*Limits*: a sliding window and not a token bucket, since a bucket that starts full lets twice the limit through in its
first minute, and servers count exactly that minute.

*Usage*: tokens are the server's own counts; an attempt that broke off before they arrived is not included, although
the server may still bill it. Prices are the user's: they change too often to be shipped.
"""

from __future__ import annotations

import ipaddress
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
import tenacity

from arte_edge import __version__
from arte_edge.errors import EngineError, InputError
from arte_edge.files import json_loads

__all__ = ["KEY_VARIABLES", "CallFailed", "CircuitBreaker", "Prices", "RateLimiter", "RetryPolicy", "Server"]
__all__ += ["Ticket", "Transient", "Usage", "UsageMeter", "check_base_url", "is_transient", "retry_after_s"]
__all__ += ["run_with_retries"]

T = TypeVar("T")


class Transient(Exception):
    """An attempt failed, and the next one may succeed. `wait_s` is the server's Retry-After."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class CallFailed(EngineError):
    """A call failed for good. `fatal`: every other call to this server would fail the same way.

    `status` is the HTTP status that ended it, 0 when retries ran out or no answer came.
    """

    def __init__(self, message: str, hint: str = "", *, status: int = 0, fatal: bool = False) -> None:
        super().__init__(message, hint)
        self.status = status
        self.fatal = fatal


@dataclass(frozen=True)
class RetryPolicy:
    """How often to try, and the bounds of the waits in seconds."""

    attempts: int = 6
    base_s: float = 0.5
    longest_s: float = 30.0
    patience_s: float = 120.0  # a longer Retry-After ends the call

    def wait_s(self, attempt: int, asked_s: float | None) -> float:
        """Return the wait after failed attempt number `attempt` (from 1)."""
        bound = min(self.longest_s, self.base_s * 2.0 ** (attempt - 1))
        if asked_s is None:
            return random.uniform(0.0, bound)
        return asked_s + random.uniform(0.0, min(bound, 1.0))


def is_transient(status: int) -> bool:
    """Return whether an HTTP status is worth another attempt: 408, 409, 425, 429 and 5xx."""
    return status in (408, 409, 425, 429) or status >= 500


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds a ``Retry-After`` header asks for (a number or an HTTP date), None if unreadable."""
    text = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def run_with_retries(
    policy: RetryPolicy,
    attempt: Callable[[], T],
    *,
    where: str,
    stop: threading.Event,
    on_retry: Callable[[Transient], None],
) -> T:
    """Call `attempt` until it does not raise `Transient`.

    `on_retry` hears of every failure that is followed by another attempt. Setting
    `stop` ends all waits and attempts at once.

    Raises:
        CallFailed: attempts, or the patience for the server's Retry-After, ran out.
    """

    def wait(state: tenacity.RetryCallState) -> float:
        return policy.wait_s(state.attempt_number, failure(state).wait_s)

    def impatient(state: tenacity.RetryCallState) -> bool:
        return (failure(state).wait_s or 0.0) > policy.patience_s

    def failure(state: tenacity.RetryCallState) -> Transient:
        error = state.outcome.exception() if state.outcome else None
        return error if isinstance(error, Transient) else Transient("")

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Transient),
        wait=wait,
        stop=lambda state: state.attempt_number >= policy.attempts or stop.is_set() or impatient(state),
        sleep=tenacity.sleep_using_event(stop),
        before_sleep=lambda state: on_retry(failure(state)),
        reraise=True,
    )
    try:
        return retrying(attempt)
    except Transient as error:
        tries = retrying.statistics.get("attempt_number", 1)
        asked = f"; it asks to wait {error.wait_s:.0f} s" if error.wait_s else ""
        raise CallFailed(
            f"{where} failed {tries} time{'s' if tries > 1 else ''}, the last time with: {error}{asked}",
            "Look at the server's log; lower max_concurrency or set requests_per_minute if it is overloaded.",
        ) from error


class CircuitBreaker:
    """Stops sending once the server is clearly gone.

    Trips on a fatal failure, or on `limit` failed calls in a row: a thousand rows
    against a dead server would otherwise wait through a thousand rounds of retries.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._failed = 0
        self._lock = threading.Lock()
        self.tripped: CallFailed | None = None

    def succeeded(self) -> None:
        with self._lock:
            self._failed = 0

    def failed(self, error: CallFailed) -> None:
        with self._lock:
            # An error of this one row (for example a prompt that is too long) says nothing about the server.
            self._failed += error.status == 0
            if error.fatal or self._failed >= self._limit:
                self.tripped = self.tripped or error


_WINDOW_S = 60.0


@dataclass
class Ticket:
    """One admitted request: when it went out and the tokens it is charged with."""

    at_s: float
    tokens: int


class RateLimiter:
    """Admits requests from many threads; a limit of None is no limit."""

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._requests = float("inf") if requests_per_minute is None else requests_per_minute
        self._tokens = float("inf") if tokens_per_minute is None else tokens_per_minute
        self._clock, self._sleep = clock, sleep
        self._window: deque[Ticket] = deque()
        self._held_until_s = float("-inf")
        self._lock = threading.Lock()

    def acquire(self, tokens: int) -> Ticket:
        """Block until a request of `tokens` (prompt and answer, expected) may go out.

        A request above the whole limit waits for an empty window and then goes alone.
        """
        while True:
            with self._lock:
                now = self._clock()
                wait_s = self._wait_s(now, tokens)
                if wait_s <= 0:
                    ticket = Ticket(now, tokens)
                    self._window.append(ticket)
                    return ticket
            self._sleep(wait_s)

    def settle(self, ticket: Ticket, tokens: int) -> None:
        """Charge an admitted request with the tokens it actually used."""
        with self._lock:
            ticket.tokens = tokens

    def hold(self, seconds: float) -> None:
        """Send nothing for so long: a Retry-After applies to every thread."""
        with self._lock:
            self._held_until_s = max(self._held_until_s, self._clock() + seconds)

    def _wait_s(self, now: float, tokens: int) -> float:
        while self._window and now - self._window[0].at_s >= _WINDOW_S:
            self._window.popleft()
        wait_s = self._held_until_s - now
        count, charged = len(self._window), sum(ticket.tokens for ticket in self._window)
        for ticket in self._window:  # oldest first: wait until enough of them have left
            if count < self._requests and charged + tokens <= self._tokens:
                break
            wait_s = max(wait_s, ticket.at_s + _WINDOW_S - now)
            count, charged = count - 1, charged - ticket.tokens
        return wait_s


@dataclass(frozen=True)
class Prices:
    """US dollars for a million tokens."""

    prompt_usd_per_million: float = 0.0
    completion_usd_per_million: float = 0.0

    def cost_usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (
            prompt_tokens * self.prompt_usd_per_million + completion_tokens * self.completion_usd_per_million
        ) / 1e6


@dataclass(frozen=True)
class Usage:
    """Totals since the engine was opened. HTTP attempts in all: ``requests + retries``."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0


class UsageMeter:
    """Adds up a `Usage` from many threads."""

    def __init__(self, prices: Prices | None = None) -> None:
        self._prices = prices or Prices()
        self._usage = Usage()
        self._lock = threading.Lock()

    @property
    def usage(self) -> Usage:
        return self._usage

    def request(self) -> None:
        with self._lock:
            self._usage = replace(self._usage, requests=self._usage.requests + 1)

    def retry(self) -> None:
        with self._lock:
            self._usage = replace(self._usage, retries=self._usage.retries + 1)

    def tokens(self, prompt_tokens: int, completion_tokens: int) -> None:
        with self._lock:
            self._usage = replace(
                self._usage,
                prompt_tokens=self._usage.prompt_tokens + prompt_tokens,
                completion_tokens=self._usage.completion_tokens + completion_tokens,
                cost_usd=self._usage.cost_usd + self._prices.cost_usd(prompt_tokens, completion_tokens),
            )


KEY_VARIABLES = ("ARTE_EDGE_API_KEY", "OPENAI_API_KEY")

# These end a whole batch: every other row would fail as well.
_FATAL = frozenset({401, 402, 403, 404, 405, 410})
_SHOWN = 300  # characters of a server's error text in a message


def check_base_url(url: str) -> httpx.URL:
    """Return the address with a path; a bare ``http://host:port`` gets ``/v1``.

    Raises:
        InputError: not http(s), no host, or a password, query or fragment in it.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InputError(f"'{url}' is not an address: {error}") from error
    if parsed.userinfo or parsed.query or parsed.fragment:
        # Not shown: it may contain a secret.
        raise InputError(
            f"The server address for {parsed.host} may hold no password, query or fragment",
            f"Give the key in the environment variable {KEY_VARIABLES[0]}.",
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"'{url}' is not a server address", "Write it like http://127.0.0.1:8000/v1")
    path = parsed.path.rstrip("/")
    return parsed.copy_with(path=path or "/v1")


class Server:
    """Sends JSON to one server, with retries, limits and counts. Safe to use from many threads."""

    def __init__(
        self, base_url: str, *, timeout_s: float, retry: RetryPolicy, limiter: RateLimiter, meter: UsageMeter
    ) -> None:
        self.url = check_base_url(base_url)
        self.stop = threading.Event()
        self._retry, self._limiter, self._meter, self._timeout_s = retry, limiter, meter, timeout_s
        self._loopback = _is_loopback(self.url.host)
        self._variable, key = self._find_key()
        self._redact: Callable[[str], str] = lambda text: text.replace(key, "***") if key else text
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout_s, connect=min(10.0, timeout_s), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            headers={
                "User-Agent": f"arte-edge/{__version__}",
                **({"Authorization": f"Bearer {key}"} if key else {}),
            },
            trust_env=not self._loopback,  # a proxy cannot reach this machine's loopback
        )

    def __repr__(self) -> str:
        return f"Server({str(self.url)!r})"

    def close(self) -> None:
        self.stop.set()
        self._client.close()

    def get(self, path: str) -> Any:
        """Return the JSON behind `path` (below the base address). Raises `CallFailed`."""
        return self._call("GET", f"{self.url}{path}", None, lambda document: document)

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], T], *, tokens: int) -> T:
        """Send `body` and return what `read` makes of the JSON answer; a ValueError of `read` is retried.

        `tokens` is the expected size of prompt and answer, for the rate limit. Raises `CallFailed`.
        """
        self._meter.request()
        ticket = Ticket(0.0, 0)

        def before() -> None:
            nonlocal ticket
            ticket = self._limiter.acquire(tokens)

        def counted(document: Any) -> T:
            # Before `read`, which may reject it: it is billed all the same.
            prompt_tokens, completion_tokens = _token_counts(document)
            self._meter.tokens(prompt_tokens, completion_tokens)
            if prompt_tokens:
                self._limiter.settle(ticket, prompt_tokens + completion_tokens)
            return read(document)

        return self._call("POST", f"{self.url}{path}", body, counted, before, self._meter.retry)

    def post_beside(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send `body` beside the API (``/tokenize`` and the like); not counted. Raises `CallFailed`."""
        root = str(self.url).removesuffix("/v1")
        return self._call("POST", root + path, body, lambda document: document)

    def _call(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | None,
        read: Callable[[Any], T],
        before: Callable[[], None] = lambda: None,
        retried: Callable[[], None] = lambda: None,
    ) -> T:
        def attempt() -> T:
            before()
            if self.stop.is_set():
                raise CallFailed(f"{url}: not sent, the engine is stopping", fatal=True)
            return self._attempt(method, url, body, read)

        def on_retry(failure: Transient) -> None:
            retried()
            if failure.wait_s:
                self._limiter.hold(failure.wait_s)

        return run_with_retries(self._retry, attempt, where=url, stop=self.stop, on_retry=on_retry)

    def _attempt(self, method: str, url: str, body: Mapping[str, Any] | None, read: Callable[[Any], T]) -> T:
        try:
            answer = self._client.request(method, url, json=body)
        except httpx.TimeoutException as error:
            raise Transient(f"no answer within {self._timeout_s:g} s ({type(error).__name__})") from error
        except httpx.RequestError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise CallFailed(f"{url}: {error}", "Check the server's certificate.", fatal=True) from error
            raise Transient(self._redact(f"{type(error).__name__}: {error}")) from error
        if answer.status_code != 200:
            raise self._failure(url, answer.status_code, answer.text, retry_after_s(answer.headers))
        try:
            document = json_loads(answer.content)
            failure = document.get("error") if isinstance(document, dict) else None
            if isinstance(failure, dict):
                # Gateways in front of several providers report failures like this.
                code = failure.get("code")
                raise self._failure(url, code if isinstance(code, int) else 500, answer.text, None)
            return read(document)
        except ValueError as error:
            what = self._redact(answer.text[:80])
            raise Transient(f"an answer that is no completion ({type(error).__name__}): {what!r}") from error

    def _failure(self, url: str, status: int, text: str, wait_s: float | None) -> Transient | CallFailed:
        """Return the error to raise for an HTTP status other than 200."""
        shown = self._redact(_error_text(text))
        if is_transient(status) and "insufficient_quota" not in text:
            return Transient(f"{status}: {shown}", wait_s)
        hint = ""
        if status in (401, 403):
            found = f"it was read from {self._variable}" if self._variable else "neither is set"
            hint = f"The key is looked for in {' and then '.join(KEY_VARIABLES)}: {found}."
            if not self._loopback and self.url.scheme == "http":
                hint += f" {KEY_VARIABLES[1]} is never sent over plain http to another machine."
        elif status in (404, 405):
            hint = "Check the address (it usually ends in /v1), the model's name and the mode."
        elif 300 <= status < 400:
            hint = "The address redirects; give the address that it leads to."
        fatal = status in _FATAL or status < 400 or is_transient(status)
        return CallFailed(f"{url} answered {status}: {shown}", hint, status=status, fatal=fatal)

    def _find_key(self) -> tuple[str, str]:
        """Return the variable that holds the key, and the key; both empty if there is none."""
        for variable in KEY_VARIABLES:
            key = os.environ.get(variable, "").strip()
            # The OpenAI key of a shell profile is not meant for whatever plain-http host is named here.
            plain = variable == "OPENAI_API_KEY" and self.url.scheme == "http" and not self._loopback
            if key and not plain:
                return variable, key
        return "", ""


def _token_counts(document: Any) -> tuple[int, int]:
    """Return prompt and completion tokens of an answer, zeros if it gives none."""
    usage = document.get("usage") if isinstance(document, dict) else None
    counts = usage if isinstance(usage, dict) else {}
    prompt, written = counts.get("prompt_tokens"), counts.get("completion_tokens")
    return (prompt if isinstance(prompt, int) else 0, written if isinstance(written, int) else 0)


def _error_text(text: str) -> str:
    """Return the message in an error body, whichever of the usual shapes it has."""
    try:
        document = json_loads(text)
    except ValueError:
        return " ".join(text.split())[:_SHOWN] or "(no text)"
    inner = document.get("error", document) if isinstance(document, dict) else document
    if isinstance(inner, dict):
        inner = inner.get("message") or inner.get("detail") or inner
    return str(inner)[:_SHOWN]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
