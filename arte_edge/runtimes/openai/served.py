"""The engine for a model whose weights are here and which vLLM's servers run: several addresses, LoRA adapters.

Prompts are rendered and tokenized here and sent as token ids: what a server reads is what training read, whatever its
own template and tokenizer do. That it has these weights is checked, not believed: the log-probabilities of a fixed
text are compared with those of our own copy.

An adapter's name and folder on a server come from its sha256. So no server answers with an older one of the same name,
and none from the keys and values that it cached for an older one (vLLM keys these by name and path). It is loaded when
the engine opens and unloaded when it closes; what a killed run left on a server its next engine unloads.

Every server gets its own part of the sorted prompts, which keeps shared prefixes together, and then takes what the
others have left. One that is gone hands its rows to the others, and is tried again with the next batch. A row whose
call failed is sent to one more server before the failure counts as the row's; a server whose calls fail one after
another is left out.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from arte_edge import transformers_load as hf
from arte_edge.cache import cached_measurement, disk_errors
from arte_edge.errors import ArteError, EngineError, InputError
from arte_edge.model_folder import end_ids
from arte_edge.runtimes.choice_scoring import ChoiceScorer
from arte_edge.runtimes.completion import Completion, EngineIdentity, Request, Sampling
from arte_edge.runtimes.openai.client import CallFailed, CircuitBreaker, RateLimiter, RetryPolicy, Server
from arte_edge.runtimes.openai.engine import OpenAIEngine
from arte_edge.store import link_folder

if TYPE_CHECKING:
    from arte_edge.runtimes.transformers.tokenizer import Text

T = TypeVar("T")
R = TypeVar("R")

_START = (
    "Start the server so: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank N, "
    "with N at least align.lora_rank."
)
# Names, numbers, code and another language: models of one family differ here.
_TEXT = (
    "The committee, which Dr. Alvarez chaired until 1987, bought 14 telescopes for the observatory in Antofagasta; "
    "none of them was ever used. In German, good morning is Guten Morgen. def area(radius): return 3.14159 * radius"
)
# Mean difference a token from our copy. Measured (docs/runtimes.md): bfloat16 0.04, 8 bits up to 0.08, float8 0.15.
# A close relative may be as near as float8: from half of it on, a note says so.
_MOST_NATS = 0.2
_MORE = 1.1  # a GPU's free memory for our copy, relative to its files
_MOST_FAILED = 8  # calls in a row, each with all its attempts, after which a server is left out
_OURS = "arte-edge-"  # how the names of our adapters begin
_UNLOAD_S = 20.0  # timeout of unloading an adapter, also on a server that may be gone


@dataclass(frozen=True)
class ServerFolder:
    """A folder for adapters: where it is `here`, and where the servers see it."""

    here: Path
    there: str

    @classmethod
    def parse(cls, text: str, run: Path) -> ServerFolder:
        """Read ``PATH`` or ``HERE:THERE``, a folder of many runs, and take this run's in it; empty: ``served/`` of it.

        An adapter's name is the same in every run: by its folder one run knows its own from another's.
        """
        run = run.absolute()
        given, _, there = text.partition(":")
        if not given:
            return cls(run / "served", str(run / "served"))
        own = f"{run.name}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}"
        shared = Path(given).expanduser().absolute()
        return cls(shared / own, f"{there.rstrip('/') or shared}/{own}")


class ServedEngine:
    """An `Engine` over servers that run one known model, with or without an adapter."""

    supports_grammar = True
    _in_use: ClassVar[set[str]] = set()  # paths on servers of the adapters of this process's open engines

    def __init__(
        self,
        urls: Sequence[str],
        checkpoint: Path,
        sha256: str,
        folder: ServerFolder,
        *,
        name: str = "",
        adapter: Path | None = None,
        aligns: bool = False,
        parallel: int = 32,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        timeout_s: float = 120.0,
        retry: RetryPolicy | None = None,
        key: str = "",
        uds: str = "",
    ) -> None:
        """Connect to every server, check its weights and load the adapter into it.

        Args:
            urls: base addresses. One that does not answer is left out, and named in `notes`.
            checkpoint: our copy of the weights, with tokenizer and chat template.
            sha256: of the weights, for the identity.
            folder: where the servers find the adapter; it is put there.
            name: of the model on the servers; empty: the one that they list.
            adapter: a PEFT folder, or None.
            aligns: an adapter will follow: a server that takes none is an error now.
            parallel: requests that each server gets at once.
            requests_per_minute: of each server, None: no limit.
            tokens_per_minute: of each server, None: no limit.
            timeout_s: of one request, seconds.
            retry: how often a call is tried.
            key: of the servers; empty: the environment's.
            uds: the Unix socket of the only server; empty: they listen on ports.

        Raises InputError: a server with another model or other weights, without LoRA, or that cannot read the
        adapter; CallFailed: no server answers, or one refuses the key.
        """
        from arte_edge.runtimes.transformers.model import adapter_sha256
        from arte_edge.runtimes.transformers.tokenizer import Text

        tokenizer = hf.load_tokenizer(checkpoint)
        self.text = Text(tokenizer, end_ids(checkpoint))
        self.chat_template: str | None = tokenizer.chat_template
        self.notes: list[str] = []  # what a user should know of the servers
        adapter_sha = adapter_sha256(adapter) if adapter else ""
        self.identity = EngineIdentity("openai", sha256, adapter=adapter_sha, runtime="vllm")
        self.in_flight = parallel * len(urls)  # requests that the servers take at once
        self._urls, self._checkpoint, self._folder, self._name = tuple(urls), checkpoint, folder, name
        self._adapter, self._aligns = adapter, aligns
        self._adapter_name = f"{_OURS}{adapter_sha[:32]}"
        self._root = f"{folder.there}/{self._adapter_name}"  # of the adapter, as the servers see it
        self._retry, self._timeout_s = retry or RetryPolicy(), timeout_s
        self._settings: dict[str, Any] = {
            "max_concurrency": parallel,
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "key": key,
            "uds": uds,
        }
        self._lock = threading.Lock()
        self._live: dict[str, OpenAIEngine] = {}
        self._gone: dict[str, CallFailed] = {}
        self._breakers = {url: CircuitBreaker(_MOST_FAILED) for url in self._urls}
        self._loaded: set[str] = set()  # addresses into which this engine loaded the adapter
        self._left: dict[str, bool] = {}  # adapters of a killed run: whether each server unloaded it
        if adapter is not None:
            self._in_use.add(self._root)
        try:
            for url in self._urls:
                self._open(url)
            for name, unloaded in self._left.items():
                if unloaded and not self._gone:
                    shutil.rmtree(folder.here / name, ignore_errors=True)
            if not self._live:
                raise next(iter(self._gone.values()))
        except BaseException:
            self.close()
            raise

    @property
    def special_tokens(self) -> dict[str, str]:
        return {"bos_token": self.text.bos, "eos_token": self.text.eos}

    def count_tokens(self, text: str) -> int:
        return len(self.text.tokens(text))

    def close(self) -> None:
        """Unload the adapter, also from servers that are left out, then remove its folder; close the connections.

        What is not unloaded, and where, is added to `notes`; its folder stays for the run's next engine to find.
        """
        for engine in self._live.values():
            engine.close()
        unloaded = [self._unload(url, self._adapter_name) for url in sorted(self._loaded)]
        if unloaded and all(unloaded):
            shutil.rmtree(self._folder.here / self._adapter_name, ignore_errors=True)
            with suppress(OSError):  # others are in it
                self._folder.here.rmdir()
        self._loaded.clear()
        self._in_use.discard(self._root)
        self._live.clear()

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine.complete`. A failed row has finish "error" and the reason.

        Raises InputError: a server that came back as another one.
        """
        order = sorted(range(len(requests)), key=lambda i: (requests[i].prompt, requests[i].sample))
        sent = [requests[i] for i in order]
        found = self._share(sent, lambda engine, request: engine.one(request, sampling))
        rows: dict[int, Completion] = {}
        for i, (row, error) in zip(order, found, strict=True):
            lost = Completion("", "error", error=str(error), fault="server")
            # Servers that answer others but not this prompt: they are too slow for it, or break.
            own = row is not None and row.fault == "server" and self._live
            rows[i] = lost if row is None else replace(row, fault="row") if own else row
        return [rows[i] for i in range(len(requests))]

    def choose_each(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        """See `Engine.choose_each`: one call for each place where choices go apart.

        Raises InputError: no prompt before the choices; CallFailed: a server cannot read one, or none is left.
        """
        scorers = ChoiceScorer.each(self.text.tokens, prompts, choices)
        needed: dict[tuple[int, ...], set[int]] = {}
        for scorer in scorers:
            for context, tokens in scorer.contexts.items():
                needed.setdefault(context, set()).update(tokens)
        contexts = sorted(needed)

        def score(engine: OpenAIEngine, context: tuple[int, ...]) -> tuple[dict[int, float] | None, CallFailed | None]:
            try:
                return engine.next_logp(context, sorted(needed[context])), None
            except CallFailed as error:
                return None, error

        scores: dict[tuple[int, ...], dict[int, float]] = {}
        for context, (found, error) in zip(contexts, self._share(contexts, score), strict=True):
            if error is not None or found is None:
                raise error or EngineError("no server is left")
            scores[context] = found
        for scorer in scorers:
            for context in scorer.contexts:
                scorer.note(context, scores[context])
        return [scorer.log_probabilities() for scorer in scorers]

    def _open(self, url: str) -> None:
        """Make `url` one of the live servers, or note why it is none.

        Raises InputError, or a CallFailed that is fatal: something that the user has to change.
        """
        engine = None
        try:
            listed = self._models(url)
            base = self._base_name(url, listed)
            engine = self._connect(url, base)
            self._check_weights(url, engine)
            if self._aligns and self._adapter is None:
                self._check_lora(url)
            self._unload_left(url, listed)
            if self._adapter is not None:
                if self._adapter_name not in listed:
                    self._load(url, self._adapter, self._root)
                elif listed[self._adapter_name].get("root") == self._root:  # of this run, which was killed
                    self._loaded.add(url)
                engine.close()
                engine = self._connect(url, self._adapter_name)
        except BaseException as error:
            if engine is not None:
                engine.close()
            if not isinstance(error, CallFailed) or error.fatal:
                raise
            known = self._gone.get(url)
            self._gone[url] = error
            if known is None or known.message != error.message:
                self.notes.append(f"{url} is left out until it answers: {error.message}")
            return
        self._live[url], self._breakers[url] = engine, CircuitBreaker(_MOST_FAILED)
        if self._gone.pop(url, None):
            self.notes.append(f"{url} answers again")

    def _connect(self, url: str, name: str) -> OpenAIEngine:
        how: dict[str, Any] = {"mode": "completions", "timeout_s": self._timeout_s, "retry": self._retry}
        return OpenAIEngine(name, url, text=self.text, **how, **self._settings)

    def _call(self, url: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = None) -> Any:
        """Get what is at `path`, or send `body` there, once; its answer is text."""
        retry = self._retry if body is None else RetryPolicy(attempts=1)  # 500 is what a bad adapter gets
        server = self._server(url, timeout_s or self._timeout_s, retry)
        try:
            return server.call(path, body, plain=body is not None)
        finally:
            server.close()

    def _server(self, url: str, timeout_s: float, retry: RetryPolicy) -> Server:
        how = {name: self._settings[name] for name in ("key", "uds")}
        return Server(url, timeout_s=timeout_s, retry=retry, limiter=RateLimiter(), **how)

    def _models(self, url: str) -> dict[str, dict[str, Any]]:
        document = self._call(url, "/models")
        entries = document.get("data") if isinstance(document, dict) else None
        return {str(entry.get("id")): entry for entry in entries or () if isinstance(entry, dict)}

    def _base_name(self, url: str, listed: Mapping[str, Mapping[str, Any]]) -> str:
        """Return the server's name of the model; one without a parent is no adapter."""
        names = [name for name, entry in listed.items() if not entry.get("parent")]
        if self._name in names or (len(names) == 1 and not self._name):
            return self._name or names[0]
        there = f"It lists {', '.join(names) or 'no model'}."
        if self._name:
            raise InputError(f"teacher.server_model: {url} serves no model named '{self._name}'", there)
        raise InputError(f"{url} does not list one model", f"{there} Name the teacher's: teacher.server_model.")

    def _check_weights(self, url: str, engine: OpenAIEngine) -> None:
        ids = self.text.tokens(_TEXT)
        try:
            theirs = engine.prompt_logp(ids)
            engine.next_logp(ids, ids[:1])
        except CallFailed as error:
            # A server that gave them before, or was not there, and fails now has a fault, not another kind.
            if error.fatal or (not error.status and (url in self._gone or not error.text)):
                raise
            raise InputError(
                f"{url} does not give the log-probabilities by which its weights are checked: {error.message}",
                'teacher.server takes vLLM\'s server, from 0.32. Of others: teacher.model = "openai:MODEL@URL", not '
                "aligned.",
            ) from error
        ours = reference(self._checkpoint, self.identity.model, self.text)
        nats = float(np.abs(np.subtract(theirs, ours)).mean())
        if not nats <= _MOST_NATS:
            raise InputError(
                f"{url}: '{engine.model}' has other weights than teacher.model: the log-probabilities of "
                f"{len(theirs)} tokens differ by {nats:.2f} nats in the mean, those of the same weights by at most "
                f"{_MOST_NATS:g}",
                f"Serve {self._checkpoint}, or set teacher.model to what is served.",
            )
        if nats > _MOST_NATS / 2:
            self.notes.append(
                f"{url}: '{engine.model}' differs from teacher.model by {nats:.2f} nats a token, more than weights of "
                f"8 bits do (an error above {_MOST_NATS:g}): it may be a fine-tuned copy, or have an adapter merged"
            )

    def _check_lora(self, url: str) -> None:
        """Raise InputError unless the server would load an adapter: it looks for one that is not there."""
        path = f"{self._folder.there}/none"
        try:
            self._call(url, "/load_lora_adapter", {"lora_name": "arte-edge-none", "lora_path": path})
        except CallFailed as error:
            if "No adapter found" not in error.text:
                raise _not_loaded(url, path, error) from error

    def _load(self, url: str, adapter: Path, there: str) -> None:
        """Put the adapter where the server sees it and load it. Raises InputError: the server does not take it."""
        here = self._folder.here / self._adapter_name
        if not here.is_dir():
            with disk_errors(here):
                here.parent.mkdir(parents=True, exist_ok=True)
            link_folder(adapter, here)
        try:
            self._call(url, "/load_lora_adapter", {"lora_name": self._adapter_name, "lora_path": there})
        except CallFailed as error:
            if "already been loaded" not in error.text:  # by another run
                raise _not_loaded(url, there, error) from error
        else:
            self._loaded.add(url)

    def _unload(self, url: str, name: str) -> bool:
        """Unload an adapter and return whether the server holds it no more; if not, `notes` says why."""
        try:
            timeout_s = min(self._timeout_s, _UNLOAD_S)
            self._call(url, "/unload_lora_adapter", {"lora_name": name}, timeout_s)
        except EngineError as error:
            if isinstance(error, CallFailed) and "cannot be found" in error.text:  # it was started again
                return True
            self.notes.append(f"{url} may still hold the adapter {name}: {error.message}")
            return False
        return True

    def _unload_left(self, url: str, listed: Mapping[str, Mapping[str, Any]]) -> None:
        """Unload what this run, when it was killed, left on the server, but for the adapters that are in use."""
        for name, entry in listed.items():
            root = f"{self._folder.there}/{name}"
            ours = name.startswith(_OURS) and "/" not in name and entry.get("root") == root
            if ours and root not in self._in_use:
                self._left[name] = self._unload(url, name) and self._left.get(name, True)

    def _share(
        self, items: Sequence[T], call: Callable[[OpenAIEngine, T], tuple[R | None, CallFailed | None]]
    ) -> list[tuple[R | None, CallFailed | None]]:
        """Return what `call` returns for each item, from whichever server; None and a reason if no server is left.

        A failure is an item's own once two servers that still are live ones gave it, or the only one.
        """
        done: dict[int, tuple[R | None, CallFailed | None]] = {}
        failed: dict[int, dict[str, tuple[R | None, CallFailed | None]]] = defaultdict(dict)
        broken: set[str] = set()  # dropped in this batch: such a server may pass the check and fail again

        def is_settled(i: int) -> bool:
            return i in done or len(failed[i].keys() & self._live.keys()) >= min(2, len(self._live))

        for _ in range(2 + len(self._urls)):  # a server may come back, or have lost its adapter in a restart
            for url in [url for url in self._gone if url not in broken and self._responds(url)]:
                self._open(url)
            todo = [i for i in range(len(items)) if not is_settled(i)]
            if not todo:
                break
            self._spread(todo, done, failed, lambda engine, i: call(engine, items[i]))
            for url in self._gone:
                if (tripped := self._breakers[url].tripped) is not None and not tripped.fatal:
                    broken.add(url)
        for engine in self._live.values():
            self.notes += engine.notes
            engine.notes.clear()
        reason = next(iter(self._gone.values()), None)
        return [done.get(i) or next(iter(failed[i].values()), (None, reason)) for i in range(len(items))]

    def _spread(
        self,
        todo: Sequence[int],
        done: dict[int, tuple[R | None, CallFailed | None]],
        failed: dict[int, dict[str, tuple[R | None, CallFailed | None]]],
        call: Callable[[OpenAIEngine, int], tuple[R | None, CallFailed | None]],
    ) -> None:
        """Send each of `todo` to a server, and what fails there to one more while there is one that is free."""
        live, new = dict(self._live), [i for i in todo if not failed[i]]
        ends = [len(new) * k // len(live) for k in range(len(live) + 1)]
        own = {url: deque(new[ends[k] : ends[k + 1]]) for k, url in enumerate(live)}
        again = [i for i in todo if failed[i]]  # for a server that they did not fail on

        def take(url: str) -> int | None:
            with self._lock:
                if url in self._gone:
                    return None
                for k, i in enumerate(again):
                    if url not in failed[i]:
                        return again.pop(k)
                if own[url]:
                    return own[url].popleft()
                longest = max(own.values(), key=len)
                return longest.pop() if longest else None

        def work(url: str) -> None:
            while (i := take(url)) is not None:
                value, error = call(live[url], i)
                if error is None:
                    self._breakers[url].succeeded()
                    done[i] = value, None
                    continue
                gone = self._is_gone(url, error)
                with self._lock:
                    if not gone:
                        failed[i][url] = value, error
                    if gone or len(failed[i]) < 2:
                        again.append(i)
                if gone:
                    return

        n_thread = min(self._settings["max_concurrency"], len(todo))
        pool = ThreadPoolExecutor(max_workers=n_thread * len(live))
        try:
            list(pool.map(work, [url for _ in range(n_thread) for url in live]))
        except BaseException:  # Ctrl-C: wake what waits for its next attempt
            for engine in live.values():
                engine.close()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _responds(self, url: str) -> bool:
        server = self._server(url, self._timeout_s, self._retry)
        try:
            return server.responds()
        finally:
            server.close()

    def _is_gone(self, url: str, error: CallFailed) -> bool:
        """Return whether a failed call means that the server gets no more; then it is no longer a live one."""
        breaker = self._breakers[url]
        breaker.failed(error)
        its_own = breaker.tripped is None and (error.status or self._responds(url))  # the call's failure
        if url not in self._gone and its_own:
            return False
        with self._lock:
            if url not in self._gone:
                self._gone[url] = error
                self._live.pop(url).close()
                self.notes.append(f"{url} is left out until it answers: {error.message}")
        return True


def reference(checkpoint: Path, sha256: str, text: Text) -> list[float]:
    """Return our copy's log-probability of each token of `_TEXT` but the first; it is loaded for that once."""
    ids = text.tokens(_TEXT)

    def measure() -> dict[str, Any]:
        import torch

        from arte_edge.runtimes.transformers.model import TransformersEngine
        from arte_edge.runtimes.transformers.placement import pick_device

        device, how = pick_device(), dict[str, Any]()
        n_byte = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < _MORE * n_byte:
            how = {"device": "cpu", "dtype": "bfloat16"}  # a teacher for several GPUs
        engine = TransformersEngine(checkpoint, sha256=sha256, **how)
        try:
            logp = engine.forward.extend(engine.forward.empty(), [list(ids)]).float().log_softmax(-1)
            return {"logp": [float(logp[0, i, token]) for i, token in enumerate(ids[1:])]}
        finally:
            engine.close()

    return cached_measurement("reference", [sha256, *ids], lambda row: list(map(float, row["logp"])), measure)


def _not_loaded(url: str, path: str, error: CallFailed) -> ArteError:
    """Return the error of a server that did not load the adapter at `path`."""
    if not (error.status or error.text) or error.status in (401, 403):
        return error  # it did not answer, or refuses the key
    if "No adapter found" in error.text:
        return InputError(
            f"{url} finds no adapter in {path}",
            "It reads adapters from its own disk: set teacher.server_folder to a folder that it sees too, HERE:THERE "
            "where it sees it in another place.",
        )
    if error.status in (404, 405):
        return InputError(f"{url} takes no adapters: it has no route /load_lora_adapter", _START)
    return InputError(f"{url} does not load an adapter: {error.message}", _START)
