"""The engine for OpenAI-compatible servers: vLLM, llama-server, llama-cpp-python, a cloud.

Two modes. `completions` sends the rendered prompt as it is; `chat` sends messages and leaves the template to the
server (a prompt is then the JSON document that `arte_edge.runtimes.prompt_render` makes). Rows are sent sorted by
prompt, so that those that share a prefix arrive together and hit the server's prefix cache.

A row whose call fails is a completion with finish "error"; what fails for every row is raised, unless something was
answered before it. A parameter that the server refuses is left out from then on; `OpenAIEngine.notes` says so.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import EngineError, InputError, nearest
from arte_edge.runtimes.completion import Completion, EngineIdentity, Request, Sampling
from arte_edge.runtimes.openai import schema
from arte_edge.runtimes.openai.client import (
    CallFailed,
    CircuitBreaker,
    RateLimiter,
    RetryPolicy,
    Server,
    check_base_url,
)
from arte_edge.runtimes.openai.schema import ServerQuirks, quirks_of
from arte_edge.runtimes.prompt_render import CHAT_JSON, CHAT_JSON_NEW_TURN
from arte_edge.runtimes.reasoning import STOPPED_INSIDE

if TYPE_CHECKING:
    from arte_edge.runtimes.transformers.tokenizer import Text

T = TypeVar("T")
R = TypeVar("R")

# Only a server that continues the begun answer goes on in the middle of a word, also with a small model.
_SENTENCE, _BEGUN, _NEXT = "My grandmother likes butterflies.", "My grandmother likes butter", "flies"
_TURN = {"role": "user", "content": f"Repeat this sentence and say nothing else: {_SENTENCE}"}
_PREFILLED = json.dumps({"messages": [_TURN, {"role": "assistant", "content": _BEGUN}]})
_PROBES: tuple[tuple[schema.Mode, str], ...] = (
    *(("chat", _PREFILLED), ("chat", json.dumps({"messages": [_TURN]}))),
    ("completions", _BEGUN),
)

_PATHS: dict[schema.Mode, str] = {"completions": "/completions", "chat": "/chat/completions"}
_BYTES_PER_TOKEN = 4.0  # of English text, until the server's own counts are known


def parse_ref(ref: str) -> tuple[str, str]:
    """Return model and base address of ``openai:model@https://host/v1``.

    Raises InputError: not of that form, or no address that `check_base_url` takes; shows no part that may be secret.
    """
    found = re.fullmatch(r"openai:(.+?)@(\w+://.*)", ref)  # a model's own name may hold an @
    if found is None:
        example = "Write it like openai:my-model@http://127.0.0.1:8000/v1"
        raise InputError(f"'{ref.partition('@')[0]}' names no server", example)
    return found[1], str(check_base_url(found[2]))


class OpenAIEngine:
    """An `Engine` over one model of one server."""

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        mode: Literal["auto", "completions", "chat"] = "auto",
        continues: bool | None = None,
        max_concurrency: int = 8,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        timeout_s: float = 120.0,
        retry: RetryPolicy | None = None,
        text: Text | None = None,
        key: str = "",
        uds: str = "",
    ) -> None:
        """Connect, check that the server has the model, and find out the mode.

        In chat mode, whether the server `continues` an answer that was begun for the model; None: find out. With
        `text`, the model's own tokenizer, prompts of completions are sent as token ids. `key`, `uds`: see `Server`.

        Raises InputError: an address that is none, or a model that the server does not list;
        CallFailed: the server does not answer or refuses the key.
        """
        self.model, self._concurrency, self._text = model, max_concurrency, text
        self.notes: list[str] = []  # what a user should know of how this server is asked
        self._without: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        self._seen_bytes, self._seen_tokens = _BYTES_PER_TOKEN, 1.0  # of prompts, to learn their ratio
        limiter = RateLimiter(requests_per_minute, tokens_per_minute)
        how: dict[str, Any] = {"timeout_s": timeout_s, "retry": retry or RetryPolicy(), "key": key, "uds": uds}
        self._server = Server(base_url, limiter=limiter, **how)
        try:
            self._quirks = self._look_up_model()
            self.mode, self.continues = self._find_mode(mode, continues)
        except BaseException:
            self._server.close()
            raise

    @property
    def identity(self) -> EngineIdentity:
        return EngineIdentity(kind="openai", model=self.model, runtime=self._quirks.name, address=str(self._server.url))

    @property
    def chat_template(self) -> str | None:
        if self.mode == "completions":
            return None
        return CHAT_JSON if self.continues else CHAT_JSON_NEW_TURN

    @property
    def special_tokens(self) -> dict[str, str]:
        return {}

    @property
    def supports_grammar(self) -> bool:
        return self._quirks.grammar

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine.complete`. A failed row has finish "error" and the reason.

        Raises CallFailed: every call would fail the same way (key, model, address) and none was answered;
        InputError: a grammar for a server that takes none, or a raw prompt for a chat endpoint.
        """
        if sampling.grammar and not self.supports_grammar:
            raise InputError(
                f"The server at {self._server.url} does not support grammars",
                "Use a local GGUF model or llama-server, or leave the grammar out.",
            )
        breaker = CircuitBreaker(limit=max(8, 2 * self._concurrency))

        def one(index: int) -> Completion:
            if (before := breaker.tripped) is not None:
                reason = f"not sent, because before it {before.message}"
                return Completion("", "error", error=reason, fault="server")
            completion, error = self.one(requests[index], sampling)
            if error is not None:
                breaker.failed(error)
            else:
                breaker.succeeded()
            return completion

        order = sorted(range(len(requests)), key=lambda i: (requests[i].prompt, requests[i].sample))
        done = dict(zip(order, self._many(one, order), strict=True))
        rows = [done[i] for i in range(len(requests))]
        self._learn_token_size(requests, rows)
        silent = any(row.fault == "server" for row in rows)
        if silent and breaker.tripped is None and self._server.responds():
            # Without an answer to this prompt, but there: a prompt that is too slow, or that breaks the server.
            rows = [replace(row, fault="row") if row.fault == "server" else row for row in rows]
        if breaker.tripped is not None and breaker.tripped.fatal and all(row.error for row in rows):
            raise breaker.tripped
        return rows

    def one(self, request: Request, sampling: Sampling) -> tuple[Completion, CallFailed | None]:
        """Return the completion of one request and, where its call failed, the error."""
        try:
            return self._call(request, sampling), None
        except CallFailed as error:
            own = error.status and not error.fatal
            return Completion("", "error", error=str(error), fault="row" if own else "server"), error

    def responds(self) -> bool:
        """Return whether the server answers at all, asked once."""
        return self._server.responds()

    def prompt_logp(self, ids: Sequence[int]) -> list[float]:
        """Return the log-probability of each token of a prompt but the first; vLLM alone gives them.

        Raises CallFailed: it does not, or the call failed.
        """
        more = {"max_tokens": 1, "prompt_logprobs": 0}
        document = {"model": self.model, "prompt": list(ids), "temperature": 0.0, **more}
        return self._server.call(_PATHS["completions"], document, partial(schema.prompt_logp, ids), len(ids))

    def next_logp(self, ids: Sequence[int], tokens: Sequence[int]) -> dict[int, float]:
        """Return the log-probability of each of `tokens` after a prompt; vLLM alone gives them.

        Raises CallFailed: it does not, or the call failed.
        """
        found: dict[int, float] = {}
        for start in range(0, len(tokens), schema.MOST_LOGPROBS):
            some = list(tokens[start : start + schema.MOST_LOGPROBS])
            more = {"logprobs": 0, "logprob_token_ids": some, "return_tokens_as_token_ids": True}
            document = {"model": self.model, "prompt": list(ids), "temperature": 0.0, "max_tokens": 1, **more}
            read = partial(schema.next_logp, some)
            found |= self._server.call(_PATHS["completions"], document, read, len(ids))
        return found

    def choose_each(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        """Raise: few servers score a given answer, none that renders messages itself. Let it generate instead."""
        raise EngineError(f"{self._server.url} is a server, which does not score given answers")

    def count_tokens(self, text: str) -> int:
        """Return an estimate, from the bytes that a token of earlier prompts had."""
        return math.ceil(len(text.encode()) * self._seen_tokens / self._seen_bytes)

    def close(self) -> None:
        self._server.close()

    def _learn_token_size(self, requests: Sequence[Request], rows: Sequence[Completion]) -> None:
        for request, row in zip(requests, rows, strict=True):
            if row.prompt_tokens:
                self._seen_bytes += len(request.prompt.encode())
                self._seen_tokens += row.prompt_tokens

    def _call(self, request: Request, sampling: Sampling) -> Completion:
        def read(answer: Any) -> Completion:
            return schema.completion(answer, self.mode, self._quirks, request, sampling)

        body = partial(schema.body, self.model, self.mode, self._quirks, request, sampling, text=self._text)
        expected = self.count_tokens(request.prompt) + sampling.max_tokens
        sent = self._without
        row = self._post(self.mode, body, read, expected)
        if row.error == STOPPED_INSIDE and sampling.stop and "stop" not in sent:
            # Reasoning repeats the format that it was asked for, and with it the stop string.
            self._leave_out("stop", "it ends the model's reasoning; answers are cut here")
            row = self._post(self.mode, body, read, expected)
        return row

    def _post(
        self, mode: schema.Mode, body: Callable[[frozenset[str]], dict[str, Any]], read: Callable[[Any], T], tokens: int
    ) -> T:
        """Send what `body` makes without the parameters that were refused, until no other is."""
        while True:
            document = body(self._without)
            try:
                return self._server.call(_PATHS[mode], document, read, tokens)
            except CallFailed as error:
                refused = schema.refused_parameter(error.text, document) if error.status in (400, 422) else ""
                if not refused or body(self._without | {refused}) == document:
                    raise
                self._leave_out(refused, error.message)

    def _leave_out(self, parameter: str, reason: str) -> None:
        with self._lock:
            if parameter not in self._without:
                self._without |= {parameter}
                self.notes.append(f"{self.model}: the parameter {parameter} is left out from now on: {reason}")

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
        try:
            document: Any = self._server.call("/models")
        except CallFailed as error:
            if error.status in (400, 404, 405):
                return quirks_of("")  # some servers keep no list
            raise
        entries = document.get("data") if isinstance(document, dict) else document
        listed = {
            str(entry["id"]): str(entry.get("owned_by", ""))
            for entry in (entries if isinstance(entries, list) else [])
            if isinstance(entry, dict) and "id" in entry
        }
        if listed and self.model not in listed:
            raise InputError(f"{self._server.url} serves no model named '{self.model}'", nearest(self.model, listed))
        return quirks_of(listed.get(self.model, ""))

    def _find_mode(
        self, mode: Literal["auto", "completions", "chat"], continues: bool | None
    ) -> tuple[schema.Mode, bool]:
        """Return the mode, chat if the server can, since it knows the template, and whether it continues an answer."""
        if mode == "completions" or (mode == "chat" and continues is not None):
            return mode, bool(continues)
        failures = []
        for kind, prompt in _PROBES:
            if mode not in ("auto", kind):
                continue
            request, sampling = Request(prompt), Sampling(max_tokens=16)
            body = partial(schema.body, self.model, kind, self._quirks, request, sampling)
            try:
                choice = self._post(kind, body, schema.first_choice, 40)
            except CallFailed as error:
                if error.status in (401, 402, 403):
                    raise
                failures.append(f"{kind}: {error.message}")
                continue
            message = choice.get("message")
            said = message.get("content") if prompt == _PREFILLED and isinstance(message, dict) else None
            told = bool(self._quirks.prefill) and prompt == _PREFILLED
            goes_on = told or (isinstance(said, str) and said.lower().startswith(_NEXT))
            return kind, goes_on if continues is None else continues
        raise CallFailed(
            f"{self._server.url} offers neither chat nor completions for '{self.model}'", "\n".join(failures)
        )
