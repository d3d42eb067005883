"""What distillation needs of a runtime: complete many prompts, and score given answers after many prompts.

An engine takes prompts that are already rendered (`arte_edge.runtimes.prompt_render`): the text that is hashed
is the text that is decoded. A failed call is a completion too, with `error` set, so a batch never loses a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from arte_edge.runtimes.prompt_render import Templated
from arte_edge.runtimes.reasoning import OUT_OF_BUDGET, STOPPED_INSIDE, split_reasoning

Method = Literal["complete", "choose_each"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; `seed` and `Request.sample` make a draw repeatable."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0
    grammar: str | None = None  # GBNF; only for engines with `supports_grammar`
    repeat_penalty: float = 0.0  # nats, see `sampling.Repeats`; a server draws without it

    def as_dict(self) -> dict[str, Any]:
        """Return what a stored call is known by; calls of before there was a penalty are found."""
        return {key: value for key, value in asdict(self).items() if value or key != "repeat_penalty"}


@dataclass(frozen=True)
class Request:
    """One call: a rendered prompt, and which of several draws from it this is."""

    prompt: str
    sample: int = 0


@dataclass(frozen=True)
class EngineIdentity:
    """What determines the text that an engine generates; part of every stored row's key."""

    kind: str  # llamacpp | transformers | openai
    model: str  # sha256 of the weights, or the server's model name
    quantization: str = ""
    adapter: str = ""  # sha256 of a LoRA adapter, empty if none
    runtime: str = ""  # for example llama_cpp 0.3.36; recorded, not part of the key
    address: str = ""  # of a server, normalized: two servers may give one name to two models

    def key(self) -> str:
        key = "/".join((self.kind, self.model, self.quantization, self.adapter))
        return f"{key}/{self.address}" if self.address else key

    def short(self) -> str:
        """Return who wrote, for people: kind, weights (or a server's name of them) and adapter."""
        return "/".join((self.kind, self.model if self.address else self.model[:12], self.adapter[:12]))


@dataclass(frozen=True)
class Completion:
    """The answer to one request.

    `finish`: "stop" (a stop string, which `text` ends with), "eos", "length", "loop" or "error".
    `fault` says more of a server's error: "answer" (it answered, perhaps for money, and would answer the same again),
    "row" (this call failed) or "server" (so would every other).
    """

    text: str
    finish: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that came from a shared prefix
    error: str = ""
    reasoning_tokens: int = 0  # of completion_tokens; that text is left out
    fault: Literal["", "answer", "row", "server"] = ""


def without_reasoning(done: Completion) -> Completion:
    """Return a completion whose text is the answer alone; one that never came to an answer has an error instead.

    The tokens of the reasoning are the server's count, else its share of the characters.
    """
    found = split_reasoning(done.text)
    if done.error or not found.reasoning_chars:
        return done
    share = found.reasoning_chars / len(done.text)
    tokens = done.reasoning_tokens or max(1, round(done.completion_tokens * share))
    if found.closed:
        return replace(done, text=found.text, reasoning_tokens=tokens)
    reason = OUT_OF_BUDGET if done.finish in ("length", "loop") else STOPPED_INSIDE
    return replace(done, text="", finish="error", error=reason, reasoning_tokens=tokens, fault="answer")


class Engine(Templated, Protocol):
    """Many prompts at once; `llamacpp`, `transformers` and `openai` implement it."""

    @property
    def identity(self) -> EngineIdentity: ...

    @property
    def supports_grammar(self) -> bool: ...

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Complete each prompt; one completion a request, in order. A prefix that prompts share is computed once."""

    def choose_each(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        """Return for each prompt the log-probabilities ``[n_choice]`` of its own choices after it.

        Which tokens of a choice count: see `arte_edge.runtimes.choice_scoring`.
        """

    def count_tokens(self, text: str) -> int: ...

    def close(self) -> None: ...


@runtime_checkable
class SpreadEngine(Protocol):
    """An `Engine` that works on several groups of calls at once."""

    def each(self, method: Method, groups: Iterable[tuple[Any, Any]]) -> Iterator[tuple[int, list[Any]]]:
        """Yield the number of each group and what `method` returns for its arguments, as they arrive, in any order."""
