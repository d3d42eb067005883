"""What a server was asked for and what it cost, counted as it happens.

Prices are the user's: they change too often to be shipped. Tokens are the server's
own figures; an attempt that broke off before its figures arrived is not in them,
although the server may still bill it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

__all__ = ["Meter", "Prices", "Usage"]


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


class Meter:
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
