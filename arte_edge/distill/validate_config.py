"""What makes a run impossible, found before any model is downloaded or called; all problems are reported at once.

`arte-edge check` calls `find_problems`, a run `refuse_run`: both report the same. Once its models are on this machine
a run also calls `refuse_models`: a family or a layer that cannot be converted would otherwise fail hours later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from arte_edge.checkpoint import read_weights
from arte_edge.distill.aligned import aligned_teacher
from arte_edge.distill.config import TECHNIQUE_ARMS, UNALIGNED, VLLM, Problem, RunConfig, problems_of, reject
from arte_edge.distill.generation.rationales import votes_directly
from arte_edge.distill.run_context import tells_labels
from arte_edge.errors import ArteError, InputError
from arte_edge.files import user_path
from arte_edge.gguf.names import checkpoint_family, family_of_arch, layout_of
from arte_edge.gguf.reader import read_model_header
from arte_edge.models import registry
from arte_edge.models.resolve import LocalModel, resolve
from arte_edge.runtimes.loader import is_server
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.task import Task

_FEWEST = 20  # validation examples; below this an interval is wider than any difference worth knowing


def find_problems(tables: Mapping[str, Any]) -> list[Problem]:
    """Return every problem of a run file's tables as (message, hint) pairs.

    Task and models are checked even if other keys are wrong.
    """
    wrong, (task, unreadable) = problems_of(tables), _task(tables)
    found = [*wrong, *unreadable, *_model_problems(tables), *_server_problems(tables)]
    if task is not None:
        examples = _value(tables, "check", "examples")
        found += _size_problems(examples if isinstance(examples, int) else 0, task)
    if wrong:
        return found
    config = RunConfig.model_validate(tables)
    return [*found, *_rank_problems(config), *(_misfits(config, task) if task else ())]


def refuse_run(config: RunConfig, task: Task, where: str = "", *, models: bool = True) -> None:
    """Raise if `config` cannot run on `task`; without `models` they may be elsewhere.

    Raises InputError: names every key or split, after `where`.
    """
    tables = config.model_dump()
    problems = [*(_model_problems(tables) if models else ()), *_size_problems(config.check.examples, task)]
    problems += [*_server_problems(tables), *_rank_problems(config), *_misfits(config, task)]
    reject(problems, where)


def _misfits(config: RunConfig, task: Task) -> Iterator[Problem]:
    """Yield what `config` asks for and this kind of task does not allow."""
    from arte_edge.distill.stages.calibrate import respondents

    reasons = config.tune.target in ("answer-first", "reasoning-first")
    needs = f'data = "{config.data}" chooses among rationales' if config.data in TECHNIQUE_ARMS else ""
    if config.aligned and not config.n_question_pairs and not needs:
        key = "" if config.data == "rationale-only" else ", align.question_pairs = 0"
        needs = f'data = "{config.data}"{key} aligns the teacher on rationales alone'
    if needs and tells_labels(config, task) and not reasons:
        what = f"{needs}, and this student may learn answers without any"
        yield what, 'Set tune.target = "reasoning-first" or "answer-first".'
    if config.tune.soft_labels and not votes_directly(config, task.answer):
        what = "tune.soft_labels: the teacher gives no probabilities of answers to this task"
        how = "Set it to 0; or use a local teacher, a task of closed answers, and elicit.opinion_shots above 0."
        yield what, how
    if config.teacher.role == "inputs" and not tells_labels(config, task):
        yield (
            'teacher.role = "inputs": inputs cannot be written for a given answer of this task',
            'Set it to "labels" or "auto".' + ("" if config.elicit.by_label else " Or set elicit.by_label to true."),
        )
    calibrates = config.aligned or config.data == "best-of-n"
    if calibrates and len(respondents(config, closed=task.answer.closed)) * len(config.calibrate.shots) < 2:
        yield (
            f"calibrate: {config.student.model} with {config.calibrate.shots[0]} shots alone answers the validation "
            "questions (a server gives no probabilities), and one cannot tell which of them discriminate",
            "List more numbers in calibrate.shots, or models in calibrate.models.",
        )


def refuse_models(config: RunConfig, teacher: LocalModel | None, student: LocalModel) -> None:
    """Raise if a model cannot be trained or converted as the run will need it. A teacher on a server is None.

    Raises InputError: names the family or the layers, and what is possible instead.
    """
    problems = [*_student_problems(config, student)]
    if teacher is not None and config.aligned:
        problems += _teacher_problems(config, teacher)
    reject(problems)


def fewer_shown(config: RunConfig, task: Task) -> Iterator[str]:
    """Yield a sentence for every key that asks for more examples than `task` has: as many as there are are shown."""
    n_seed = len(task.seed)
    n_shot = len(task.worked) or n_seed  # `prompts.teacher_shots`
    # The default asks for all worked examples, however few.
    by_default = bool(task.worked) and "shots" not in config.teacher.model_fields_set
    shots = 0 if by_default else config.teacher.shots
    for key, wanted, there in (
        ("elicit.shown", config.elicit.shown, n_seed),
        ("teacher.shots", shots, n_shot),
        ("calibrate.shots", max(config.calibrate.shots), n_seed),
        ("evaluate.shots", max(config.evaluate.shots), n_seed),
        ("align.shots", config.align.shots or 0, n_shot),
    ):
        if wanted > there:
            yield f"{key} = {wanted}, but the task has {there} examples to show: {there} are shown"


def _value(tables: Mapping[str, Any], section: str, key: str) -> Any:
    """Return a key's value, or its default if the file does not set it."""
    table = tables.get(section)
    if isinstance(table, Mapping) and key in table:
        return table[key]
    return getattr(getattr(RunConfig(), section), key)


def _task(tables: Mapping[str, Any]) -> tuple[Task | None, list[Problem]]:
    """Return the task, None if it cannot be read, and why."""
    ref, bbh = _value(tables, "task", "ref"), _value(tables, "task", "bbh")
    if not ref or not isinstance(ref, str) or not isinstance(bbh, str | None):
        return None, []  # reported already
    try:
        return load_task(ref, bbh=Path(bbh) if bbh else None), []
    except ArteError as error:
        return None, [(f"task.ref: {error.message}", error.hint)]


def _size_problems(n_check: int, task: Task) -> Iterator[Problem]:
    needed = {"seed": 1, "validation": min(_FEWEST, n_check), "test": 1}
    there = {"seed": len(task.seed), "validation": len(task.validation), "test": len(task.test_keys())}
    for split, n in there.items():
        if n < needed[split]:
            yield (
                f"Task '{task.name}': {n} {split} examples are too few; at least {needed[split]} are needed",
                f"Label more examples in {split}.jsonl" + ("; 100 are good." if split == "validation" else "."),
            )


def _model_problems(tables: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each reference that names no model, and for vLLM that is to start and is not installed.

    A table without a model is reported already.
    """
    from arte_edge.runtimes.openai.vllm_process import vllm_command

    refs = [
        (f"{section}.model", _value(tables, section, "model"))
        for section in ("teacher", "student")
        if not isinstance(table := tables.get(section), Mapping) or "model" in table
    ]
    extra = _value(tables, "calibrate", "models")
    refs += [("calibrate.models", ref) for ref in (extra if isinstance(extra, list | tuple) else ())]
    for key, ref in refs:
        try:
            if ref and isinstance(ref, str):
                aligned = aligned_teacher(ref) if key == "teacher.model" else None
                _look_up(aligned.base if aligned else ref)
        except ArteError as error:
            yield f"{key}: {error.message}", error.hint
    # On the nodes of a cluster it is looked for when the run has joined it.
    if _starts_vllm(tables) and _value(tables, "cluster", "address") in ("", "local"):
        try:
            vllm_command()
        except InputError as error:
            yield f"teacher.server: {error.message}", error.hint


def _look_up(ref: str) -> None:
    """Raise if `ref` names no model. Downloads nothing, but hashes the weights of a checkpoint folder."""
    path = user_path(ref)
    if is_server(ref):
        return  # its address is checked with the configuration
    if path.is_file():
        read_model_header(path)
    elif path.is_dir() or ref.endswith(".gguf") or ref.startswith((".", "/", "~")):
        resolve(ref, offline=True)
    elif "/" not in ref:  # else a Hub id, and only the Hub knows
        registry.entry(ref)


def _server_problems(tables: Mapping[str, Any]) -> Iterator[Problem]:
    teacher, student = _value(tables, "teacher", "model"), _value(tables, "student", "model")
    why = ""
    if isinstance(teacher, str) and tables.get("data") not in UNALIGNED:
        if is_server(teacher):
            why = "a server, and alignment needs the teacher's weights"
        elif aligned_teacher(teacher):
            why = "an aligned teacher, and aligns once"
    if why:
        yield (
            f"teacher.model: {teacher.partition('@')[0]} is {why}",
            'Set data = "best-of-n" (the student chooses among its drafts) or "original-teacher", or use a local '
            "teacher. A vLLM server of weights that you have: teacher.model names them, teacher.server the server.",
        )
    if isinstance(teacher, str) and is_server(teacher) and _value(tables, "teacher", "server"):
        yield (
            f"teacher.server: teacher.model names a server as well, {teacher.partition('@')[0]}",
            "teacher.model names the weights that the servers run: a checkpoint folder, a Hub id, a GGUF file.",
        )
    yield from _vllm_problems(tables)
    if _value(tables, "teacher", "server") and _value(tables, "teacher", "engine") != "auto":
        yield "teacher.engine: the teacher's texts come from teacher.server", "Leave one of the two out."
    if isinstance(student, str) and is_server(student):
        yield (
            f"student.model: {student.partition('@')[0]} is a server, but the student is trained locally",
            "Use a local model.",
        )


def _starts_vllm(tables: Mapping[str, Any]) -> bool:
    return _value(tables, "teacher", "server") in (VLLM, [VLLM], (VLLM,))


def _vllm_problems(tables: Mapping[str, Any]) -> Iterator[Problem]:
    starts = _starts_vllm(tables)
    for key in ("server_model", "server_folder") if starts else ("server_args",):
        if _value(tables, "teacher", key):
            yield (
                f'teacher.{key} has no meaning {"with" if starts else "without"} teacher.server = "{VLLM}"',
                "Leave one of the two out.",
            )


def _rank_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what prevents the training on several processes, each of which takes its share of every step."""
    n = config.train.processes
    if config.train.shard_teacher and n == 1:
        yield ("train.shard_teacher: one process cannot share weights", "Set train.processes to the number of GPUs.")
    if config.train.shard_teacher and not config.teacher.addresses:
        yield (
            "train.shard_teacher: the teacher also writes during align, and without addresses in teacher.server that "
            "takes all of it on one GPU",
            "Start vLLM with the teacher on other GPUs and name its address in teacher.server.",
        )
    if config.train.shard_teacher and config.align.weights == "nf4":
        yield (
            'train.shard_teacher and align.weights = "nf4" exclude each other',
            "In four bits each process holds all weights: leave one of the two out.",
        )
    for key, size in (
        ("tune.batch_size", config.tune.batch_size),
        ("align.batch_size", config.align.batch_size if config.aligned else n),
    ):
        if size % n:
            yield (
                f"train.processes = {n}: {key} = {size} cannot be shared evenly",
                f"Set {key} to a multiple of {n}, or take another number of processes.",
            )


def _student_problems(config: RunConfig, student: LocalModel) -> Iterator[Problem]:
    """Yield what prevents the student's files: of a GGUF its F16 file, of a device's the file it needs."""
    try:
        if student.gguf is not None:
            family_of_arch(read_model_header(student.gguf).architecture, student.name)
        elif config.deploy.device and not config.deploy.file[:1].islower():
            checkpoint_family(student.path)
    except InputError as error:
        files = "the tuned student" if student.gguf else f"deploy.file = '{config.deploy.file}'"
        instead = "Give the original checkpoint, a folder or its Hub id." if student.gguf else "Or take an ONNX file."
        yield f"student.model: {error.message}: {files} cannot be written as GGUF", f"{error.hint} {instead}"


def _teacher_problems(config: RunConfig, teacher: LocalModel) -> Iterator[Problem]:
    """Yield what prevents the adapter of an aligned teacher in the form that its engine loads."""
    targets = config.align.lora_targets
    if teacher.gguf is None or config.teacher.server or config.teacher.engine == "transformers":
        weights = read_weights(teacher.path).items() if teacher.folder and targets else ()
        there = [f".{name.removesuffix('.weight')}" for name, weight in weights if len(weight.shape) == 2]
        unknown = [t for t in targets if there and not any(name.endswith(f".{t}") for name in there)]
    else:
        header = read_model_header(teacher.gguf)
        try:
            layout = layout_of(header)
        except InputError as error:
            yield (
                f"teacher.model: {error.message}: its adapter cannot be written for llama.cpp",
                f"{error.hint} Or set data = 'original-teacher', or give the original checkpoint.",
            )
            return
        places = ("model.layers.0.self_attn.", "model.layers.0.mlp.", "")
        named = {t: {layout.gguf_name(f"{place}{t}.weight") for place in places} for t in targets}
        tensors = {name for name, tensor in header.tensors.items() if len(tensor.shape) == 2}
        tensors -= {"token_embd.weight"}
        unknown = [t for t, names in named.items() if not names & tensors]
    if unknown:
        yield (
            f"align.lora_targets: {teacher.name} has no linear layer '{unknown[0]}' that an adapter can change",
            "Name linear layers, such as q_proj, or leave it empty for every one.",
        )
