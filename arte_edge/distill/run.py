"""What the stages of one run share: configuration, task, open engines, the store, the reporter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arte_edge.console import Reporter
from arte_edge.distill.calls import Calls
from arte_edge.distill.config import ModelConfig, RunConfig
from arte_edge.distill.deploy import Budget
from arte_edge.distill.settings import build, differences, dump_toml, load_toml
from arte_edge.distill.student_file import base_file
from arte_edge.errors import InputError
from arte_edge.models.local import LocalModel
from arte_edge.models.resolve import resolve
from arte_edge.runtimes.completion import Engine
from arte_edge.runtimes.loader import ServerLimits, is_server, open_engine, open_local
from arte_edge.runtimes.prompt_render import Message, render
from arte_edge.store import CallLog, Stage, write_atomic
from arte_edge.tasks.task import Task

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = ["Run", "open_folder"]

Summary = dict[str, Any]
Quantize = Callable[[Path, Path, str], object]


class Run:
    """One run in progress. Engines open when a stage first needs them and close with the run."""

    def __init__(self, config: RunConfig, task: Task, folder: Path, reporter: Reporter) -> None:
        self.config, self.task, self.folder, self.reporter = config, task, folder, reporter
        self._lock = _locked(folder)
        self._log = CallLog(folder / "calls.jsonl")
        self.calls = Calls(self._log, reporter)
        self._engines: dict[str, Engine] = {}
        self._models: dict[str, LocalModel] = {}
        self._done: dict[str, dict[str, Any]] = {}
        self.budget: Budget | None = None  # of an answer on the device; the pipeline sets it
        self.quantize: Quantize | None = None  # likewise; what `prefer.student_file` is made with

    def engine(self, which: ModelConfig | str) -> Engine:
        """Return the open engine of a configured model or a model reference."""
        model = which if isinstance(which, ModelConfig) else ModelConfig(model=which)
        # One model may be teacher and student: the teacher decodes as it came, the student from F16.
        student = model == self.config.student
        key = f"{model.model}|{model.engine}|{model.parallel}|{student}"
        if key not in self._engines:
            self._engines[key] = (
                open_engine(model.model, parallel=model.parallel, limits=_limits(model))
                if is_server(model.model)
                else open_local(self._deployed(model), kind=model.engine, parallel=model.parallel)
            )
        return self._engines[key]

    def local(self, config: ModelConfig) -> LocalModel:
        """Return the model on disk, fetching it first if need be."""
        if config.model not in self._models:
            self._models[config.model] = resolve(config.model)
        return self._models[config.model]

    def _deployed(self, config: ModelConfig) -> LocalModel:
        """Return the model as it is decoded: the student from its F16 file, any other as it came."""
        model = self.local(config)
        return base_file(model) if config == self.config.student else model

    def identity(self, config: ModelConfig) -> list[Any]:
        """Return what decides the texts of a configured model: an input of stages."""
        weights = config.model if is_server(config.model) else self.local(config).sha256
        return [weights, config.engine, config.template, config.shots]

    def engine_with(
        self, model: LocalModel, adapter: tuple[Path, str] | None, config: ModelConfig, floats: str = ""
    ) -> Engine:
        """Return the open engine of a model on disk, with an optional LoRA adapter (path, sha256)."""
        key = f"{model.sha256}|{adapter}|{config.engine}|{floats}"
        if key not in self._engines:
            self._engines[key] = open_local(
                model, kind=config.engine, parallel=config.parallel, adapter=adapter, floats=floats
            )
        return self._engines[key]

    def most_tokens(self, wanted: int) -> int:
        """Return how many tokens an answer may have: `wanted`, or fewer where the device is slow."""
        return wanted if self.budget is None else min(wanted, self.budget.answer_tokens)

    def deploy_inputs(self) -> dict[str, Any]:
        """Return what a budget adds to the inputs of a stage that keeps to it; without one, nothing."""
        return {} if self.budget is None else {"answer_budget": self.budget.answer_tokens}

    def release(self) -> None:
        """Close every engine: training needs the memory."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def close(self) -> None:
        self.release()
        self._log.close()
        self._lock.release()

    def render(self, engine: Engine, messages: list[Message], prefill: str, config: ModelConfig) -> str:
        """Render `messages` for `engine`, as plain text where the configuration says so."""
        return render(engine, messages, prefill, plain=config.template == "none")

    @property
    def teacher_is_server(self) -> bool:
        return is_server(self.config.teacher.model)

    def stage(
        self,
        name: str,
        inputs: dict[str, Any],
        body: Callable[[Stage], Summary],
        say: Callable[[Summary], str],
    ) -> Summary:
        """Run a stage, or keep it if it is done from the same inputs; return its summary.

        `inputs` are what decides the stage's data: settings, model identities, `outputs` of
        earlier stages. `say` turns the summary into the stage's closing line.
        """
        stage = Stage(self.folder / name, {"stage": name, "seed": self.config.seed, **inputs})
        manifest = stage.manifest()
        kept = manifest is not None
        if manifest is None:
            with self.reporter.stage(name) as clock:
                manifest = stage.finish(body(stage))
            seconds = clock()
        self._done[name] = manifest
        summary: Summary = manifest["summary"]
        self.reporter.done(name, say(summary), None if kept else seconds)
        return summary

    def outputs(self, *names: str) -> dict[str, Any]:
        """Return the file hashes of finished stages, the inputs of a later one."""
        return {name: self._done[name]["files"] for name in names}

    def read(self, stage: str, file: str) -> list[dict[str, Any]]:
        """Return the rows of a finished stage's file."""
        return Stage(self.folder / stage, {}).read(file)


def _limits(model: ModelConfig) -> ServerLimits:
    return ServerLimits(model.requests_per_minute or None, model.tokens_per_minute or None, model.timeout_s)


def _locked(folder: Path) -> FileLock:
    """Keep other processes out of a run folder: two writers would overwrite each other's calls.

    Raises:
        InputError: another process works in it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"{folder}: another process works in this run folder",
            "Wait for it, or give this run another --name.",
        ) from error
    return lock


def open_folder(config: RunConfig, folder: Path, task: Task, *, update: bool) -> None:
    """Make `folder` the folder of this run, or check that it is.

    Raises:
        InputError: it holds another run; names the keys that differ.
    """
    resolved = dump_toml(config)
    path = folder / "run.toml"
    header = f'# The run as resolved. task_sha256 = "{task.sha256}"\n'
    if path.is_file() and not update:
        there = _with_defaults(path)
        keys = differences(there, load_toml_text(resolved))
        same_task = header in path.read_text(encoding="utf-8")
        if keys or not same_task:
            what = ", ".join(keys[:6]) + (", …" if len(keys) > 6 else "") if keys else "the task's examples"
            raise InputError(
                f"{folder} holds another run: {what} differ{'s' if len(keys) == 1 else ''}",
                "Give this run another --name, or go on with --update: finished calls are kept, "
                "and the stages that the change touches are made again.",
            )
        return
    write_atomic(path, (header + resolved).encode())


def _with_defaults(path: Path) -> dict[str, Any]:
    """Return the run in a folder, with the defaults of keys that are younger than it."""
    there = load_toml(path)
    try:
        return load_toml_text(dump_toml(build(str(path), there)))
    except InputError:  # a key that is gone: say so by comparing what is written there
        return there


def load_toml_text(text: str) -> dict[str, Any]:
    """Return TOML text as nested tables."""
    import tomllib

    return tomllib.loads(text)
