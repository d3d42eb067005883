"""The JSON of requests to OpenAI-compatible servers and of their answers, and how the servers differ.

Pure functions, without the network. Servers strip the stop string that ended a text; the rest of the package relies
on it, so it is put back here.

Servers fill in what a request leaves open from their own defaults: llama-cpp-python samples from 40 tokens with a
repeat penalty of 1.1, vLLM uses a model's generation_config. A distribution that depends on the server is not the
model's, so `ServerQuirks` switches these off for servers that name themselves in their model list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from arte_edge.errors import InputError
from arte_edge.runtimes.completion import Completion, Request, Sampling
from arte_edge.runtimes.sampling import request_rng

__all__ = ["Answer", "Choice", "Mode", "ServerQuirks", "body", "completion", "messages_of", "quirks_of"]
__all__ += ["with_stop"]


@dataclass(frozen=True)
class ServerQuirks:
    """What one kind of server supports beyond the common API."""

    name: str
    extra: Mapping[str, Any] = field(default_factory=dict)  # added to every request
    prefill: Mapping[str, Any] = field(default_factory=dict)  # added when the last message is the model's
    max_tokens: str = "max_tokens"  # the key's name in chat requests
    max_stops: int = 1000  # stop strings in one request
    candidates: int = 20  # at most so many next tokens have log-probabilities
    keeps_stops: bool = False  # `extra` makes it leave stop strings in the text
    grammar: bool = False  # supports GBNF
    tokenize: tuple[str, str, str] | None = None  # path, key of the text, key of the count or the tokens


_LLAMA_EXTRA = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}

_VLLM = ServerQuirks(
    "vllm",
    extra={"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "include_stop_str_in_output": True},
    prefill={"continue_final_message": True, "add_generation_prompt": False},
    keeps_stops=True,
    tokenize=("/tokenize", "prompt", "count"),
)
_LLAMA_SERVER = ServerQuirks(
    "llama-server",
    extra=_LLAMA_EXTRA,
    candidates=5000,
    grammar=True,
    tokenize=("/tokenize", "content", "tokens"),
)
_LLAMA_CPP_PYTHON = ServerQuirks(
    "llama-cpp-python",
    extra=_LLAMA_EXTRA,
    candidates=5000,
    grammar=True,
    tokenize=("/extras/tokenize/count", "input", "count"),
)
_OPENAI = ServerQuirks("openai", max_tokens="max_completion_tokens", max_stops=4, candidates=5)
_PLAIN = ServerQuirks("openai-compatible")

# `owned_by` in the server's model list -> its quirks
_OWNERS = {"vllm": _VLLM, "llamacpp": _LLAMA_SERVER, "me": _LLAMA_CPP_PYTHON}


def quirks_of(host: str, owned_by: str) -> ServerQuirks:
    """Return the quirks of the server at `host` with `owned_by` in its model list."""
    if host == "api.openai.com":
        return _OPENAI
    return _OWNERS.get(owned_by, _PLAIN)


Mode = Literal["completions", "chat"]

# A raw prompt that ends in opening tags was prefilled with them.
_TRAILING_TAGS = re.compile(r"(?:<[\w-]+>[^\w<]*)+$")


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)  # servers add fields as they like


class _Message(_Wire):
    content: str | None = None


class _Logprobs(_Wire):
    """The completions form, and the chat form that llama-server gives for both."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
    content: list[dict[str, Any]] | None = None


class Choice(_Wire):
    text: str | None = None
    message: _Message | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # vLLM: the stop string or token that ended it
    logprobs: _Logprobs | None = None


class _Cached(_Wire):
    cached_tokens: int | None = None


class _Usage(_Wire):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Cached | None = None


class Answer(_Wire):
    """A completion as servers send it; a document without a choice is not one."""

    choices: list[Choice] = Field(min_length=1)
    usage: _Usage | None = None


def messages_of(prompt: str) -> list[dict[str, str]]:
    """Return the messages of a prompt rendered for a chat endpoint.

    Raises:
        InputError: not the JSON document that `render` makes for such an engine.
    """
    try:
        messages = json.loads(prompt)["messages"]
        if not messages or not all({"role", "content"} <= set(message) for message in messages):
            raise ValueError("no messages")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"A chat endpoint needs messages, and this prompt is not rendered for one: {prompt[:60]!r}",
            "Render prompts with the engine they go to, or open the server with mode completions.",
        ) from error
    return list(messages)


def body(
    model: str, mode: Mode, quirks: ServerQuirks, request: Request, sampling: Sampling, bos: str = ""
) -> dict[str, Any]:
    """Return the request document. `bos`: the begin token that the template itself writes, if known."""
    document: dict[str, Any] = {
        "model": model,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        **quirks.extra,
    }
    if sampling.temperature > 0:
        # A different seed for every row and sample, the same in every run.
        document["seed"] = int(request_rng(request, sampling).integers(2**31))
    if sampling.stop:
        document["stop"] = list(sampling.stop[: quirks.max_stops])
    if sampling.grammar:
        document["grammar"] = sampling.grammar
    if mode == "completions":
        document |= {"prompt": request.prompt, "max_tokens": sampling.max_tokens}
        if quirks.name == "vllm" and bos and request.prompt.startswith(bos):
            document["add_special_tokens"] = False  # otherwise BOS would be doubled
        return document
    messages = messages_of(request.prompt)
    document |= {"messages": messages, quirks.max_tokens: sampling.max_tokens}
    if messages[-1]["role"] == "assistant":
        document |= quirks.prefill
    return document


def completion(
    answer: Mapping[str, Any], mode: Mode, quirks: ServerQuirks, request: Request, sampling: Sampling
) -> Completion:
    """Return the completion in a server's answer.

    Raises:
        ValueError: the document is not a completion (pydantic's ValidationError is one).
    """
    parsed = Answer.model_validate(answer)
    choice = parsed.choices[0]
    if mode == "chat":
        if choice.message is None:
            raise ValueError("a choice without a message")
        last = messages_of(request.prompt)[-1]
        prefill = last["content"] if last["role"] == "assistant" else ""
        # A server that cannot continue a prefill often repeats it first.
        text = (choice.message.content or "").removeprefix(prefill)
    elif choice.text is None:
        raise ValueError("a choice without a text")
    else:
        text = choice.text
        tags = _TRAILING_TAGS.search(request.prompt)
        prefill = tags[0] if tags else ""
    usage = parsed.usage or _Usage()
    details = usage.prompt_tokens_details
    if choice.finish_reason == "content_filter":
        finish, error = "error", "the server's content filter cut the answer off"
    else:
        # Where the server keeps stop strings in the text, a missing one did not end it: nothing to guess.
        guess_from = None if quirks.keeps_stops else prefill
        text, finish = with_stop(text, choice, sampling.stop, guess_from)
        error = ""
    return Completion(
        text=text,
        finish=finish,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=(details.cached_tokens or 0) if details else 0,
        error=error,
    )


def with_stop(text: str, choice: Choice, stops: Sequence[str], prefill: str | None) -> tuple[str, str]:
    """Return the text, ending in its stop string if one ended it, and the finish reason.

    In order: a stop string that is still there; the one that the server names; a
    ``</x>`` whose ``<x>`` is open in the prefill and text (with prefill None nothing is
    guessed). Otherwise a "stop" may have been an end token or any stop string, and
    counts as "eos".
    """
    found = [(text.index(stop), stop) for stop in stops if stop in text]
    if found:
        at, stop = min(found)
        return text[:at] + stop, "stop"
    if choice.finish_reason == "length":
        return text, "length"
    if isinstance(choice.stop_reason, str) and choice.stop_reason in stops:
        return text + choice.stop_reason, "stop"
    if choice.finish_reason != "stop" or prefill is None:
        return text, "eos"
    open_tags = [(opened, stop) for stop in stops if (opened := _opened_at(prefill + text, stop)) >= 0]
    if open_tags:
        return text + max(open_tags)[1], "stop"
    return text, "eos"


def _opened_at(text: str, stop: str) -> int:
    """Return where the tag that `stop` would close stands open in `text`, -1 if nowhere."""
    tag = re.fullmatch(r"</([\w-]+)>", stop)
    if tag is None:
        return -1
    opened = text.rfind(f"<{tag[1]}>")
    return opened if opened > text.rfind(stop) else -1
