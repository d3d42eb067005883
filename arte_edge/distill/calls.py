"""Engine calls that go through the store: what was answered once is never asked again.

Calls are sent in groups of fixed make-up. A group that is not finished is sent whole,
so that a resumed run decodes the same batches, and gets the same text, as one that
was never interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.distill.progress import Reporter
from arte_edge.engines.base import Completion, Engine, Request, Sampling
from arte_edge.errors import EngineError
from arte_edge.store import CallLog, content_key

__all__ = ["Calls"]


class Calls:
    """The calls of one run. `made` counts engine calls of this process, `kept` those found in the store."""

    def __init__(self, log: CallLog, reporter: Reporter, group: int = 32) -> None:
        self._log, self._reporter, self.group = log, reporter, group
        self._failed: dict[str, Completion] = {}
        self.made = 0
        self.kept = 0

    def complete(
        self,
        engine: Engine,
        requests: Sequence[Request],
        sampling: Sampling,
        what: str,
        *,
        spare: bool = False,
    ) -> list[Completion]:
        """Complete every request, in order; `what` names them in the progress line.

        Raises:
            EngineError: a server left calls unanswered, and they are not `spare`. A stage made of
                failures would look finished, and a dead server like a bad model.
        """
        identity, how = engine.identity.key(), sampling.as_dict()
        keys = [content_key("complete", identity, r.prompt, how, r.sample) for r in requests]
        with self._reporter.bar(what, len(requests)) as step:
            for start in range(0, len(requests), self.group):
                group = range(start, min(start + self.group, len(requests)))
                todo = [i for i in group if self._log.get(keys[i]) is None]
                fresh = engine.complete([requests[i] for i in todo], sampling) if todo else []
                self._log.append(
                    [_completion_row(keys[i], what, c) for i, c in zip(todo, fresh, strict=True)]
                )
                self._count(len(todo), len(group) - len(todo))
                step(len(group), sum(c.completion_tokens for c in fresh), len(group) - len(todo))
                # A failed call has no finished row in the store; this process still needs its reason.
                self._failed |= {keys[i]: c for i, c in zip(todo, fresh, strict=True) if c.finish == "error"}
        done = [self._completion(key) for key in keys]
        lost = [c for c in done if c.finish == "error"]
        # A local engine fails only on a prompt that cannot be answered, and will again: that counts as wrong.
        if lost and not spare and engine.identity.kind == "openai":
            raise EngineError(
                f"{what}: {len(lost)} of {len(done)} calls failed: {lost[0].error}",
                "The other answers are kept. Give the same command again when the server answers.",
            )
        return done

    def _completion(self, key: str) -> Completion:
        row = self._log.get(key)
        if row is None:
            return self._failed[key]
        names = ("text", "finish", "prompt_tokens", "completion_tokens", "cached_tokens")
        return Completion(**{name: row[name] for name in names})

    def choose(
        self,
        engine: Engine,
        groups: Sequence[Sequence[str]],
        choices: Sequence[Sequence[str]],
        what: str,
    ) -> NDArray[np.float64]:
        """Return log-probabilities ``[n_group, n_prompt, n_choice]`` of `choices` after each prompt.

        The prompts of one group should begin alike: what they share is computed once. `choices`
        are those of each prompt of a group; shorter lists are padded with NaN.
        """
        identity = engine.identity.key()
        width = max(len(options) for options in choices)
        scores = np.full((len(groups), len(choices), width), np.nan)
        with self._reporter.bar(what, len(groups) * len(choices)) as step:
            for g, prompts in enumerate(groups):
                key = content_key("choose", identity, list(prompts), [list(c) for c in choices])
                row = self._log.get(key)
                kept = len(prompts) if row is not None else 0
                if row is None:
                    row = {"key": key, "what": what, "logp": _choose_ragged(engine, prompts, choices)}
                    self._log.append([row])
                self._count(len(prompts) - kept, kept)
                step(len(prompts), 0, kept)
                for i, values in enumerate(row["logp"]):
                    scores[g, i, : len(values)] = values
        return scores

    def _count(self, made: int, kept: int) -> None:
        self.made += made
        self.kept += kept


def _choose_ragged(
    engine: Engine, prompts: Sequence[str], choices: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Score prompts that have the same choices together; the letters of a list differ between questions."""
    found: dict[int, list[float]] = {}
    for options in sorted({tuple(c) for c in choices}):
        mine = [i for i, c in enumerate(choices) if tuple(c) == options]
        for i, values in zip(mine, engine.choose("", [prompts[i] for i in mine], options), strict=True):
            found[i] = [round(float(value), 6) for value in values]
    return [found[i] for i in range(len(prompts))]


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
