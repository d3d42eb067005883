"""One OpenAI-compatible server: its address, its key, and calls that survive its bad moments.

The key comes from the environment and goes into one header. It is in no message,
log or repr; should a server's error text repeat it, it is cut out.
"""

from __future__ import annotations

import ipaddress
import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import httpx

from arte_edge import __version__
from arte_edge.engines.limits import RateLimiter, Ticket
from arte_edge.engines.retry import CallFailed, RetryPolicy, Transient, is_transient, retry_after_s, run
from arte_edge.engines.usage import Meter
from arte_edge.errors import InputError

__all__ = ["KEY_VARIABLES", "Server", "check_base_url"]

T = TypeVar("T")

KEY_VARIABLES = ("ARTE_EDGE_API_KEY", "OPENAI_API_KEY")

# These end a whole batch: no other row would fare better.
_FATAL = frozenset({401, 402, 403, 404, 405, 410})
_SHOWN = 300  # characters of a server's own words in a message


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
        # Not shown: what stands there may be a secret.
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
        self, base_url: str, *, timeout_s: float, retry: RetryPolicy, limiter: RateLimiter, meter: Meter
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
            trust_env=not self._loopback,  # a proxy of the environment cannot reach our loopback
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
            # Before `read`, which may refuse it: it is paid for all the same.
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

        return run(self._retry, attempt, where=url, stop=self.stop, on_retry=on_retry)

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
            raise self._refusal(url, answer.status_code, answer.text, retry_after_s(answer.headers))
        try:
            document = json.loads(answer.content)
            failure = document.get("error") if isinstance(document, dict) else None
            if isinstance(failure, dict):
                # Gateways in front of several providers pass failures on like this.
                code = failure.get("code")
                raise self._refusal(url, code if isinstance(code, int) else 500, answer.text, None)
            return read(document)
        except ValueError as error:
            what = self._redact(answer.text[:80])
            raise Transient(f"an answer that is no completion ({type(error).__name__}): {what!r}") from error

    def _refusal(self, url: str, status: int, text: str, wait_s: float | None) -> Transient | CallFailed:
        """Return the error to raise for an HTTP status other than 200."""
        words = self._redact(_said(text))
        if is_transient(status) and "insufficient_quota" not in text:
            return Transient(f"{status}: {words}", wait_s)
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
        return CallFailed(f"{url} answered {status}: {words}", hint, status=status, fatal=fatal)

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


def _said(text: str) -> str:
    """Return the message in an error body, whichever of the usual shapes it has."""
    try:
        document = json.loads(text)
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
