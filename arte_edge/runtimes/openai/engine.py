"""The engine for OpenAI-compatible servers: vLLM, llama-server, llama-cpp-python, a cloud.

Two modes. `completions` sends the rendered prompt as it is; `chat` sends messages and leaves the template to the
server (a prompt is then the JSON document that `arte_edge.runtimes.prompt_render` makes). Rows are sent sorted by
prompt, so that those that share a prefix arrive together and hit the server's prefix cache.

A row whose call fails is a completion with finish "error". An error that affects every row (a wrong key, an unknown
model) is raised, unless something was answered before it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import EngineError, InputError, nearest
from arte_edge.runtimes.completion import Completion, EngineIdentity, Request, Sampling
from arte_edge.runtimes.openai import schema
from arte_edge.runtimes.openai.client import (
    CallFailed,
    CircuitBreaker,
    Prices,
    RateLimiter,
    RetryPolicy,
    Server,
    Usage,
    UsageMeter,
)
from arte_edge.runtimes.openai.logprobs import LogprobScorer
from arte_edge.runtimes.openai.schema import ServerQuirks, quirks_of
from arte_edge.runtimes.prompt_render import CHAT_JSON

__all__ = ["OpenAIEngine", "parse_ref"]

T = TypeVar("T")
R = TypeVar("R")

_PATHS: dict[schema.Mode, str] = {"completions": "/completions", "chat": "/chat/completions"}
_BYTES_PER_TOKEN = 4.0  # of English text, until the server's own counts are known


def parse_ref(ref: str) -> tuple[str, str]:
    """Return model and base address of ``openai:model@https://host/v1``. (InputError: not of that form.)"""
    kind, _, rest = ref.partition(":")
    model, _, url = rest.rpartition("@")  # a model's own name may hold an @
    if kind != "openai" or not model or "://" not in url:
        raise InputError(f"'{ref}' names no server", "Write it like openai:my-model@http://127.0.0.1:8000/v1")
    return model, url


class OpenAIEngine:
    """An `Engine` over one model of one server."""

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        mode: Literal["auto", "completions", "chat"] = "auto",
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        max_concurrency: int = 8,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        timeout_s: float = 120.0,
        retry: RetryPolicy | None = None,
        prices: Prices | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Connect, check that the server has the model, and find out the mode.

        `chat_template` and `special_tokens` are for instruct models in completions mode,
        where the template is rendered on this side. `extra` is added to every request.

        Raises:
            InputError: an address that is none, or a model that the server does not list.
            CallFailed: the server does not answer or refuses the key.
        """
        self._model, self._concurrency = model, max_concurrency
        self._meter = UsageMeter(prices)
        self._template, self._special = chat_template, dict(special_tokens or {})
        self._seen_bytes, self._seen_tokens = _BYTES_PER_TOKEN, 1.0  # of prompts, to learn their ratio
        limiter = RateLimiter(requests_per_minute, tokens_per_minute)
        self._server = Server(
            base_url, timeout_s=timeout_s, retry=retry or RetryPolicy(), limiter=limiter, meter=self._meter
        )
        try:
            self._quirks = self._look_up_model()
            if extra:
                self._quirks = replace(self._quirks, extra={**self._quirks.extra, **extra})
            self._mode: schema.Mode = self._find_mode() if mode == "auto" else mode
        except BaseException:
            self._server.close()
            raise
        self._scorer = LogprobScorer(self._score_call, self._many, self._quirks.candidates)

    def __repr__(self) -> str:
        return f"OpenAIEngine({self._model!r}, {str(self._server.url)!r}, mode={self._mode!r})"

    @property
    def identity(self) -> EngineIdentity:
        return EngineIdentity(kind="openai", model=self._model, runtime=self._quirks.name)

    @property
    def mode(self) -> schema.Mode:
        return self._mode

    @property
    def usage(self) -> Usage:
        """Requests, tokens and cost since the engine was opened."""
        return self._meter.usage

    @property
    def chat_template(self) -> str | None:
        return CHAT_JSON if self._mode == "chat" else self._template

    @property
    def special_tokens(self) -> dict[str, str]:
        return dict(self._special)

    @property
    def supports_grammar(self) -> bool:
        return self._quirks.grammar

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine.complete`. A failed row has finish "error" and the reason.

        Raises:
            CallFailed: every call would fail the same way (key, model, address) and none was answered.
            InputError: a grammar for a server that takes none, or a raw prompt for a chat endpoint.
        """
        if sampling.grammar and not self.supports_grammar:
            raise InputError(
                f"The server at {self._server.url} does not support grammars",
                "Use a local GGUF model or llama-server, or leave the grammar out.",
            )
        bodies = [
            schema.body(
                self._model,
                self._mode,
                self._quirks,
                request,
                sampling,
                self._special.get("bos_token", ""),
            )
            for request in requests
        ]
        breaker = CircuitBreaker(limit=max(8, 2 * self._concurrency))

        def one(index: int) -> Completion:
            if breaker.tripped is not None:
                return Completion("", "error", error=f"not sent, because before it {breaker.tripped.message}")
            try:
                completion = self._call(requests[index], bodies[index], sampling)
            except CallFailed as error:
                breaker.failed(error)
                return Completion("", "error", error=str(error))
            breaker.succeeded()
            return completion

        order = sorted(range(len(requests)), key=lambda i: (requests[i].prompt, requests[i].sample))
        done = dict(zip(order, self._many(one, order), strict=True))
        rows = [done[i] for i in range(len(requests))]
        self._learn_token_size(requests, rows)
        if breaker.tripped is not None and breaker.tripped.fatal and all(row.error for row in rows):
            raise breaker.tripped
        return rows

    def choose_each(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]]
    ) -> list[NDArray[np.float64]]:
        """See `Engine.choose_each`; how a server is made to score: `arte_edge.runtimes.openai.logprobs`.

        Raises:
            EngineError: chat mode, a server that gives no log-probabilities, or a call that failed.
        """
        if self._mode == "chat":
            raise EngineError(
                f"{self._server.url} was opened in chat mode, which cannot score a given answer",
                "Open it with mode completions (vLLM, llama-server), or score by generating.",
            )
        same: dict[tuple[str, ...], list[int]] = {}  # prompts with the same choices share calls
        for i, own in enumerate(choices):
            same.setdefault(tuple(own), []).append(i)
        found: dict[int, NDArray[np.float64]] = {}
        for options, members in same.items():
            scores = self._scorer.choose([prompts[i] for i in members], options)
            found |= zip(members, scores, strict=True)
        return [found[i] for i in range(len(prompts))]

    def count_tokens(self, text: str) -> int:
        """Return the server's count where it has a call for that, else an estimate from the text's bytes."""
        if self._mode == "chat" and text.startswith("{"):
            text = "\n".join(message["content"] for message in schema.messages_of(text))
        if self._quirks.tokenize is not None:
            path, text_key, count_key = self._quirks.tokenize
            try:
                found = self._server.post_beside(path, {"model": self._model, text_key: text})[count_key]
                return found if isinstance(found, int) else len(found)
            except (CallFailed, KeyError, TypeError):
                self._quirks = replace(self._quirks, tokenize=None)
        return self._estimate(text)

    def close(self) -> None:
        self._server.close()

    def _estimate(self, text: str) -> int:
        return math.ceil(len(text.encode()) * self._seen_tokens / self._seen_bytes)

    def _learn_token_size(self, requests: Sequence[Request], rows: Sequence[Completion]) -> None:
        for request, row in zip(requests, rows, strict=True):
            if row.prompt_tokens:
                self._seen_bytes += len(request.prompt.encode())
                self._seen_tokens += row.prompt_tokens

    def _call(self, request: Request, body: Mapping[str, Any], sampling: Sampling) -> Completion:
        def read(answer: Any) -> Completion:
            return schema.completion(answer, self._mode, self._quirks, request, sampling)

        expected = self._estimate(request.prompt) + sampling.max_tokens
        return self._server.post(_PATHS[self._mode], body, read, tokens=expected)

    def _score_call(self, body: Mapping[str, Any]) -> schema.Answer:
        document = {"model": self._model, "temperature": 0.0, "max_tokens": 1, **self._quirks.extra, **body}
        return self._server.post(
            _PATHS["completions"],
            document,
            schema.Answer.model_validate,
            tokens=self._estimate(str(body["prompt"])) + 1,
        )

    def _many(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Return ``[function(item)]`` from `max_concurrency` threads, started in the order of `items`."""
        self._server.stop.clear()
        pool = ThreadPoolExecutor(max_workers=self._concurrency)
        try:
            return list(pool.map(function, items))
        except BaseException:
            self._server.stop.set()  # Ctrl-C: wake what waits for its next attempt
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _look_up_model(self) -> ServerQuirks:
        host = self._server.url.host
        try:
            document = self._server.get("/models")
        except CallFailed as error:
            if error.status in (400, 404, 405):
                return quirks_of(host, "")  # some servers keep no list
            raise
        entries = document.get("data") if isinstance(document, dict) else document
        listed = {
            str(entry["id"]): str(entry.get("owned_by", ""))
            for entry in (entries if isinstance(entries, list) else [])
            if isinstance(entry, dict) and "id" in entry
        }
        if listed and self._model not in listed:
            raise InputError(
                f"{self._server.url} serves no model named '{self._model}'", nearest(self._model, listed)
            )
        return quirks_of(host, listed.get(self._model, ""))

    def _find_mode(self) -> schema.Mode:
        """Ask for one token: chat if the server can, since it knows the template, else completions."""
        if self._template is not None:
            return "completions"
        probes: dict[schema.Mode, str] = {
            "chat": json.dumps({"messages": [{"content": "Hi", "role": "user"}]}),
            "completions": "Hi",
        }
        failures = []
        for mode, prompt in probes.items():
            request, sampling = Request(prompt), Sampling(max_tokens=1)
            body = schema.body(self._model, mode, self._quirks, request, sampling)
            try:
                self._server.post(_PATHS[mode], body, schema.Answer.model_validate, tokens=2)
                return mode
            except CallFailed as error:
                if error.status in (401, 402, 403):
                    raise
                failures.append(f"{mode}: {error.message}")
        raise CallFailed(
            f"{self._server.url} offers neither chat nor completions for '{self._model}'", "\n".join(failures)
        )
