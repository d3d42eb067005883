"""Engine calls cached in the run's store: no call is ever made twice.

Calls are sent in groups of fixed composition. An unfinished group is sent again as a whole, so that
a resumed run decodes the same batches, and gets the same text, as one that was never interrupted.

A kill costs one group, and the end of a group decodes with a batch that is no longer full. The
teacher's long texts go in small groups. The student's answers, where most of the time is spent, go
in groups with the questions of several drafts (`together`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.console import Reporter
from arte_edge.errors import EngineError
from arte_edge.runtimes.completion import Completion, Engine, Request, Sampling
from arte_edge.store import CallLog, content_key

__all__ = ["GROUP", "Calls", "Prompts"]

GROUP = 32  # calls that are sent and stored together

# Prompts and the choices of each ``[n_prompt][n_choice]``; their shared prefix is computed once.
Prompts = tuple[Sequence[str], Sequence[Sequence[str]]]


_COMPLETION = ("text", "finish", "prompt_tokens", "completion_tokens", "cached_tokens")


class Calls:
    """The calls of one run. `made` counts engine calls of this process, `cached` those found in the store."""

    def __init__(self, log: CallLog, reporter: Reporter, group: int = GROUP, together: int = 160) -> None:
        self._log, self._reporter = log, reporter
        self.group, self.together = group, together
        self._failed: dict[str, Completion] = {}
        self.made = 0
        self.cached = 0

    def complete(
        self,
        engine: Engine,
        requests: Sequence[Request],
        sampling: Sampling,
        what: str,
        *,
        spare: bool = False,
        together: bool = False,
    ) -> list[Completion]:
        """Complete every request, in order; `what` labels the progress bar.

        With `together` a local model gets them in groups of `Calls.together` instead of
        `Calls.group`; a server, whose calls may cost money, never does.

        Raises:
            EngineError: calls to a server failed, and they are not `spare`. A stage made of failed calls
                would look finished, and a dead server like a bad model.
        """
        identity, how = engine.identity.key(), sampling.as_dict()
        size = self.together if together and engine.identity.kind != "openai" else self.group
        keys = [content_key("complete", identity, r.prompt, how, r.sample) for r in requests]
        with self._reporter.bar(what, len(requests)) as step:
            for start in range(0, len(requests), size):
                group = range(start, min(start + size, len(requests)))
                todo = self._missing(keys, group, lambda i: self._log.get(keys[i], *_COMPLETION) is not None)
                fresh = engine.complete([requests[i] for i in todo], sampling) if todo else []
                self._log.append(
                    [_completion_row(keys[i], what, c) for i, c in zip(todo, fresh, strict=True)]
                )
                self._count(len(todo), len(group) - len(todo))
                step(len(group), sum(c.completion_tokens for c in fresh), len(group) - len(todo))
                # A failed call is no finished row of the store; this process still needs its reason.
                self._failed |= {keys[i]: c for i, c in zip(todo, fresh, strict=True) if c.finish == "error"}
        done = [self._completion(key) for key in keys]
        lost = [c for c in done if c.finish == "error"]
        # A local engine fails only on a prompt that it cannot process, and always will: that counts as wrong.
        if lost and not spare and engine.identity.kind == "openai":
            raise EngineError(
                f"{what}: {len(lost)} of {len(done)} calls failed: {lost[0].error}",
                "The other answers are cached. Run the same command again when the server responds.",
            )
        return done

    def _completion(self, key: str) -> Completion:
        row = self._log.get(key, *_COMPLETION)
        if row is None:
            return self._failed[key]
        return Completion(**{name: row[name] for name in _COMPLETION})

    def choose(
        self,
        engine: Engine,
        groups: Sequence[Sequence[str]],
        choices: Sequence[Sequence[str]],
        what: str,
    ) -> NDArray[np.float64]:
        """Return log-probabilities ``[n_group, n_prompt, n_choice]`` of `choices` after each prompt.

        `choices` belong to each prompt of a group; shorter lists are padded with NaN.
        """
        width = max(len(options) for options in choices)
        scores = np.full((len(groups), len(choices), width), np.nan)
        found = self.choose_each(engine, [(prompts, choices) for prompts in groups], what)
        for g, rows in enumerate(found):
            for i, values in enumerate(rows):
                scores[g, i, : len(values)] = values
        return scores

    def choose_each(
        self, engine: Engine, prompts_each: Sequence[Prompts], what: str
    ) -> list[list[list[float]]]:
        """Return log-probabilities ``[n_ask][n_prompt][n_choice]`` of prompts with their own choices."""
        identity = engine.identity.key()
        keys = [content_key("choose", identity, list(p), [list(c) for c in own]) for p, own in prompts_each]
        with self._reporter.bar(what, sum(len(prompts) for prompts, _ in prompts_each)) as step:
            for pack in self._packs(prompts_each, 1 if engine.identity.kind == "openai" else self.together):
                todo = self._missing(keys, pack, lambda i: self._is_scored(keys[i], prompts_each[i][1]))
                fresh = _choose([prompts_each[i] for i in todo], engine) if todo else []
                self._log.append(
                    [
                        {"key": keys[i], "what": what, "logp": rows}
                        for i, rows in zip(todo, fresh, strict=True)
                    ]
                )
                made, every = (sum(len(prompts_each[i][0]) for i in some) for some in (todo, pack))
                self._count(made, every - made)
                step(every, 0, every - made)
        return [self._cached(key)["logp"] for key in keys]

    def _packs(self, prompts_each: Sequence[Prompts], size: int) -> Iterator[list[int]]:
        """Yield the indices of requests for one engine call: as many as bring the prompts to `size`."""
        pack: list[int] = []
        for i in range(len(prompts_each)):
            pack.append(i)
            if sum(len(prompts_each[j][0]) for j in pack) >= size:
                yield pack
                pack = []
        if pack:
            yield pack

    def _is_scored(self, key: str, choices: Sequence[Sequence[str]]) -> bool:
        row = self._log.get(key, "logp")
        return row is not None and list(map(len, row["logp"])) == list(map(len, choices))

    def _missing(self, keys: Sequence[str], group: Iterable[int], known: Callable[[int], bool]) -> list[int]:
        """Return the members of a group that are not in the store, only the first of equal calls."""
        return sorted({keys[i]: i for i in reversed(list(group)) if not known(i)}.values())

    def _cached(self, key: str) -> dict[str, Any]:
        row = self._log.get(key)
        assert row is not None  # cached before or appended just now
        return row

    def _count(self, made: int, cached: int) -> None:
        self.made += made
        self.cached += cached


def _choose(prompts_each: Sequence[Prompts], engine: Engine) -> list[list[list[float]]]:
    """Score several requests in one engine call."""
    prompts = [prompt for some, _ in prompts_each for prompt in some]
    choices = [own for _, some in prompts_each for own in some]
    rows = iter(engine.choose_each(prompts, choices))
    return [[_rounded(next(rows)) for _ in some] for some, _ in prompts_each]


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [round(float(value), 6) for value in values]


def _completion_row(key: str, what: str, completion: Completion) -> dict[str, Any]:
    return {
        "key": key,
        "what": what,
        "status": "error" if completion.finish == "error" else "ok",
        "text": completion.text,
        "finish": completion.finish,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "cached_tokens": completion.cached_tokens,
        **({"error": completion.error} if completion.error else {}),
    }
