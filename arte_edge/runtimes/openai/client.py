"""One OpenAI-compatible server: address, key, and calls with retries and rate limits.

*Key*: it comes from the environment and goes into one header. It is in no message, log or repr; should a server's
error text repeat it, it is cut out.

*Retries*: waits are drawn with full jitter (uniform between zero and an exponentially growing bound), so that clients
that failed together do not come back together. A ``Retry-After`` of the server is a minimum of the wait.

*Limits*: a sliding window of 60 seconds, as servers count; a token bucket that starts full lets twice as much through.
"""

from __future__ import annotations

import ipaddress
import itertools
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from arte_edge import __version__
from arte_edge.errors import EngineError, InputError
from arte_edge.files import json_loads
from arte_edge.runtimes.openai.schema import token_counts

T = TypeVar("T")

_OVERLOADED = (
    "Look at the server's log. If it is overloaded, lower teacher.parallel or set teacher.requests_per_minute; "
    "if it is slow, raise teacher.timeout_s."
)
_ADDRESS = "Check the address (it usually ends in /v1), the model's name and the mode."


class Transient(Exception):
    """An attempt failed, and the next one may succeed: at most so many `attempts`, 0 for the policy's.

    `wait_s` is the server's Retry-After.
    """

    def __init__(
        self, reason: str, wait_s: float | None = None, *, hint: str = _OVERLOADED, attempts: int = 0, text: str = ""
    ) -> None:
        super().__init__(reason)
        self.wait_s, self.hint, self.attempts, self.text = wait_s, hint, attempts, text


class CallFailed(EngineError):
    """A call failed for good. `fatal`: every other call to this server would fail the same way.

    `status` is the HTTP status that ended it, 0 when retries ran out or no answer came; `text` the server's own,
    empty if it said none.
    """

    def __init__(self, message: str, hint: str = "", *, status: int = 0, fatal: bool = False, text: str = "") -> None:
        super().__init__(message, hint)
        self.status, self.fatal, self.text = status, fatal, text


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
    except (ValueError, OverflowError):
        return None


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

    prompt_usd_per_million: float
    completion_usd_per_million: float

    def cost_usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        prompt, completion = self.prompt_usd_per_million, self.completion_usd_per_million
        return (prompt_tokens * prompt + completion_tokens * completion) / 1e6


KEY_VARIABLES = ("ARTE_EDGE_API_KEY", "OPENAI_API_KEY")

# These end a whole batch: every other row would fail as well.
_FATAL = frozenset({401, 402, 403, 404, 405, 410})
# Some refuse a prompt that their filter flags as they refuse a wrong key.
_FLAGGED = re.compile(r"moderation|flagged|content.?(filter|policy)|guardrail", re.IGNORECASE)
# What answers are that are no JSON, by how they begin, and how often they are asked for (0: as the policy says)
_NO_JSON = {"<": ("a page instead of an answer", 0), "data:": ("a stream of events instead of an answer", 1)}
_HALF = ("an answer that is no whole JSON document", 3)
_SHOWN = 300  # characters of a server's error text in a message


def check_base_url(url: str) -> httpx.URL:
    """Return the address with a path; a bare ``http://host:port`` gets ``/v1``.

    Raises InputError: not http(s), no host, or a password, query or fragment in it.
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
    """Sends JSON to one server, with retries and limits. Safe to use from many threads."""

    def __init__(
        self, base_url: str, *, timeout_s: float, retry: RetryPolicy, limiter: RateLimiter, key: str = "", uds: str = ""
    ) -> None:
        """`key`: of this server; empty: the environment's. `uds`: the Unix socket that it listens on; empty: a port."""
        self.url = check_base_url(base_url)
        self.stop = threading.Event()
        self._retry, self._limiter, self._timeout_s = retry, limiter, timeout_s
        self._loopback = _is_loopback(self.url.host)
        self._variable, key = ("", key) if key else self._find_key()
        self._redact: Callable[[str], str] = lambda text: text.replace(key, "***") if key else text
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout_s, connect=min(10.0, timeout_s), pool=None),
            limits=limits,
            transport=httpx.HTTPTransport(uds=uds, limits=limits) if uds else None,
            headers={"User-Agent": f"arte-edge/{__version__}", **({"Authorization": f"Bearer {key}"} if key else {})},
            trust_env=not self._loopback,  # a proxy cannot reach this machine's loopback
        )

    def close(self) -> None:
        self.stop.set()
        self._client.close()

    def responds(self) -> bool:
        """Return whether the server answers at all, asked once."""
        try:
            return self._client.get(f"{self.url}/models").status_code < 500
        except httpx.HTTPError:
            return False

    def call(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        read: Callable[[Any], T] = lambda document: document,
        tokens: int = 0,
        *,
        plain: bool = False,
    ) -> T:
        """Send `body`, or get what is at `path`, and return what `read` makes of the JSON answer.

        `tokens` is the expected size of prompt and answer, for the rate limits. `stop` ends all waits and attempts.
        A `plain` answer is text.

        Raises CallFailed: for good, or as often as the policy says; a ValueError of `read` is tried once more.
        """
        url = f"{self.url}{path}"
        for tries in itertools.count(1):
            ticket = self._limiter.acquire(tokens) if tokens else Ticket(0.0, 0)
            if self.stop.is_set():
                break
            try:
                document: Any = self._attempt(url, body, plain)
                prompt_tokens, written, *_ = token_counts(document)
                if prompt_tokens:
                    self._limiter.settle(ticket, prompt_tokens + written)
                try:
                    return read(document)
                except ValueError as error:
                    shown = self._redact(str(document))[:80]
                    raise Transient(
                        f"an answer that is no completion, {error}: {shown}", attempts=2, text=shown
                    ) from error
            except Transient as error:
                asked_s, most = error.wait_s or 0.0, error.attempts or self._retry.attempts
                if tries >= min(most, self._retry.attempts) or asked_s > self._retry.patience_s:
                    asked = f"; it asks to wait {asked_s:.0f} s" if asked_s else ""
                    often = f"{tries} time{'s' if tries > 1 else ''}"
                    raise CallFailed(
                        f"{url} failed {often}, the last time with: {error}{asked}", error.hint, text=error.text
                    ) from error
                self._limiter.hold(asked_s)
                self.stop.wait(self._retry.wait_s(tries, error.wait_s))
        raise CallFailed(f"{url}: not sent, the engine is stopping", fatal=True)

    def _attempt(self, url: str, body: Mapping[str, Any] | None, plain: bool) -> Any:
        try:
            answer = self._client.request("GET" if body is None else "POST", url, json=body)
        except httpx.TimeoutException as error:
            raise Transient(f"no answer within {self._timeout_s:g} s ({type(error).__name__})") from error
        except httpx.RequestError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise CallFailed(f"{url}: {error}", "Check the server's certificate.", fatal=True) from error
            raise Transient(self._redact(f"{type(error).__name__}: {error}")) from error
        text = self._redact(answer.text)
        if answer.status_code != 200:
            raise self._failure(url, answer.status_code, text, retry_after_s(answer.headers))
        if plain:
            return text
        shown = " ".join(text.split())[:80]
        try:
            document = json_loads(answer.content)
        except ValueError as error:
            # A page is what a gateway shows while the server starts; half an answer may have been billed.
            what, attempts = next(
                (found for start, found in _NO_JSON.items() if text.lstrip().startswith(start)), _HALF
            )
            raise Transient(f"{what}: {shown!r}", hint=_ADDRESS, attempts=attempts) from error
        failure = document.get("error") if isinstance(document, dict) else None
        if failure or (isinstance(document, dict) and document.get("object") == "error"):
            # Gateways in front of several providers report failures like this.
            code = (failure if isinstance(failure, dict) else document).get("code")
            raise self._failure(url, code if isinstance(code, int) and 400 <= code < 600 else 500, text, None)
        return document

    def _failure(self, url: str, status: int, text: str, wait_s: float | None) -> Transient | CallFailed:
        """Return the error to raise for an HTTP status other than 200."""
        shown = self._redact(_error_text(text))  # again: it may have been escaped in the JSON
        if is_transient(status) and "insufficient_quota" not in text:
            return Transient(f"{status}: {shown}", wait_s, text=text)
        hint = ""
        if status in (401, 403):
            found = f"it was read from {self._variable}" if self._variable else "neither is set"
            hint = f"The key is looked for in {' and then '.join(KEY_VARIABLES)}: {found}."
            if not self._loopback and self.url.scheme == "http":
                hint += f" {KEY_VARIABLES[1]} is never sent over plain http to another machine."
        elif status in (404, 405):
            hint = _ADDRESS
        elif 300 <= status < 400:
            hint = "The address redirects; give the address that it leads to."
        fatal = (status in _FATAL or status < 400 or is_transient(status)) and not _FLAGGED.search(text)
        return CallFailed(f"{url} answered {status}: {shown}", hint, status=status, fatal=fatal, text=text)

    def _find_key(self) -> tuple[str, str]:
        """Return the variable that holds the key, and the key; both empty if there is none."""
        for variable in KEY_VARIABLES:
            key = os.environ.get(variable, "").strip()
            # The OpenAI key of a shell profile is not meant for whatever plain-http host is named here.
            plain = variable == "OPENAI_API_KEY" and self.url.scheme == "http" and not self._loopback
            if key and not plain:
                if not (key.isascii() and key.isprintable()):
                    raise InputError(f"{variable}: the key holds characters that no header may", "Copy it again.")
                return variable, key
        return "", ""


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
