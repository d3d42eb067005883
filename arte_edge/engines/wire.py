"""The JSON that goes to an OpenAI-compatible server and what is made of its answer.

Pure functions, apart from the network. Servers strip the stop string that ended a
text; the rest of the package counts on it being there, so it is put back here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from arte_edge.engines.base import Completion, Request, Sampling
from arte_edge.engines.dialect import Dialect
from arte_edge.engines.sampling import request_rng
from arte_edge.errors import InputError

__all__ = ["Answer", "Choice", "Mode", "body", "completion", "messages_of", "with_stop"]

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
            f"A chat endpoint takes messages, and this prompt is not rendered for one: {prompt[:60]!r}",
            "Render prompts with the engine they go to, or open the server with mode completions.",
        ) from error
    return list(messages)


def body(
    model: str, mode: Mode, dialect: Dialect, request: Request, sampling: Sampling, bos: str = ""
) -> dict[str, Any]:
    """Return the request document. `bos`: the begin token that the template itself writes, if known."""
    document: dict[str, Any] = {
        "model": model,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        **dialect.extra,
    }
    if sampling.temperature > 0:
        # Another one for every row and sample, the same in every run.
        document["seed"] = int(request_rng(request, sampling).integers(2**31))
    if sampling.stop:
        document["stop"] = list(sampling.stop[: dialect.most_stops])
    if sampling.grammar:
        document["grammar"] = sampling.grammar
    if mode == "completions":
        document |= {"prompt": request.prompt, "max_tokens": sampling.max_tokens}
        if dialect.name == "vllm" and bos and request.prompt.startswith(bos):
            document["add_special_tokens"] = False  # or it would begin twice
        return document
    messages = messages_of(request.prompt)
    document |= {"messages": messages, dialect.max_tokens: sampling.max_tokens}
    if messages[-1]["role"] == "assistant":
        document |= dialect.prefill
    return document


def completion(
    answer: Mapping[str, Any], mode: Mode, dialect: Dialect, request: Request, sampling: Sampling
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
        # A server that cannot go on from a prefill often opens by repeating it.
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
        # Where stop strings are kept, one that is not there ended nothing, and no guess is needed.
        guess_from = None if dialect.keeps_stops else prefill
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
