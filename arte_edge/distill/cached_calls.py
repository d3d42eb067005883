"""Engine calls cached in the run's store: no call is ever made twice.

Calls are sent in groups of fixed composition. An unfinished group is sent again as a whole, so that
a resumed run decodes the same batches, and gets the same text, as one that was never interrupted.

A kill costs one group, and the end of a group decodes with a batch that is no longer full. The
teacher's long texts go in small groups. The student's answers, where most of the time is spent, go
in groups with the questions of several drafts (`together`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.console import Reporter
from arte_edge.distill.part import ShardLog
from arte_edge.errors import EngineError
from arte_edge.runtimes.completion import Completion, Engine, Method, Request, Sampling, SpreadEngine, without_reasoning
from arte_edge.runtimes.reasoning import OUT_OF_BUDGET
from arte_edge.store import CallLog, content_key

GROUP = 32  # calls that are sent and stored together
MOST_FAILED = 0.2  # share of a stage's calls to a server that may fail, and always one; more stop the run


# Prompts and the choices of each ``[n_prompt][n_choice]``; their shared prefix is computed once.
Prompts = tuple[Sequence[str], Sequence[Sequence[str]]]


_COMPLETION = ("text", "finish", "prompt_tokens", "completion_tokens", "cached_tokens")


class Calls:
    """The calls of one run. `made` counts engine calls of this process, `cached` those found in the store."""

    def __init__(self, log: CallLog, reporter: Reporter, group: int = GROUP, together: int = 160) -> None:
        self._log, self._reporter = log, reporter
        self.group, self.together = group, together
        self._failed: dict[str, Completion] = {}
        self._odd: dict[str, Completion] = {}  # failed, or with reasoning, since `take_counts`
        self.made = 0
        self.cached = 0

    def complete(
        self,
        engine: Engine,
        requests: Sequence[Request],
        sampling: Sampling,
        what: str,
        *,
        so_far: str = "",
        budget: str = "",
        spare: bool = False,
        together: bool = False,
    ) -> list[Completion]:
        """Complete every request, in order; `what` labels the progress bar, and `so_far` what came before it.

        With `budget`, the key of the token limit, a teacher writes: its reasoning is left out. With `together` a
        local model gets them in groups of `Calls.together` instead of `Calls.group`; a server, whose calls may
        cost money, never does.

        Raises:
            EngineError: more calls to a server failed than `MOST_FAILED` allows, and they are not `spare`. A
                stage made of failed calls would look finished, and a dead server like a bad model.
        """
        local = engine.identity.kind != "openai"
        how = sampling.as_dict()
        # A server with known weights says how many it takes at once.
        size = self.together if together and local else max(self.group, getattr(engine, "in_flight", 0))
        keys = [content_key("complete", engine.identity.key(), r.prompt, how, r.sample) for r in requests]
        groups = [list(range(start, min(start + size, len(keys)))) for start in range(0, len(keys), size)]

        by = {"by": engine.identity.short()}

        def known(i: int) -> bool:
            return self._has(keys[i])

        def call(todo: list[int]) -> tuple[list[Request], Sampling]:
            return [requests[i] for i in todo], sampling

        def store(todo: list[int], fresh: Sequence[Completion]) -> int:
            """Store the answers to the calls at these places; return their tokens."""
            rows = [_completion_row(keys[i], what, c) for i, c in zip(todo, fresh, strict=True)]
            self._log.append([row | by for row in rows])
            notes: list[str] = getattr(engine, "notes", [])  # of a server's engine: each is said once
            while notes:
                self._reporter.warn(notes.pop(0))
            self.made += len(todo)
            # A failed call is no finished row of the store; this process still needs its reason.
            self._failed |= {keys[i]: c for i, c in zip(todo, fresh, strict=True) if c.error}
            return sum(c.completion_tokens for c in fresh)

        lost: list[Completion] = []
        n_done = 0

        def check(places: Sequence[int]) -> None:
            """Raise if too many calls failed, with these that are made now. A local model's are not looked at."""
            nonlocal n_done
            if not local and not spare:
                done = [self._completion(keys[i], thinks=bool(budget)) for i in places]
                n_done += len(done)
                lost.extend(c for c in done if c.error)
                self._check_lost(lost, n_done, len(keys), what, advice(lost, budget, sampling.max_tokens))

        def make(todo: list[int]) -> None:
            store(todo, engine.complete(*call(todo)))
            check(todo)

        self._share_out(groups, keys, known, make, what)
        lost.clear()
        n_done = 0  # all are counted below, those of other shards too
        with self._reporter.bar(f"{what}{so_far}", len(requests)) as step:
            for group, todo, fresh in self._sent(engine, "complete", self._planned(keys, groups, known), call):
                tokens = store(todo, fresh)
                self.cached += len(group) - len(todo)
                step(len(group), tokens, len(group) - len(todo))
                check(group)
        done = [self._completion(key, thinks=bool(budget)) for key in keys]
        self._odd |= {k: c for k, c in zip(keys, done, strict=True) if c.error or c.reasoning_tokens}
        return done

    def _planned(
        self, keys: Sequence[str], groups: Sequence[list[int]], known: Callable[[int], bool]
    ) -> list[tuple[list[int], list[int]]]:
        """Return each group with those of its members that are to be sent, equal calls once.

        It is decided before anything is sent, so that it does not depend on what arrives when.
        """
        planned: set[str] = set()
        plan = []
        for group in groups:
            todo = self._missing(keys, group, lambda i: keys[i] in planned or known(i))
            planned.update(keys[i] for i in todo)
            plan.append((group, todo))
        return plan

    def _sent(
        self,
        engine: Engine,
        method: Method,
        plan: Sequence[tuple[list[int], list[int]]],
        call: Callable[[list[int]], tuple[Any, Any]],
    ) -> Iterator[tuple[list[int], list[int], list[Any]]]:
        """Yield each group, what was sent of it, and the results: in order, or as they arrive from a cluster."""
        if not isinstance(engine, SpreadEngine):
            for group, todo in plan:
                yield group, todo, getattr(engine, method)(*call(todo)) if todo else []
            return
        yield from ((group, todo, []) for group, todo in plan if not todo)
        sent = [part for part in plan if part[1]]
        for n, results in engine.each(method, (call(todo) for _, todo in sent)):
            yield *sent[n], results

    def _check_lost(self, lost: Sequence[Completion], n_done: int, n: int, what: str, hint: str) -> None:
        """Raise if too many of the `n_done` of `n` calls to a server failed, or if the server is gone."""
        # A local engine fails only on a prompt that it cannot process, and always will: that counts as wrong.
        gone = [c for c in lost if c.fault == "server"]
        all_of_many = len(lost) == n_done >= min(self.group, n)
        if lost and (gone or all_of_many or len(lost) > max(1, MOST_FAILED * n)):
            limit = "" if gone else f" (up to {MOST_FAILED:.0%} may)"
            raise EngineError(f"{what}: {len(lost)} of {n} calls failed{limit}: {_reasons(gone or lost)}", hint)

    def take_counts(self) -> dict[str, Any]:
        """Return what became of the calls since the last time, nothing if all is well, and count anew."""
        odd, self._odd = list(self._odd.values()), {}
        lost, thought = [c for c in odd if c.error], [c for c in odd if c.reasoning_tokens]
        counts: dict[str, Any] = {}
        if lost:
            counts |= {"failed": len(lost), "reasons": _reasons(lost)}
        if thought:
            tokens = sum(c.reasoning_tokens for c in thought)
            counts |= {"with_reasoning": len(thought), "reasoning_tokens": tokens}
        return counts

    def _share_out(
        self,
        groups: Sequence[Sequence[int]],
        keys: Sequence[str],
        known: Callable[[int], bool],
        make: Callable[[list[int]], Any],
        what: str,
    ) -> None:
        """In a shard: make its groups, and wait for those of others. Raises PartDone: others' are missing."""
        if isinstance(self._log, ShardLog):
            self._log.share_out(groups, keys, known, make, what)

    def _has(self, key: str) -> bool:
        if isinstance(self._log, ShardLog) and key not in self._failed and key in self._log.failed:
            self._failed[key] = _completion_of(self._log.failed[key])
        return key in self._failed or self._log.get(key, *_COMPLETION) is not None

    def _completion(self, key: str, *, thinks: bool) -> Completion:
        row = self._log.get(key, *_COMPLETION)
        done = self._failed[key] if row is None else _completion_of(row)
        return without_reasoning(done) if thinks else done

    def choose(
        self, engine: Engine, groups: Sequence[Sequence[str]], choices: Sequence[Sequence[str]], what: str
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

    def choose_each(self, engine: Engine, prompts_each: Sequence[Prompts], what: str) -> list[list[list[float]]]:
        """Return log-probabilities ``[n_ask][n_prompt][n_choice]`` of prompts with their own choices."""
        who = engine.identity.key()
        keys = [content_key("choose", who, list(p), [list(c) for c in own]) for p, own in prompts_each]

        def known(i: int) -> bool:
            return self._is_scored(keys[i], prompts_each[i][1])

        def count(places: Iterable[int]) -> int:
            return sum(len(prompts_each[i][0]) for i in places)

        def call(todo: list[int]) -> tuple[list[str], list[Sequence[str]]]:
            return _joined([prompts_each[i] for i in todo])

        def store(todo: list[int], fresh: Sequence[NDArray[np.float64]]) -> None:
            rows = iter(fresh)  # one a prompt
            logp = [[_rounded(next(rows)) for _ in prompts_each[i][0]] for i in todo]
            self._log.append([{"key": keys[i], "what": what, "logp": one} for i, one in zip(todo, logp, strict=True)])
            self.made += count(todo)

        packs = list(self._packs(prompts_each, self.together))
        self._share_out(packs, keys, known, lambda todo: store(todo, engine.choose_each(*call(todo))), what)
        with self._reporter.bar(what, count(range(len(keys)))) as step:
            for pack, todo, fresh in self._sent(engine, "choose_each", self._planned(keys, packs, known), call):
                store(todo, fresh)
                made, every = count(todo), count(pack)
                self.cached += every - made
                step(every, 0, every - made)
        return [self._cached(key)["logp"] for key in keys]

    def values(self, keys: Sequence[str], make: Callable[[int], list[float]], what: str) -> list[list[float]]:
        """Return numbers for each key: those in the store, the others by `make` of its place, stored one by one."""

        def known(i: int) -> bool:
            return self._log.get(keys[i], "values") is not None

        def store(places: list[int]) -> None:
            for i in places:
                self._log.append([{"key": keys[i], "what": what, "values": make(i)}])
                self.made += 1

        self._share_out([[i] for i in range(len(keys))], keys, known, store, what)
        with self._reporter.bar(what, len(keys)) as step:
            for i in range(len(keys)):
                cached = known(i)
                store([] if cached else [i])
                self.cached += cached
                step(1, 0, int(cached))
        return [self._cached(key)["values"] for key in keys]

    def _packs(self, prompts_each: Sequence[Prompts], size: int) -> Iterator[list[int]]:
        """Yield the indices of requests for one engine call: as many as bring the prompts to `size`."""
        pack: list[int] = []
        n = 0
        for i, (prompts, _) in enumerate(prompts_each):
            pack.append(i)
            n += len(prompts)
            if n >= size:
                yield pack
                pack, n = [], 0
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


def _joined(prompts_each: Sequence[Prompts]) -> tuple[list[str], list[Sequence[str]]]:
    """Return the prompts of several requests, and the choices of each prompt, for one engine call."""
    prompts = [prompt for some, _ in prompts_each for prompt in some]
    return prompts, [own for _, some in prompts_each for own in some]


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [round(float(value), 6) for value in values]


def _reasons(lost: Sequence[Completion]) -> str:
    """Return the reasons of failed calls, the most frequent first."""
    found = Counter(" ".join(c.error.split())[:200] for c in lost).most_common(3)
    return found[0][0] if len(found) == 1 else "; ".join(f"{n} × {reason}" for reason, n in found)


def advice(done: Sequence[Completion], budget: str, max_tokens: int) -> str:
    """Return what helps against the failed of some calls; `budget` is the key of their limit of `max_tokens`."""
    lost = [c for c in done if c.error]
    if lost and Counter(c.error for c in lost).most_common(1)[0][0] == OUT_OF_BUDGET:
        key = f"Raise {budget} (now {max_tokens})" if budget else f"{max_tokens} tokens are too few"
        return f"{key}: a reasoning model thinks first. Or switch its reasoning off on the server."
    if all(c.fault in ("answer", "row") for c in lost):
        return "The server would answer the same again: give another teacher.model, or lift what the reason names."
    return (
        "The other answers are stored: run the same command again when the server responds. If it is overloaded, "
        "lower teacher.parallel or set teacher.requests_per_minute; if it is slow, raise teacher.timeout_s."
    )


_RARE = ("error", "reasoning_tokens", "fault")  # in a row of the store only if they are anything


def _completion_of(row: dict[str, Any]) -> Completion:
    return Completion(**{f.name: row[f.name] for f in fields(Completion) if f.name in row})


def _completion_row(key: str, what: str, completion: Completion) -> dict[str, Any]:
    # An error that the server answered with, and was paid for, is a finished call: it is not asked again.
    status = "error" if completion.error and completion.fault != "answer" else "ok"
    values = {name: value for name, value in asdict(completion).items() if value or name not in _RARE}
    return {"key": key, "what": what, "status": status, **values}
