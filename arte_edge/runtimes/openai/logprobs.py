"""Log-probabilities of given answers from a completions endpoint.

The API has no call for it. There are two methods, and a probe finds out once which one works:

- *echo*: the server returns the prompt (with the choice in it) and every token's log-probability. One call a choice.
  vLLM does this. llama-cpp-python's values are one token off when a model has no BOS token, and llama-server gives
  none for the prompt; so an echoed value must first agree with the value of the same token when generated.
- *walk*: request the likeliest next tokens after the prompt, take the longest one that the choice starts with, and
  continue after it. One call a token, shared by choices with the same start. A token that is not among the candidates
  counts as the least likely of them, which overestimates it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import EngineError
from arte_edge.runtimes.choice_scoring import spans
from arte_edge.runtimes.openai.client import CallFailed
from arte_edge.runtimes.openai.schema import Answer

__all__ = ["LogprobScorer"]

T = TypeVar("T")
R = TypeVar("R")

_PROBE = "1 2 3 4 5 6 7"  # any model is sure of what follows, so the value of another token is noticed
_AGREE_NATS = 0.1  # two 16-bit evaluations of one token differ by less
# llama-cpp-python lists no candidates when the sampled token is an end token. The list does not depend on the
# sampled token, so sampling is repeated until the list is there.
_DRAWS = ({"temperature": 0.0}, *({"temperature": 2.0, "seed": seed} for seed in range(8)))


class Many(Protocol):
    """Runs a function over items from several threads; results in the order of the items."""

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]: ...


class LogprobScorer:
    """Scores choices through `post`, which sends one completions request of one token.

    `n_candidates`: the most next tokens that the server gives log-probabilities of.
    """

    def __init__(self, post: Callable[[Mapping[str, Any]], Answer], many: Many, n_candidates: int) -> None:
        self._post, self._many, self._n_candidates = post, many, n_candidates
        self._echoes: bool | None = None

    def choose(self, contexts: Sequence[str], choices: Sequence[str]) -> NDArray[np.float64]:
        """Return log-probabilities ``[n_context, n_choice]``; see `choice_scoring.spans` for what counts.

        Raises:
            EngineError: the server gives no log-probabilities.
            CallFailed: a call failed for good.
        """
        if self._echoes is None:
            self._echoes = self._can_echo()
        return (self._by_echo if self._echoes else self._by_walk)(contexts, choices)

    def _can_echo(self) -> bool:
        """Return whether echoed values can be trusted."""
        candidates = self._candidates(_PROBE)
        token, value = max(candidates.items(), key=lambda item: item[1])
        try:
            tokens, values = self._echo(_PROBE + token)
        except CallFailed as error:
            if error.status == 0 or error.fatal:
                raise
            return False
        echoed = values[-1] if tokens and tokens[-1] == token else None
        return echoed is not None and abs(echoed - value) < _AGREE_NATS

    def _echo(self, prompt: str) -> tuple[list[str], list[float | None]]:
        """Return the tokens of `prompt` and their log-probabilities; the first has none."""
        answer = self._post({"prompt": prompt, "echo": True, "logprobs": 1})
        logprobs = answer.choices[0].logprobs
        if logprobs is None:
            return [], []
        written = answer.usage.completion_tokens if answer.usage else 1
        n = len(logprobs.tokens) - written
        return logprobs.tokens[:n], logprobs.token_logprobs[:n]

    def _by_echo(self, contexts: Sequence[str], choices: Sequence[str]) -> NDArray[np.float64]:
        ends = ["", *choices] if len(choices) == 1 else choices
        texts = sorted({context + end for context in contexts for end in ends})
        echoes = dict(zip(texts, self._many(self._echo, texts), strict=True))
        rows = []
        for context in contexts:
            lists = [echoes[context + choice][0] for choice in choices]
            prompt = echoes[context][0] if len(choices) == 1 else []
            row = []
            for choice, (start, end) in zip(choices, spans(lists, prompt), strict=True):
                values = [value for value in echoes[context + choice][1][start:end] if value is not None]
                if len(values) < end - start:
                    raise EngineError(
                        "A server gives no log-probability for the first token",
                        "Put a prompt before the choices.",
                    )
                row.append(sum(values))
            rows.append(row)
        return np.array(rows, dtype=np.float64).reshape(len(contexts), len(choices))

    def _by_walk(self, contexts: Sequence[str], choices: Sequence[str]) -> NDArray[np.float64]:
        paths = [[_Path(context, choice) for choice in choices] for context in contexts]
        candidates: dict[str, dict[str, float]] = {}
        while live := [path for row in paths for path in row if path.is_open(choices)]:
            texts = sorted({path.text for path in live} - candidates.keys())
            candidates |= zip(texts, self._many(self._candidates, texts), strict=True)
            for path in live:
                path.step(candidates[path.text])
        rows = []
        for row in paths:
            ranges = spans([path.tokens for path in row], [])
            rows.append([sum(path.values[start:end]) for path, (start, end) in zip(row, ranges, strict=True)])
        return np.array(rows, dtype=np.float64).reshape(len(contexts), len(choices))

    def _candidates(self, prompt: str) -> dict[str, float]:
        """Return the likeliest next tokens and their log-probabilities."""
        for draw in _DRAWS:
            answer = self._post({"prompt": prompt, "logprobs": self._n_candidates, **draw})
            if found := _listed(answer):
                return found
            if answer.choices[0].finish_reason != "stop":
                break
        raise EngineError(
            "The server gives no log-probabilities, so it cannot score given answers",
            "Start it with them (llama-cpp-python: --logits_all true), or score by generating.",
        )


def _listed(answer: Answer) -> dict[str, float]:
    """Return the candidates for an answer's first token, none if the server gave none."""
    logprobs = answer.choices[0].logprobs
    found: dict[str, float] = {}
    if logprobs and logprobs.top_logprobs:
        found = logprobs.top_logprobs[0] or {}
    elif logprobs and logprobs.content:
        tops = logprobs.content[0].get("top_logprobs", [])
        found = {str(top["token"]): float(top["logprob"]) for top in tops}
    return {token: value for token, value in found.items() if token}


@dataclass
class _Path:
    """The tokens of one choice found so far."""

    context: str
    choice: str
    tokens: list[str] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def walked(self) -> str:
        return "".join(self.tokens)

    @property
    def text(self) -> str:
        return self.context + self.walked

    def is_open(self, choices: Sequence[str]) -> bool:
        """Return whether a token is missing: not at the end, and not yet distinguished from the others."""
        walked = self.walked
        alone = len(choices) > 1 and sum(choice.startswith(walked) for choice in choices) == 1
        return walked != self.choice and not (alone and walked)

    def step(self, candidates: Mapping[str, float]) -> None:
        rest = self.choice[len(self.walked) :]
        token = max((token for token in candidates if rest.startswith(token)), key=len, default=rest)
        self.tokens.append(token)
        self.values.append(candidates.get(token, min(candidates.values())))
