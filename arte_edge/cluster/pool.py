"""The workers of a run on a cluster, and an engine whose groups of calls they share out.

Each worker is a Ray actor that keeps its engines open, and gets one group at a time, so that a dead worker costs the
one it was at work on: another gets that. Ray starts a dead actor again (``max_restarts``), elsewhere if its node is
gone. Ray Data's `map_batches` would do less: it starts its actors, and with them loads the models, for each batch of
calls that a stage sends, hands a block of rows to a task as a whole, and ends the job where a row keeps failing.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from arte_edge.cluster.worker import EngineFacts, EngineSpec, Worker
from arte_edge.errors import ArteError, EngineError
from arte_edge.runtimes.completion import Completion, EngineIdentity, Method, Request, Sampling

MOST_DEATHS = 3  # of workers over the same group, or in a row while one opens an engine; then the run stops
_PATIENCE_S = 600.0  # without a worker at work; a cluster that grows by itself needs minutes
_REST_S = 1.0  # before a dead worker is called again
_TICK_S = 5.0


@dataclass(eq=False)
class _Hand:
    """The driver's view of one worker: its actor, and the engines that it has opened or opens; None: that it is up."""

    actor: Any
    opened: set[EngineSpec | None] = field(default_factory=set)
    opening: dict[EngineSpec | None, Any] = field(default_factory=dict)
    deaths: int = 0  # in a row, while it opens an engine
    rests_until_s: float = 0.0

    def start_opening(self, spec: EngineSpec | None) -> Any:
        """Return the reference of the call that opens an engine; an earlier one may be under way."""
        if spec not in self.opening:
            self.opening[spec] = self.actor.open.remote(spec)
        return self.opening[spec]


@dataclass(frozen=True)
class _Sent:
    """A call under way: group `number` with its arguments, or without them the opening of `spec`."""

    hand: _Hand
    spec: EngineSpec | None
    number: int = -1
    group: Sequence[Any] | None = None


class Pool:
    """`n` workers with `cpus` cores and `gpus` GPUs each; they start with the first call and end with `stop`."""

    def __init__(
        self,
        n: int,
        *,
        cpus: float,
        gpus: float,
        environment: Mapping[str, str],
        warn: Callable[[str], None],
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self.n, self._cpus, self._gpus = n, cpus, gpus
        self._environment, self.warn, self.patience_s = environment, warn, patience_s
        self._hands: list[_Hand] = []
        self.facts_of: dict[EngineSpec, EngineFacts] = {}

    def workers(self) -> list[_Hand]:
        if not self._hands:
            import ray

            actor = ray.remote(Worker).options(
                num_cpus=self._cpus,
                num_gpus=self._gpus,
                max_restarts=-1,
                max_task_retries=0,  # a group is given to whoever is free, not to the same actor
                scheduling_strategy="SPREAD",
            )
            self._hands = [_Hand(actor.remote(dict(self._environment))) for _ in range(self.n)]
        return self._hands

    def stop(self) -> None:
        """End the workers: training needs their memory and GPUs. The next call starts others."""
        import ray

        for hand in self._hands:
            ray.kill(hand.actor, no_restart=True)
        self._hands.clear()

    def facts(self, spec: EngineSpec) -> EngineFacts:
        """Open an engine on every worker, and return what the first one says of it.

        Raises ArteError: see `each`.
        """
        if spec not in self.facts_of:
            for _ in self.each(spec, "open", ()):
                pass
        return self.facts_of[spec]

    def any(self, spec: EngineSpec | None, what: str, *arguments: Any) -> Any:
        """Return what one worker's method returns; see `each`."""
        return next(iter(self.each(spec, what, [arguments])))[1]

    def each(self, spec: EngineSpec | None, what: str, groups: Iterable[Sequence[Any]]) -> Iterator[tuple[int, Any]]:
        """Yield the number of each group and what the workers' method `what` returns for it, as they arrive.

        A worker gets the first group once it has opened the engine of `spec`, or for None once it is up.

        Raises:
            EngineError: workers keep dying, none comes up, or an engine failed.
            ArteError: what a worker raised; its message names the node.
        """
        shared = _Shared(self, spec, what, groups)
        while shared.give():
            for reference in shared.ended():
                yield from shared.take(reference)
            shared.check_patience()

    def compare(self, spec: EngineSpec, found: EngineFacts) -> None:
        """Keep the first worker's facts of an engine. Raises EngineError: another worker's differ."""
        first = self.facts_of.setdefault(spec, found)
        if found != first:
            one, other = first.identity, found.identity
            differ = [
                f"{name} {getattr(one, name)} and {getattr(other, name)}"
                for name in vars(one)
                if getattr(one, name) != getattr(other, name)
            ] or ["chat templates or special tokens"]
            raise EngineError(
                f"{spec.model.name}: the nodes of the cluster run it differently: {'; '.join(differ)}",
                "Rows would depend on the node. Give all of them the same packages and the same kind of processor.",
            )

    def what_is_free(self) -> str:
        """Return in words what workers need and what the cluster has left."""
        import ray

        left = ray.available_resources()
        gpus = f" and {self._gpus:g} GPUs" if self._gpus else ""
        free = f"{left.get('CPU', 0):g} cores and {left.get('GPU', 0):g} GPUs are free in the whole cluster"
        return f"each needs {self._cpus:g} cores{gpus}; {free}. Other jobs may hold the rest."


class _Shared:
    """One `Pool.each` in progress: which groups are left, and who has which."""

    def __init__(self, pool: Pool, spec: EngineSpec | None, what: str, groups: Iterable[Sequence[Any]]) -> None:
        self._pool, self._spec, self._what = pool, spec, what
        self._todo = enumerate(groups)
        first = next(self._todo, None)
        self._again: deque[tuple[int, Sequence[Any]]] = deque([first] if first else [])
        self._deaths: Counter[int] = Counter()
        self._flying: dict[Any, _Sent] = {}
        # Nothing to do starts no worker.
        self._idle = [] if first is None and spec in pool.facts_of else list(pool.workers())
        self._up_s, self._warned, self._why = time.monotonic(), False, ""

    def give(self) -> bool:
        """Give every idle worker something to do; return False when all groups are done."""
        waiting = []
        following = self._next()
        # Those whose engine is open come first.
        for hand in sorted(self._idle, key=lambda hand: self._spec not in hand.opened):
            missing = [spec for spec in dict.fromkeys((None, self._spec)) if spec not in hand.opened]
            if hand.rests_until_s > time.monotonic() or not (missing or following):
                waiting.append(hand)
            elif missing:
                self._flying[hand.start_opening(missing[0])] = _Sent(hand, missing[0])
            elif following:
                number, group = following
                self._flying[self._submit(hand, group)] = _Sent(hand, self._spec, number, group)
                following = self._next()
        self._idle = waiting
        if following:
            self._again.appendleft(following)
            return True
        open_somewhere = self._spec in self._pool.facts_of or any(self._spec in hand.opened for hand in waiting)
        return not open_somewhere or any(sent.group is not None for sent in self._flying.values())

    def _next(self) -> tuple[int, Sequence[Any]] | None:
        return self._again.popleft() if self._again else next(self._todo, None)

    def _submit(self, hand: _Hand, group: Sequence[Any]) -> Any:
        import ray

        try:
            return getattr(hand.actor, self._what).remote(self._spec, *group)
        except ray.exceptions.RayError as error:  # the object store is full
            raise translated(error) from error

    def ended(self) -> list[Any]:
        """Wait a moment; return the references of calls that have ended."""
        import ray

        if not self._flying:
            time.sleep(_REST_S)
            return []
        timeout_s = _REST_S if self._idle else _TICK_S
        return list(ray.wait(list(self._flying), num_returns=1, timeout=timeout_s)[0])

    def take(self, reference: Any) -> Iterator[tuple[int, Any]]:
        """Yield the result of a call that has ended, if it was of a group; a dead worker's group is given again."""
        import ray

        sent, errors = self._flying.pop(reference), ray.exceptions
        self._idle.append(sent.hand)
        try:
            value = ray.get(reference)
        except (  # the last: the worker ended well, and its result was lost with the node
            errors.RayActorError,
            errors.OutOfMemoryError,
            errors.NodeDiedError,
            errors.ObjectLostError,
        ) as error:
            self._died(sent, error)
        except ray.exceptions.RayError as error:
            raise translated(error) from error
        else:
            if sent.group is not None:
                yield sent.number, value
                return
            if sent.spec is not None:
                self._pool.compare(sent.spec, value)
                sent.hand.deaths = 0
            sent.hand.opened.add(sent.spec)
            sent.hand.opening.pop(sent.spec, None)

    def _died(self, sent: _Sent, error: Exception) -> None:
        """Note that a worker died over a call. Raises EngineError: for the third time over the same one."""
        sent.hand.opened.clear()
        sent.hand.opening.clear()
        sent.hand.rests_until_s = time.monotonic() + _REST_S
        self._why = reason(error)
        if sent.group is not None:
            self._deaths[sent.number] += 1
            self._again.append((sent.number, sent.group))
            n, over = self._deaths[sent.number], f"over {_shown(sent.group)}"
        elif sent.spec is not None:
            sent.hand.deaths += 1
            n, over = sent.hand.deaths, f"while they opened {sent.spec.model.name}"
        else:  # not up again yet, which `check_patience` bounds
            return
        if n >= MOST_DEATHS:
            more, vllm = "", sent.spec.vllm if sent.spec else None
            if sent.group and callable(sent.group[0]):
                more = "ARTE_EDGE_PROBE=0 takes the usual engine without a comparison of several. "
            if vllm is not None:
                more = f"A vLLM that ends also ends its worker: its log is the newest {vllm.logs}/vllm-*.log. "
            raise EngineError(
                f"{n} workers died {over}: {self._why}",
                f"A node that is short of memory kills its workers: see Ray's logs there. {more}What was finished is "
                "stored, and the same command resumes.",
            ) from error
        self._pool.warn(f"1 of {self._pool.n} workers died {over}, the others continue: {self._why[:200]}")

    def check_patience(self) -> None:
        """Say that no worker is up. Raises EngineError: for too long."""
        if any(None in hand.opened for hand in self._pool.workers()):
            self._up_s = time.monotonic()
            return
        waited_s = time.monotonic() - self._up_s
        if waited_s > self._pool.patience_s:
            raise EngineError(
                f"No worker came up in {waited_s:.0f} s{f': {self._why}' if self._why else ''}",
                self._pool.what_is_free(),
            )
        if waited_s > self._pool.patience_s / 10 and not self._warned:
            self._warned = True
            self._pool.warn(f"waiting for workers of the cluster: {self._pool.what_is_free()}")


def translated(error: Exception, where: str = "") -> ArteError:
    """Return one of Ray's errors as ours; `where` comes first in its message."""
    import ray

    cause = getattr(error, "cause", None)
    if isinstance(cause, ArteError):
        return type(cause)(cause.message, cause.hint)
    if isinstance(error, ray.exceptions.ObjectStoreFullError | ray.exceptions.OutOfDiskError):
        return EngineError(
            f"{where}The object store of the cluster is full: {reason(error)}",
            "Other jobs hold it, or it is small: start the nodes with a larger --object-store-memory. What was "
            "finished is stored, and the same command resumes.",
        )
    return EngineError(
        f"{where}A worker of the cluster failed: {reason(cause or error)}",
        "Ray's logs on that node say more. What was finished is stored, and the same command resumes.",
    )


def reason(error: BaseException) -> str:
    """Return what Ray says, on one line."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def _shown(group: Sequence[Any]) -> str:
    """Return how many calls a group has and the end of its first prompt, by which its rows are found in the data.

    Of a function on a node return its name and its model's.
    """
    if callable(group[0]):
        return f"{group[0].__name__.strip('_')} of {group[1].name}"
    first = group[1][0] if group[0] in get_args(Method) else group
    prompt = " ".join(str(getattr(first[0], "prompt", first[0])).split())
    return f"a group of {len(first)} calls whose first prompt ends in “{prompt[-120:]}”"


class ClusterEngine:
    """An `Engine` and `SpreadEngine` whose calls the workers of a pool make; the driver loads no weights."""

    def __init__(self, pool: Pool, spec: EngineSpec) -> None:
        """Open it on the workers. Raises ArteError: see `Pool.each`."""
        self._pool, self._spec = pool, spec
        facts = pool.facts(spec)
        self.identity: EngineIdentity = facts.identity
        self.chat_template = facts.chat_template
        self.special_tokens = facts.special_tokens
        self.supports_grammar = facts.supports_grammar
        self.in_flight = facts.in_flight
        self._counted = lru_cache(maxsize=100_000)(lambda text: int(pool.any(spec, "count_tokens", text)))

    def each(self, method: Method, groups: Iterable[tuple[Any, Any]]) -> Iterator[tuple[int, list[Any]]]:
        """See `SpreadEngine.each`."""
        return self._pool.each(self._spec, "call", ((method, arguments) for arguments in groups))

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine.complete`; one worker makes all the calls."""
        return next(self.each("complete", [(requests, sampling)]))[1]

    def choose_each(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        """See `Engine.choose_each`; one worker makes all the calls."""
        return next(self.each("choose_each", [(prompts, choices)]))[1]

    def count_tokens(self, text: str) -> int:
        return self._counted(text)

    def close(self) -> None:
        """Nothing: `Pool.stop` ends the workers, and the engines with them."""
