"""What the stages of one run share: configuration, task, open engines, the store, the reporter.

A stage opens its folder with `RunContext.stage` and reads top to bottom:

    with run.stage("prefer", inputs, describe) as stage:
        if stage.todo:
            ... compute, stage.write(name, rows), stage.finish(summary)
    return stage.summary
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from arte_edge.asking.form import Asked, Asking, Form, asked
from arte_edge.cache import Progress, write_atomic
from arte_edge.console import Reporter, doing, model_progress
from arte_edge.distill.aligned import AlignedTeacher, aligned_teacher
from arte_edge.distill.cached_calls import Calls
from arte_edge.distill.config import ModelConfig, RunConfig, TeacherConfig, build, differences, dump_toml, load_toml
from arte_edge.distill.part import Part, PartDone, ShardLog, ShardStage, locked, merge_shards
from arte_edge.errors import ArteError, InputError
from arte_edge.files import read_json, toml_loads
from arte_edge.models.resolve import LocalModel, f16_student, resolve
from arte_edge.runtimes.completion import Engine
from arte_edge.runtimes.loader import Kind, ServerLimits, is_server, open_engine, open_local, teacher_kind
from arte_edge.runtimes.prompt_render import CHAT_JSON_NEW_TURN, Message, render
from arte_edge.store import CallLog, Stage, content_key, link_folder
from arte_edge.tasks.task import Task

if TYPE_CHECKING:
    from arte_edge.cluster.connect import RayCluster
    from arte_edge.distill.latency import Budget
    from arte_edge.runtimes.openai.vllm_process import VllmServer

T = TypeVar("T")

Row = dict[str, Any]
Summary = dict[str, Any]
Role = Literal["labels", "inputs"]


class RunContext:
    """One run in progress. Engines open when a stage first needs them and close with the run.

    A stage that one of the `siblings`, folders of other runs, has finished from the same inputs is taken from there.
    Local models run on the nodes of `cluster` if there is one, else in this process; training is always here.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        folder: Path,
        reporter: Reporter,
        siblings: Sequence[Path] = (),
        part: Part | None = None,
    ) -> None:
        self.config, self.task, self.folder, self.reporter = config, task, folder, reporter
        self.siblings, self.part = siblings, part or Part(config)
        self._locks = ExitStack()
        self._log = self._open_log()
        self.calls = Calls(self._log, reporter)
        self._engines: dict[str, Engine] = {}
        self._vllm: VllmServer | None = None  # of the teacher, started with its first engine
        self._models: dict[str, LocalModel] = {}
        self._adapters: dict[str, tuple[Path, str]] = {}  # of aligned teachers, by reference: hashed once
        self._files: dict[str, dict[str, str]] = {}
        self.summaries: dict[str, Summary] = {}  # of finished stages
        self.cluster: RayCluster | None = None  # the pipeline sets it
        self.budget: Budget | None = None  # of an answer on the device; the pipeline sets it
        self.role: Role = "labels"  # of the teacher; the check decides
        self.form: Form = "answer"  # of the student's answers; see `stages.target`
        self.caveats: list[str] = []  # of finished stages, which the closing text repeats
        self.as_given = False  # True: the student runs from the file that was given, without making its F16 file

    def _open_log(self) -> CallLog:
        """Open the store, which no other process may then write to: they would overwrite each other's calls."""
        log, share = self.folder / "calls.jsonl", self.part.share
        if share:
            return ShardLog(self.folder, share)
        try:
            # The store of a study belongs to several runs, and only one may write to it.
            for path in dict.fromkeys((self.folder.resolve(), log.resolve().parent)):
                self._locks.enter_context(locked(path / ".lock"))
            opened = CallLog(log)
            if n := merge_shards(self.folder, opened):
                self.reporter.say(f"{n} calls of shards are taken into {log}.")
        except BaseException:
            self._locks.close()
            raise
        return opened

    @contextmanager
    def stage(self, name: str, inputs: dict[str, Any], describe: Callable[[Summary], str]) -> Iterator[Stage]:
        """Open a stage; its body runs `finish`, unless the stage is done from the same inputs already.

        `inputs` are what decides the stage's data: settings, model identities, `outputs` of earlier
        stages. `describe` turns the summary into the line that is printed at the end.

        Raises:
            PartDone: this command makes no more than the stages before, or a shard has made its share of the calls.
            InputError: the command begins with a later stage, and this one is not done.
        """
        self.part.enter(name, self.folder)
        self.calls.take_counts()
        inputs = {"stage": name, "seed": self.config.seed, **inputs}
        kind = ShardStage if self.part.share else Stage
        stage = kind(self.folder / name, inputs, self.calls.take_counts)
        for folder in self.siblings if stage.todo else ():
            # The check decides more than the inputs of later stages tell: near misses.
            if (name == "check" or self._same_check(folder)) and not Stage(folder / name, inputs).todo:
                link_folder(folder / name, self.folder / name)
                stage = Stage(self.folder / name, inputs, self.calls.take_counts)
                break
        if not stage.todo and not _describes(describe, stage.summary):
            self.reporter.warn(f"{stage.folder / 'manifest.json'} is damaged: the stage is made again")
            stage.forget()
        seconds = None
        if stage.todo:
            self.part.refuse_unfinished(name)
            with self.reporter.stage(name) as clock:
                yield stage
            seconds = clock()
        else:
            yield stage
        self._files[name] = stage.files
        self.summaries[name] = stage.summary
        line = describe(stage.summary) + _also(stage.summary)
        self.reporter.done(name, line, seconds)

    @contextmanager
    def training(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Close the engines, whose memory a training needs, and show its progress.

        Raises PartDone: this is a shard, which makes calls alone.
        """
        if self.part.share:
            raise PartDone(f"Next is a training ({what}): run the same command without --shard.")
        self.close_engines()
        with self.reporter.percent(what) as progress:
            yield progress

    def take_training(self, out: Path) -> None:
        """Take a finished training from a sibling whose check had the same inputs, if there is one; no F16 file.

        Those inputs hold all that decides a training on own labels.
        """
        for folder in () if out.exists() else self.siblings:
            theirs = folder / out.relative_to(self.folder)
            if self._same_check(folder) and (theirs / "training.json").is_file():
                link_folder(theirs, out)
                return

    def _same_check(self, sibling: Path) -> bool:
        mine = _inputs_of(self.folder / "check")
        return bool(mine) and mine == _inputs_of(sibling / "check")

    def outputs(self, *names: str) -> dict[str, Any]:
        """Return the file hashes of finished stages, the inputs of a later one."""
        return {name: self._files[name] for name in names}

    def read(self, stage: str, file: str) -> list[Row]:
        """Return the rows of a finished stage's file."""
        return Stage(self.folder / stage, {}).read(file)

    def engine(self, which: ModelConfig | str) -> Engine:
        """Return the open engine of a configured model or a model reference."""
        model = which if isinstance(which, ModelConfig) else ModelConfig(model=which)
        student, key = model == self.config.student, self._engine_key(model)
        if key not in self._engines:
            if is_server(model.model):
                opened = self._open_server(model)
            elif adapter := self._adapter(model):
                return self.engine_with(self.local(model), adapter, model)
            else:
                local = f16_student(self.local(model)) if student and not self.as_given else self.local(model)
                opened = self._open(local, model)
            self._engines[key] = opened
        return self._engines[key]

    def _engine_key(self, model: ModelConfig) -> str:
        # One model may be teacher and student: the teacher runs from its own file, the student from F16.
        return f"{model.model}|{model.engine}|{model.parallel}|{model == self.config.student}"

    def lend(self, model: ModelConfig, engine: Engine) -> None:
        """Let the run use this engine for a configured model."""
        self._engines[self._engine_key(model)] = engine

    def _open_server(self, model: ModelConfig) -> Engine:
        """Open a server; how it takes prompts was found out when the run first met it, and stays, as prompts must."""
        key = content_key("server", model.model)
        known = self._log.get(key, "continues")
        limits = replace(_limits(model), continues=None if known is None else known["continues"])
        engine = open_engine(model.model, parallel=model.parallel, limits=limits)
        if known is None:
            continues = engine.chat_template != CHAT_JSON_NEW_TURN
            self._log.append([{"key": key, "continues": continues}])
        return engine

    def engine_with(
        self, model: LocalModel, adapter: tuple[Path, str] | None, config: ModelConfig, dtype: str = ""
    ) -> Engine:
        """Return the open engine of a model on disk, with an optional LoRA adapter (path, sha256)."""
        key = f"{model.sha256}|{adapter}|{config.engine}|{dtype}"
        if key not in self._engines:
            self._engines[key] = self._open(model, config, adapter, dtype)
        return self._engines[key]

    def _open(
        self, model: LocalModel, config: ModelConfig, adapter: tuple[Path, str] | None = None, dtype: str = ""
    ) -> Engine:
        if isinstance(config, TeacherConfig) and config.starts_vllm:
            return self._open_vllm(model, config, adapter)
        if isinstance(config, TeacherConfig) and config.server:
            return self.open_served(config, adapter[0] if adapter else None)
        opening = open_local if self.cluster is None else self.cluster.open
        return opening(model, kind=self.kind(config), parallel=config.parallel, adapter=adapter, dtype=dtype)

    def _open_vllm(self, model: LocalModel, config: TeacherConfig, adapter: tuple[Path, str] | None) -> Engine:
        """Open an engine on the run's own vLLM server, or on one of each worker; it is started if none runs."""
        from arte_edge.runtimes.openai.vllm_process import VllmServer, VllmSettings, adapter_rank

        # Of a teacher that another run aligned its own.
        rank = self.config.align.lora_rank if self.config.aligned else adapter_rank(adapter[0]) if adapter else 0
        settings = VllmSettings((self.folder / "served").absolute(), config.server_args, rank, _limits(config))
        if self.cluster is not None:
            with doing("starting vLLM on the workers"):
                return self.cluster.open(
                    model, kind=self.kind(config), parallel=config.parallel, adapter=adapter, vllm=settings
                )
        if self._vllm is None:
            self._vllm = VllmServer(model, settings)
        with doing("checking the server's weights"):
            return self._vllm.engine(adapter[0] if adapter else None, config.parallel)

    def where_models_run(self, function: Callable[..., T], model: LocalModel, *arguments: Any) -> T:
        """Return what `function` returns for a model here, or on a node of the cluster for its copy."""
        if self.cluster is None:
            return function(model, *arguments)
        return cast(T, self.cluster.on_a_node(function, model, *arguments))

    def open_served(self, config: TeacherConfig, adapter: Path | None) -> Engine:
        """Open the servers that write with a teacher's weights and, unless it is None, an adapter, a PEFT folder."""
        from arte_edge.runtimes.openai.served import ServedEngine, ServerFolder

        limits = _limits(config)
        with doing("checking the servers' weights"):
            return ServedEngine(
                config.server,
                self.checkpoint(config),
                self.local(config).sha256,
                ServerFolder.parse(config.server_folder, self.folder),
                name=config.server_model,
                adapter=adapter,
                aligns=self.config.aligned,
                parallel=config.parallel,
                requests_per_minute=limits.requests_per_minute,
                tokens_per_minute=limits.tokens_per_minute,
                timeout_s=limits.timeout_s,
            )

    def kind(self, config: ModelConfig) -> Kind:
        """Return the engine that runs a local model of the run: the one that was chosen when the run first met it."""
        if isinstance(config, TeacherConfig) and config.server:
            return "transformers"  # whose checkpoints and adapters servers read
        if config == self.config.student or config.engine != "auto":
            return config.engine
        model = self.local(config)
        key = content_key("engine", model.sha256)
        if (known := self._log.get(key, "engine")) is not None:
            return cast(Kind, known["engine"])
        # A run from before the choice was stored has an adapter and texts of the usual engine.
        older = (self.folder / "check" / "manifest.json").is_file()
        chosen = "auto" if older else self.where_models_run(teacher_kind, model, config.engine)
        if model.gguf is not None and chosen in ("int8", "transformers"):
            try:
                self.checkpoint(config)
            except ArteError as error:
                self.reporter.warn(f"{config.model} runs on llama.cpp: it has no checkpoint ({error.message})")
                chosen = "llamacpp"
        self._log.append([{"key": key, "engine": chosen}])
        return chosen

    def scoring_dtype(self, choose: Callable[[], str]) -> str:
        """Return in which floats transformers scores for this student, empty for its usual engine: decided once.

        `choose` decides where nothing is stored. Shards, each of which might decide otherwise, take the usual engine.
        """
        key = content_key("scoring", self.local(self.config.student).sha256, self.config.prefer.score)
        if (known := self._log.get(key, "dtype")) is None:
            known = {"key": key, "dtype": "" if self.part.share else choose()}
            self._log.append([known])
        return str(known["dtype"])

    def on_llamacpp(self, config: ModelConfig) -> bool:
        """Return whether llama.cpp runs a local model of the run, which takes adapters as GGUF files."""
        return self.local(config).gguf is not None and self.kind(config) in ("auto", "llamacpp")

    def local(self, config: ModelConfig) -> LocalModel:
        """Return the model on disk, downloading it first if it is not cached; of an aligned teacher its base."""
        aligned = _aligned(config)
        ref = config.model if aligned is None else aligned.base
        if ref not in self._models:
            with self._steps(ref) as progress:
                self._models[ref] = resolve(ref, progress=progress)
        return self._models[ref]

    def _adapter(self, config: ModelConfig) -> tuple[Path, str] | None:
        """Return the adapter of a teacher that another run aligned."""
        if (aligned := _aligned(config)) is None:
            return None
        if config.model not in self._adapters:
            llamacpp = self.on_llamacpp(config)
            self._adapters[config.model] = aligned.adapter_for(self.local(config), llamacpp=llamacpp)
        return self._adapters[config.model]

    def checkpoint(self, config: ModelConfig) -> Path:
        """Return the model's checkpoint folder; a GGUF is converted first, once."""
        with self._steps(config.model) as progress:
            return self.local(config).checkpoint(progress)

    def _steps(self, model: str) -> AbstractContextManager[Progress | None]:
        return nullcontext() if self.reporter.quiet else model_progress(model)

    def identity(self, config: ModelConfig) -> list[Any]:
        """Return what decides the texts of a configured model: an input of stages."""
        weights = config.model if is_server(config.model) else self.local(config).sha256
        if adapter := self._adapter(config):
            weights += f" {adapter[1]}"
        served = isinstance(config, TeacherConfig) and config.server
        return [weights, "server" if served else config.engine, config.template, config.shots]

    def render(self, engine: Engine, messages: list[Message], prefill: str, config: ModelConfig) -> str:
        """Render `messages` for `engine`, as plain text where the configuration says so."""
        # A teacher that reasons spends its tokens on what no row may hold.
        thinking = not isinstance(config, TeacherConfig)
        return render(engine, messages, prefill, plain=config.template == "none", thinking=thinking)

    def asking(self, form: Form | None = None) -> Asking:
        """Return how the student is asked, in the form of this run or in `form`."""
        engine, limit = self.engine(self.config.student), self.config.evaluate.answer_tokens
        how = Asking.of(self.task, form or self.form, engine.count_tokens, limit)
        return replace(how, answer_tokens=self.most_tokens(how.answer_tokens))

    def asked(self, engine: Engine, how: Asking) -> Asked:
        """Return a student's engine with the chat template that its tuned student is shipped with."""
        return asked(engine, how.instruction, plain=self.config.student.template == "none")

    @property
    def by_label(self) -> bool:
        """See `tells_labels`."""
        return tells_labels(self.config, self.task)

    @property
    def reasons(self) -> bool:
        """Whether the teacher writes rationales: not for a student that gives the answer of a closed set alone."""
        return not (self.form == "answer" and self.by_label)

    @staticmethod
    def round_name(stage: str, number: int) -> str:
        """Return the folder of a stage in round `number`, from 1."""
        return stage if number == 1 else f"{stage}-{number}"

    def data_inputs(self) -> dict[str, Any]:
        """Return what decides how drafts are written and labelled, beside the settings of a stage."""
        return {"role": self.role, "by_label": self.by_label, "reasons": self.reasons}

    def most_tokens(self, limit: int) -> int:
        """Return the most tokens of an answer: `limit`, or fewer where the device's budget is smaller."""
        return limit if self.budget is None else min(limit, self.budget.answer_tokens)

    def budget_inputs(self) -> dict[str, Any]:
        """Return what a budget adds to the inputs of a stage that depends on it; without one, nothing."""
        return {} if self.budget is None else {"answer_budget": self.budget.answer_tokens}

    def close_engines(self) -> None:
        """Close every engine, and vLLM: training needs the memory."""
        for engine in self._engines.values():
            engine.close()
            for note in getattr(engine, "notes", []):  # an adapter that stays on a server
                self.reporter.warn(note)
        self._engines.clear()
        if self._vllm is not None:
            self._vllm.close()
            self._vllm = None
        if self.cluster is not None:
            stop = self.cluster.stop_workers
            if self.config.teacher.starts_vllm:
                from arte_edge.runtimes.openai.vllm_process import end_workers

                failed = sys.exc_info()[0] is not None  # its message may name a log
                end_workers(stop, self.folder / "served", keep_logs=failed)
            else:
                stop()

    def close(self) -> None:
        self.close_engines()
        self._log.close()
        self._locks.close()


def tells_labels(config: RunConfig, task: Task) -> bool:
    """Return whether the teacher is told an answer and writes inputs for it.

    That takes a closed set with answers of its own, and inputs of one line each, for they come as a list.
    """
    fixed = task.answer.closed and not task.answer.letters
    return config.elicit.by_label and fixed and not any("\n" in seed.input for seed in task.seed)


def _aligned(config: ModelConfig) -> AlignedTeacher | None:
    return aligned_teacher(config.model) if isinstance(config, TeacherConfig) else None


def _inputs_of(stage: Path) -> str:
    """Return the key of a finished stage's inputs, empty if it has not finished or its manifest is damaged."""
    with suppress(InputError):
        return str(read_json(stage / "manifest.json").get("inputs", ""))
    return ""


def _describes(describe: Callable[[Summary], str], summary: Summary) -> bool:
    """Return whether a stored summary has what the stage's line, and with it the run, reads of it."""
    try:
        return bool(describe(summary))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return False


def _also(summary: Summary) -> str:
    """Return what any stage's line says of answers and calls that were left out, nothing if none were."""
    calls, outside = summary.get("calls", {}), summary.get("labels", {}).get("outside_options", 0)
    said = [f"{outside} answers outside their question's options have no vote"] if outside else []
    if n := calls.get("with_reasoning"):
        said += [f"{n} answers held reasoning ({calls['reasoning_tokens']:,} tokens paid and left out)"]
    if n := calls.get("failed"):
        said += [f"{n} calls failed: {calls['reasons']}"]
    return "".join(f"; {part}" for part in said)


def _limits(model: ModelConfig) -> ServerLimits:
    return ServerLimits(model.requests_per_minute or None, model.tokens_per_minute or None, model.timeout_s)


def open_folder(config: RunConfig, folder: Path, task: Task, *, update: bool) -> None:
    """Make `folder` the folder of this run, or check that it is.

    Raises InputError: it holds another run; names the keys that differ.
    """
    resolved = dump_toml(config)
    path, header = folder / "run.toml", _header(task)
    if path.is_file() and not update:
        keys = _different(path, config)
        same_task = header in path.read_text(encoding="utf-8")
        if keys or not same_task:
            what = ", ".join(keys[:6]) + (", …" if len(keys) > 6 else "") if keys else "the task's examples"
            raise InputError(
                f"{folder} holds another run: {what} differ{'s' if len(keys) == 1 else ''}",
                "Give this run another --name, or continue with --update: finished calls are reused, "
                "and the stages that the change affects run again.",
            )
        if not differences(_with_defaults(path), toml_loads(resolved)):
            return
    write_atomic(path, (header + resolved).encode())


def holds(folder: Path, config: RunConfig, task: Task) -> bool:
    """Return whether `folder` is the folder of this run."""
    path = folder / "run.toml"
    same_task = path.is_file() and _header(task) in path.read_text(encoding="utf-8")
    return same_task and not _different(path, config)


def _different(path: Path, config: RunConfig) -> list[str]:
    """Return the keys in which the run in a folder differs; not those of a machine, where any run may go on."""
    keys = differences(_with_defaults(path), toml_loads(dump_toml(config)))
    return [key for key in keys if not key.startswith(("train.", "cluster."))]


def _header(task: Task) -> str:
    return f'# The run as resolved. task_sha256 = "{task.sha256}"\n'


def _with_defaults(path: Path) -> dict[str, Any]:
    """Return the run in a folder, with the defaults of keys that were added after it was written."""
    stored = load_toml(path)
    try:
        return toml_loads(dump_toml(build(str(path), stored)))
    except InputError:  # a key that no longer exists: compare what is written there
        return stored
