"""Which failures of a server are worth another attempt, and how long to wait before it.

Waits are drawn with full jitter (uniform between zero and an exponentially growing
bound), so that many clients that failed together do not come back together. A
``Retry-After`` of the server is a floor under the wait.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeVar

import tenacity

from arte_edge.errors import EngineError

__all__ = ["Breaker", "CallFailed", "RetryPolicy", "Transient", "is_transient", "retry_after_s", "run"]

T = TypeVar("T")


class Transient(Exception):
    """An attempt failed in a way that the next one may not. `wait_s` is what the server asked for."""

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
    patience_s: float = 120.0  # a Retry-After beyond this ends the call: nobody sits through an hour

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


def run(
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


class Breaker:
    """Stops sending once it is plain that nothing will come back.

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
            # A refusal of this one row (its prompt is too long, say) tells nothing about the server.
            self._failed += error.status == 0
            if error.fatal or self._failed >= self._limit:
                self.tripped = self.tripped or error
