"""Log-probabilities of several continuations of one prompt: which tokens count, and what has to be decoded for them.

Choices are tokenized together with the prompt, so that a token that spans the boundary is the one the model
would write. The tokens of a choice that count run from where the choices diverge to where the choice is unique:
what comes before is the same for all, and what follows is not compared with anything ("(A)" against "(B)" is "A"
against "B"). The probabilities of a closed set therefore never add up to more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import InputError
from arte_edge.runtimes.llamacpp.scheduler import Job
from arte_edge.runtimes.prefix_tree import Context, Tree, longest_paths


def spans(lists: Sequence[Sequence[int]], prompt: Sequence[int]) -> list[tuple[int, int]]:
    """Return for each token list (prompt and choice) the range ``start, end`` that counts.

    With one choice there is nothing to compare with: all tokens after `prompt` count.
    """
    start = _divergence([lists[0], prompt] if len(lists) == 1 else lists)
    return [(start, _unique_end(tokens, lists, start)) for tokens in lists]


def _divergence(lists: Sequence[Sequence[int]]) -> int:
    shortest = min(len(tokens) for tokens in lists)
    return next((i for i in range(shortest) if len({tokens[i] for tokens in lists}) > 1), shortest)


def _unique_end(tokens: Sequence[int], lists: Sequence[Sequence[int]], start: int) -> int:
    if len(lists) > 1:
        for end in range(start + 1, len(tokens)):
            if sum(list(other[:end]) == list(tokens[:end]) for other in lists) == 1:
                return end
    return len(tokens)


def log_softmax_at(logits: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float64]:
    """Return log-probabilities ``[n_token]`` of `tokens` under `logits` ``[v]``."""
    peak = float(logits.max())
    total = peak + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    return logits[list(tokens)].astype(np.float64) - total


class ChoiceScorer:
    """Log-probabilities of the `choices` after one prompt; decode its `trees` or its `jobs` first."""

    def __init__(self, tokenize: Callable[[str], list[int]], prompt: str, choices: Sequence[str]) -> None:
        lists = [tokenize(prompt + choice) for choice in choices]
        # What to add up for each choice: (tokens before, next token) pairs.
        self._terms = [
            [(tuple(tokens[:i]), tokens[i]) for i in range(start, end)]
            for tokens, (start, end) in zip(lists, spans(lists, tokenize(prompt)), strict=True)
        ]
        self._next: dict[Context, set[int]] = {}  # tokens before -> the tokens that may follow
        for before, token in (term for terms in self._terms for term in terms):
            self._next.setdefault(before, set()).add(token)
        self._score: dict[Context, dict[int, float]] = {}
        self._paths = longest_paths(self._next)  # the shorter contexts are on these paths

    @classmethod
    def each(
        cls, tokenize: Callable[[str], list[int]], prompts: Sequence[str], choices: Sequence[Sequence[str]]
    ) -> list[ChoiceScorer]:
        """Return a scorer for each prompt with its own choices. Raises InputError: they need a prompt and have none."""
        scorers = [cls(tokenize, prompt, own) for prompt, own in zip(prompts, choices, strict=True)]
        if any(() in scorer._next for scorer in scorers):
            raise InputError("Choices need a prompt before them: a model does not predict the first token")
        return scorers

    @property
    def longest(self) -> int:
        """Tokens of the longest context, plus the one after it."""
        return max((len(path) + 1 for path in self._paths), default=0)

    @property
    def contexts(self) -> dict[Context, list[int]]:
        """The tokens whose log-probabilities are needed after each context; `note` takes them."""
        return {context: sorted(tokens) for context, tokens in self._next.items()}

    def note(self, context: Context, logp: dict[int, float]) -> None:
        """Take the log-probabilities of the tokens of `contexts` after `context`."""
        self._score[context] = logp

    def trees(self, max_leaves: int) -> list[Tree]:
        """Return the paths as trees of at most `max_leaves` leaves; nearly always one tree."""
        parts = [self._paths[i : i + max_leaves] for i in range(0, len(self._paths), max_leaves)]
        return [Tree(part, {context: [self._note] for context in self._contexts_on(part)}) for part in parts]

    def jobs(self) -> list[Job]:
        """Return a job for each path, for models that cannot share a token between sequences."""
        return [self._job(path) for path in self._paths]

    def _job(self, path: Context) -> Job:
        outputs = frozenset(len(context) - 1 for context in self._contexts_on([path]))
        return Job(list(path), outputs, lambda at, logits: self._note(path[: at + 1], logits))

    def _contexts_on(self, paths: Sequence[Context]) -> set[Context]:
        """Return the contexts that are on one of `paths`."""
        return {context for context in self._next if any(path[: len(context)] == context for path in paths)}

    def _note(self, context: Context, logits: NDArray[np.float32]) -> None:
        ids = sorted(self._next[context])
        self.note(context, dict(zip(ids, log_softmax_at(logits, ids).tolist(), strict=True)))

    def log_probabilities(self) -> NDArray[np.float64]:
        """Return the log-probabilities ``[n_choice]``."""
        return np.array([sum(self._score[before][token] for before, token in terms) for terms in self._terms])
