"""How long a lost connection is waited for: a wireless link comes back in seconds, a rebooting board in a minute."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from arte_edge.device.ssh_errors import ConnectionLost

__all__ = ["WAITS_S", "Patience"]

T = TypeVar("T")

# Two and a half minutes in all: a Raspberry Pi answers about 40 s after a reboot began.
WAITS_S: tuple[float, ...] = (1, 2, 4, 8, 15, 30, 30, 30, 30)


class Patience:
    """Tries again after a lost connection; every step forward restores the patience."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._failures = 0
        self._marks: dict[str, int] = {}

    def reached(self, what: str, mark: int) -> None:
        """Count the failures anew if `what` is further than it was."""
        if mark > self._marks.get(what, -1):
            self._marks[what] = mark
            self._failures = 0

    def keep_trying(self, step: Callable[[], T]) -> T:
        """Return ``step()``, called again after every `ConnectionLost` until the patience is at its end.

        Raises:
            ConnectionLost: the last one.
        """
        from tenacity import RetryCallState, Retrying, retry_if_exception_type

        def count(state: RetryCallState) -> None:  # tenacity calls `after` first, then `wait`, then `stop`
            self._failures += 1

        def is_over(state: RetryCallState) -> bool:
            return self._failures > len(WAITS_S)

        def wait_s(state: RetryCallState) -> float:
            return WAITS_S[min(self._failures, len(WAITS_S)) - 1]

        def tell(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, ConnectionLost):
                self._say(f"{error.message}; trying again in {wait_s(state):g} s")

        kept = Retrying(
            retry=retry_if_exception_type(ConnectionLost),
            after=count,
            wait=wait_s,
            stop=is_over,
            before_sleep=tell,
            reraise=True,
        )
        return kept(step)
