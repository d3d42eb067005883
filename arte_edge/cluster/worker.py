"""What runs on the nodes of a cluster: one process with engines (`Worker`), and what is checked of a node before.

Arguments and results are small values of this package. A model is described, not sent: each node finds it by its
path or its registry name and compares its sha256 (`arte_edge.models.resolve.found_here`).
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge.cache import sha256_file
from arte_edge.errors import ArteError, InputError
from arte_edge.models.resolve import LocalModel, found_here
from arte_edge.runtimes.completion import Engine, EngineIdentity, Method
from arte_edge.runtimes.loader import Kind, open_local
from arte_edge.runtimes.openai.vllm_process import VllmServer, VllmSettings, vllm_command


@dataclass(frozen=True)
class EngineSpec:
    """What a worker opens: by `open_local`, or with `vllm` on a server of its own, which it starts.

    `adapter` is a path that every node sees, and its sha256 in the run; `sum` is the path's `adapter_sum`.
    """

    model: LocalModel
    kind: Kind
    parallel: int
    dtype: str = ""
    adapter: tuple[Path, str] | None = None
    sum: str = ""
    vllm: VllmSettings | None = None


@dataclass(frozen=True)
class EngineFacts:
    """What the driver needs to know of an engine; the same on every worker."""

    identity: EngineIdentity
    chat_template: str | None
    special_tokens: dict[str, str]
    supports_grammar: bool
    in_flight: int = 0  # calls that it takes at once, 0: it does not say


@dataclass(frozen=True)
class NodeFacts:
    """A node's versions of what must be equal everywhere, and whether it sees the run's folder."""

    versions: dict[str, str]
    sees_run: bool


def versions() -> dict[str, str]:
    """Return the versions that all machines of a cluster must share."""
    import ray

    import arte_edge

    return {"Python": platform.python_version(), "ray": ray.__version__, "arte-edge": arte_edge.__version__}


def node_facts(run_file: tuple[str, str], models: Sequence[LocalModel], *, vllm: bool = False) -> NodeFacts:
    """Return the facts of the machine that this runs on, once it has found `models`.

    `run_file` is the path of a file in the run's folder and its sha256. Models are looked for only where the
    versions can be compared first, by a call without any; so is `vllm`, if workers start it.

    Raises ArteError: a model is not here and cannot be fetched, or is another one; or there is no vLLM.
    """
    with _named():
        if vllm and models:
            vllm_command()
        for model in models:
            found_here(model)
    path, sha256 = Path(run_file[0]), run_file[1]
    return NodeFacts(versions(), path.is_file() and sha256_file(path) == sha256)


@contextmanager
def _named() -> Iterator[None]:
    """Put this machine's name in front of an error's message."""
    try:
        yield
    except ArteError as error:
        raise type(error)(f"On {socket.gethostname()}: {error.message}", error.hint) from error


def adapter_sum(path: Path) -> str:
    """Return the sha256 of an adapter's weights: a GGUF file, or PEFT's folder. Raises InputError: it is not here."""
    weights = path if path.is_file() else path / "adapter_model.safetensors"
    if not weights.is_file():
        raise InputError(f"{path}: no such adapter", "A run on a cluster needs a folder that every node sees.")
    return sha256_file(weights)


class Worker:
    """The process of one actor: it opens engines when they are first needed, and keeps them.

    A worker that was started again opens what the next call names, so that no call depends on an earlier one.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Take over the settings of the driver; runtimes are imported after that."""
        os.environ.update(environment)
        self._engines: dict[EngineSpec, Engine] = {}
        self._servers: dict[tuple[str, VllmSettings], VllmServer] = {}  # by the model's sha256
        self._n_started = 0  # servers

    def open(self, spec: EngineSpec | None) -> EngineFacts | None:
        """Open an engine; with None only say that this worker is up.

        Raises ArteError: this node has no such model or adapter, or cannot run it.
        """
        if spec is None:
            return None
        with _named():
            engine = self._engine(spec)
        return EngineFacts(
            engine.identity,
            engine.chat_template,
            engine.special_tokens,
            engine.supports_grammar,
            getattr(engine, "in_flight", 0),
        )

    def _drop_ended(self) -> bool:
        """Close servers that have ended, which keeps their logs, and their engines; return whether there were any."""
        ended = [key for key, server in self._servers.items() if not server.runs]
        for key in ended:
            for spec in [s for s in self._engines if s.vllm and (s.model.sha256, s.vllm) == key]:
                self._engines.pop(spec).close()
            self._servers.pop(key).close()
        return bool(ended)

    def _engine(self, spec: EngineSpec) -> Engine:
        self._drop_ended()  # while this worker had nothing to do
        if spec not in self._engines:
            model = found_here(spec.model)
            if spec.adapter is not None and adapter_sum(spec.adapter[0]) != spec.sum:
                raise InputError(f"{spec.adapter[0]}: another adapter than the run's", "Its bytes differ.")
            if spec.vllm is not None:
                self._engines[spec] = self._served(model, spec, spec.vllm)
            else:
                self._engines[spec] = open_local(
                    model, kind=spec.kind, parallel=spec.parallel, adapter=spec.adapter, dtype=spec.dtype
                )
        return self._engines[spec]

    def _served(self, model: LocalModel, spec: EngineSpec, settings: VllmSettings) -> Engine:
        """Open an engine on this worker's server of a model, and start that first; Ray has set which GPUs it sees."""
        server = self._servers.get((model.sha256, settings))
        if server is None:
            self._n_started += 1
            log = f"vllm-{socket.gethostname()}-{os.getpid()}-{self._n_started}.log"
            server = self._servers[model.sha256, settings] = VllmServer(model, settings, log)
        return server.engine(spec.adapter[0] if spec.adapter else None, spec.parallel)

    def call(self, spec: EngineSpec, method: Method, arguments: tuple[Any, Any]) -> list[Any]:
        """Return what a method of the engine returns for one group of calls.

        Where a server has ended the worker ends too: its group goes to another, and it comes up again with a server.
        """
        try:
            with _named():
                return list(getattr(self._engine(spec), method)(*arguments))
        finally:
            if self._drop_ended():
                os._exit(1)

    def count_tokens(self, spec: EngineSpec, text: str) -> int:
        return self._engine(spec).count_tokens(text)

    def with_model(self, _: None, function: Callable[..., Any], model: LocalModel, *arguments: Any) -> Any:
        """Return what `function` returns for this node's copy of a model."""
        with _named():
            return function(found_here(model), *arguments)
