"""Client-side rate limits: never more than so many requests and tokens in any 60 seconds.

A sliding window and not a token bucket: a bucket that starts full lets twice the
limit through in its first minute, and servers count exactly that minute.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["RateLimiter", "Ticket"]

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
        """Charge an admitted request with the tokens it really took."""
        with self._lock:
            ticket.tokens = tokens

    def hold(self, seconds: float) -> None:
        """Let nothing out for so long: the server said when to come back, and meant every thread."""
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
