"""The JSON of requests to OpenAI-compatible servers and of their answers, and how the servers differ.

Answers are read leniently: a field that is not what the API says (a usage without numbers) must not throw away a text
that was paid for. Servers strip the stop string that ended a text; the package relies on it, so it is put back.

Servers fill in what a request leaves open from their own defaults: llama-cpp-python samples from 40 tokens with a
repeat penalty of 1.1, vLLM uses a model's generation_config. A distribution that depends on the server is not the
model's, so `ServerQuirks` switches these off for servers that name themselves in their model list.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from arte_edge.errors import InputError
from arte_edge.runtimes.completion import Completion, Request, Sampling, without_reasoning
from arte_edge.runtimes.reasoning import OUT_OF_BUDGET, STOPPED_INSIDE
from arte_edge.runtimes.sampling import request_rng

if TYPE_CHECKING:
    from arte_edge.runtimes.transformers.tokenizer import Text

MOST_LOGPROBS = 128  # tokens whose log-probabilities vLLM gives in one call


@dataclass(frozen=True)
class ServerQuirks:
    """What one kind of server supports beyond the common API."""

    name: str
    extra: Mapping[str, Any] = field(default_factory=dict)  # added to every request
    prefill: Mapping[str, Any] = field(default_factory=dict)  # makes it continue a last message of the model's
    template_options: bool = False  # passes `chat_template_kwargs` on to the model's template
    keeps_stops: bool = False  # `extra` makes it leave stop strings in the text
    grammar: bool = False  # supports GBNF


_LLAMA_EXTRA = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}

_VLLM = ServerQuirks(
    "vllm",
    extra={"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "include_stop_str_in_output": True},
    prefill={"continue_final_message": True, "add_generation_prompt": False},
    template_options=True,
    keeps_stops=True,
)
_LLAMA_SERVER = ServerQuirks("llama-server", extra=_LLAMA_EXTRA, template_options=True, grammar=True)
_LLAMA_CPP_PYTHON = ServerQuirks("llama-cpp-python", extra=_LLAMA_EXTRA, grammar=True)
_SGLANG = ServerQuirks("sglang", template_options=True)
_PLAIN = ServerQuirks("openai-compatible")

# `owned_by` in the server's model list -> its quirks
_OWNERS = {"vllm": _VLLM, "llamacpp": _LLAMA_SERVER, "me": _LLAMA_CPP_PYTHON, "sglang": _SGLANG}

# Families whose templates can keep the model from reasoning.
_SWITCHES_REASONING = re.compile(r"qwen-?3|glm-?4\.[5-9]|smollm3|hunyuan|deepseek-v3\.[1-9]|granite-?[34]", re.I)


def quirks_of(owned_by: str) -> ServerQuirks:
    """Return the quirks of the server with `owned_by` in its model list."""
    return _OWNERS.get(owned_by, _PLAIN)


Mode = Literal["completions", "chat"]

# A raw prompt that ends in opening tags was prefilled with them.
_TRAILING_TAGS = re.compile(r"(?:<[\w-]+>[^\w<]*)+$")


def messages_of(prompt: str) -> list[dict[str, str]]:
    """Return the messages of a prompt rendered for a chat endpoint.

    Raises InputError: not the JSON document that `render` makes for such an engine.
    """
    try:
        messages = json.loads(prompt)["messages"]
        if not messages or not all({"role", "content"} <= set(message) for message in messages):
            raise ValueError("no messages")
    except (ValueError, KeyError, TypeError) as error:
        shown = f"this prompt is not rendered for one: {prompt[:60]!r}"
        raise InputError(f"A chat endpoint needs messages, and {shown}") from error
    return list(messages)


def body(
    model: str,
    mode: Mode,
    quirks: ServerQuirks,
    request: Request,
    sampling: Sampling,
    without: Collection[str] = (),
    text: Text | None = None,
) -> dict[str, Any]:
    """Return the request document, without the parameters that the server has refused.

    A prompt of completions is sent as the token ids of `text`, with its end tokens, where that is given.
    """
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
        document["stop"] = list(sampling.stop)
    if sampling.grammar:
        known = text is not None  # then it is vLLM, which reads GBNF too, under a name of its own
        document |= {"structured_outputs": {"grammar": sampling.grammar}} if known else {"grammar": sampling.grammar}
    if mode == "completions":
        document["prompt"] = request.prompt if text is None else text.tokens(request.prompt)
        if text is not None:
            document["stop_token_ids"] = sorted(text.ends)
    else:
        document["messages"] = messages = messages_of(request.prompt)
        if messages[-1]["role"] == "assistant":
            document |= quirks.prefill
        if quirks.template_options and _SWITCHES_REASONING.search(model):
            document["chat_template_kwargs"] = {"enable_thinking": False, "thinking": False}
    # One of the two is always sent: an answer without a limit may cost anything.
    document[_LIMITS["max_tokens" in without]] = sampling.max_tokens
    return {name: value for name, value in document.items() if name not in without or name in _LIMITS}


_LIMITS = ("max_tokens", "max_completion_tokens")
_NEEDED = {"model", "prompt", "messages", "grammar", "structured_outputs", *_VLLM.prefill}
# In this order where a server names several: "temperature and top_p cannot both be set".
_OPTIONAL = ("top_p", "seed", "temperature", "stop")
_UNSUPPORTED = re.compile(
    r"not support|unsupported|n't support|not permitted|not allowed|unrecogni[sz]ed|unknown|unexpected|extra_forbidden"
    r"|cannot both|can't both|deprecated|only the default|not available|not accept|not implemented",
    re.IGNORECASE,
)
_WRONG_VALUE = re.compile(r"must be|should be|out of range|at most|greater|less than", re.IGNORECASE)


def refused_parameter(text: str, document: Mapping[str, Any]) -> str:
    """Return the parameter of `document` that an error's `text` refuses and that can be left out, else ''."""
    unsupported = _UNSUPPORTED.search(text)
    if not unsupported and not _WRONG_VALUE.search(text):
        return ""
    named = re.search(r'"param"\s*:\s*"([\w.]+)"', text)
    names = [name for name in (*_OPTIONAL, *document) if name in document and name not in _NEEDED]
    for name in [named[1], *names] if named and named[1] in names else names:
        if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) and (unsupported or name not in _LIMITS):
            return name
    return ""


def token_counts(answer: Any) -> tuple[int, int, int, int]:
    """Return prompt, completion, cached and reasoning tokens of an answer, zero where it gives no number."""
    usage = answer.get("usage") if isinstance(answer, dict) else None

    def count(*path: str) -> int:
        value: Any = usage
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        try:
            number = float(value) if not isinstance(value, bool) else 0.0
        except (TypeError, ValueError, OverflowError):
            return 0
        return int(number) if math.isfinite(number) and number > 0 else 0

    return (
        count("prompt_tokens"),
        count("completion_tokens"),
        count("prompt_tokens_details", "cached_tokens"),
        count("completion_tokens_details", "reasoning_tokens"),
    )


def first_choice(answer: Any) -> dict[str, Any]:
    """Return the first choice of a server's answer.

    Raises ValueError: the document has none.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("no choice in it")
    if failure := choices[0].get("error"):
        raise ValueError(f"the server failed while it answered: {str(failure)[:200]}")
    return choices[0]


def prompt_logp(ids: Sequence[int], answer: Any) -> list[float]:
    """Return the log-probabilities of the tokens `ids` but the first in vLLM's answer to them.

    Raises ValueError: it has none.
    """
    try:
        rows = first_choice(answer)["prompt_logprobs"]
        return [float(row[str(token)]["logprob"]) for token, row in zip(ids[1:], rows[1:], strict=True)]
    except (TypeError, KeyError) as error:
        raise ValueError("no log-probabilities of the prompt in it") from error


def next_logp(tokens: Sequence[int], answer: Any) -> dict[int, float]:
    """Return the log-probability of each of `tokens` as the next one in vLLM's answer.

    Raises ValueError: one is missing.
    """
    try:
        found = first_choice(answer)["logprobs"]["top_logprobs"][0]
        return {token: float(found[f"token_id:{token}"]) for token in tokens}
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError("no log-probabilities of the tokens that were named in it") from error


def completion(answer: Any, mode: Mode, quirks: ServerQuirks, request: Request, sampling: Sampling) -> Completion:
    """Return the completion in a server's answer, its reasoning left out; an answer without a text is an error.

    Raises ValueError: the document is not a completion.
    """
    choice = first_choice(answer)
    message = choice.get("message") if mode == "chat" else choice
    key = "content" if mode == "chat" else "text"
    if not isinstance(message, dict) or not {key, "refusal", "reasoning_content", "tool_calls"} & set(message):
        raise ValueError(f"no {'message' if mode == 'chat' else 'text'} in its choice")
    text, reasoning = _texts(message, key)
    if mode == "chat":
        prompt = json.loads(request.prompt)
        last = messages_of(request.prompt)[-1]
        prefill = last["content"] if last["role"] == "assistant" else str(prompt.get("prefill", ""))
    else:
        tags = _TRAILING_TAGS.search(request.prompt)
        prefill = tags[0] if tags else ""
    prompt_tokens, written, cached, thought = token_counts(answer)
    reason = _reason(choice, message, text, reasoning)
    if reasoning and not thought:
        thought = max(1, round(written * len(reasoning) / len(reasoning + (text or ""))))
    ended = "length" if choice.get("finish_reason") in ("length", "max_tokens") else "eos"
    row = Completion(text or "", ended, prompt_tokens, written, cached, reasoning_tokens=thought)
    if reason:
        return replace(row, finish="error", error=reason, fault="answer")
    row = without_reasoning(row)
    if row.error:
        return row
    found = row.text
    if mode == "chat":
        # A server that opened another turn may have said more before the start that it was asked for.
        before, start, rest = found.partition(prefill) if prefill else ("", "", found)
        if start and (not before.strip() or last["role"] != "assistant"):
            found = rest
    # Where the server keeps stop strings in the text, a missing one did not end it: nothing to guess.
    guess_from = None if quirks.keeps_stops else prefill
    stop_reason = choice.get("stop_reason")  # vLLM: the stop string or token that ended it
    found, finish = with_stop(found, choice.get("finish_reason"), stop_reason, sampling.stop, guess_from)
    return replace(row, text=found, finish=finish)


def _texts(message: Mapping[str, Any], key: str) -> tuple[str | None, str]:
    """Return the text of a message (None: it has none) and its reasoning, from a string or from a list of parts."""
    content = message.get(key)
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    text = [part for part in texts if isinstance(part, str)]
    thought = [part.get("thinking") for part in parts if isinstance(part, dict) and part.get("thinking")]
    fields = [message.get(name) for name in ("reasoning_content", "reasoning") if message.get(name)]
    # Half of a character, as from an emoji cut at the token limit, can be neither stored as UTF-8 nor tokenized.
    whole = "".join(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole if text else None, "".join(map(str, [*thought, *fields[:1]]))


def _reason(choice: Mapping[str, Any], message: Mapping[str, Any], text: str | None, reasoning: str) -> str:
    """Return why an answer is no text that can be used, '' if it is one."""
    ended = choice.get("finish_reason")
    if ended in ("content_filter", "safety", "SAFETY"):
        return "the server's content filter cut the answer off"
    if text and text.strip():
        return ""
    if refusal := message.get("refusal"):
        return f"the model declined: {str(refusal)[:200]}"
    if message.get("tool_calls") or message.get("function_call"):
        return "the model called a tool instead of answering"
    if reasoning:
        return OUT_OF_BUDGET if ended == "length" else STOPPED_INSIDE
    return "" if text is not None else f"an answer without a text (finish_reason {ended!r})"


def with_stop(
    text: str, finish_reason: Any, stop_reason: Any, stops: Sequence[str], prefill: str | None
) -> tuple[str, str]:
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
    if finish_reason in ("length", "max_tokens"):
        return text, "length"
    if isinstance(stop_reason, str) and stop_reason in stops:
        return text + stop_reason, "stop"
    if finish_reason != "stop" or prefill is None:
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
