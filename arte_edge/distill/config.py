"""Every setting of a run, as frozen models: one table of the TOML file for each stage.

The defaults work for small models on a laptop; the preset `paper` has the paper's
settings. An unknown key is an error that names the nearest one. The functions below the
models read TOML files and ``--set``, and name the file and the key in their errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from arte_edge.errors import InputError
from arte_edge.files import for_pydantic, problems, read_toml, toml_loads

Data = Literal[
    "arte",
    "original-teacher",
    "best-of-n",
    "question-only",
    "rationale-only",
    "random",
    "random-technique",
    "one-technique",
    "preferred-rationale",
]
UNALIGNED = ("original-teacher", "best-of-n")
# The aligned teacher's questions; each rationale is one of the original teacher's, one a technique.
TECHNIQUE_ARMS = ("random-technique", "one-technique", "preferred-rationale")
LabelPolicy = Literal["teacher", "vote", "drop-disagreement"]
VLLM = "vllm"  # of teacher.server, in place of addresses: the run starts vLLM
Problem = tuple[str, str]  # what is wrong, what to do about it


def _distinct(shots: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(shots)) < len(shots):
        raise ValueError("a number of shots is listed twice")
    return shots


_Name = Annotated[str, Field(min_length=1)]
_ShotCounts = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_distinct)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _key(default: Any, description: str = "", **limits: Any) -> Any:
    """Return one key of a section; the description goes into docs/presets.md."""
    return Field(default, description=description or None, **limits)


def _server_or_local(ref: str) -> str:
    """Check the address of a server here: whatever comes later may print or store it, a password included."""
    if ref.startswith("openai:"):
        from arte_edge.runtimes.openai.engine import parse_ref

        for_pydantic(parse_ref, ref)
    return ref


def _addresses(urls: tuple[str, ...]) -> tuple[str, ...]:
    from arte_edge.runtimes.openai.client import check_base_url

    if urls == (VLLM,):
        return urls
    return tuple(dict.fromkeys(str(for_pydantic(check_base_url, url)) for url in urls))


def _vllm_arguments(given: tuple[str, ...]) -> tuple[str, ...]:
    from arte_edge.runtimes.openai.vllm_process import check_arguments

    return for_pydantic(check_arguments, given)


ModelRef = Annotated[_Name, AfterValidator(_server_or_local)]
Servers = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda given: (given,) if isinstance(given, str) else given),
    AfterValidator(_addresses),
]


class TaskConfig(_Section):
    """Where the task comes from."""

    ref: _Name = _key("home_intents", "name of a shipped task, a task folder, or hub:org/name")
    bbh: str | None = _key(None, "folder in BIG-Bench Hard's layout that contains `ref`")


class ModelConfig(_Section):
    """A model and how to run it."""

    model: ModelRef = _key(..., "registry name, path or Hub id")
    engine: Literal["auto", "llamacpp", "transformers", "int8"] = _key(
        "auto", "auto: llamacpp for GGUF files (a teacher: int8 or transformers where faster), otherwise transformers"
    )
    template: Literal["auto", "none"] = _key("auto", "none: plain-text prompts, even if the model has a chat template")
    parallel: int = _key(32, "sequences decoded together; for a server, concurrent requests", ge=1, le=200)
    shots: int = _key(0, "few-shot examples before each question", ge=0, le=40)
    requests_per_minute: float = _key(0.0, "rate limit of a server; 0: none", ge=0.0)
    tokens_per_minute: float = _key(0.0, "rate limit of a server; 0: none", ge=0.0)
    timeout_s: float = _key(120.0, "timeout of one request to a server, seconds", gt=0.0)


class TeacherConfig(ModelConfig):
    """The teacher: like any model, but few-shot by default. It may be one that another run aligned."""

    model: ModelRef = _key(
        ..., "as for a student, openai:MODEL@URL, or a run's folder `aligned`: the teacher that it aligned"
    )
    server: Servers = _key(
        (),
        "vllm: the run starts vLLM, which writes with the weights of `model` and loads its adapters; or the "
        "addresses of such servers",
    )
    server_args: Annotated[tuple[str, ...], AfterValidator(_vllm_arguments)] = _key(
        (), 'with server = "vllm": its arguments, such as ["--max-model-len", "8192"]'
    )
    server_model: str = _key("", "the servers' name of the model; empty: the one that they list")
    server_folder: str = _key(
        "", "folder for adapters that servers elsewhere see too, PATH or HERE:THERE; empty: in the run's folder"
    )
    shots: int = _key(8, "few-shot examples before each question", ge=0, le=40)
    role: Literal["auto", "labels", "inputs"] = _key(
        "auto", "labels: it labels; inputs: it writes inputs for given answers; auto: the check decides"
    )

    @property
    def starts_vllm(self) -> bool:
        """Whether the run starts the server that writes its texts."""
        return self.server == (VLLM,)

    @property
    def addresses(self) -> tuple[str, ...]:
        """The servers that others started, and that run on GPUs which are not the run's."""
        return () if self.starts_vllm else self.server

    @property
    def on_server(self) -> bool:
        """Whether a server elsewhere writes its texts, with weights that are here or not."""
        return self.model.startswith("openai:") or bool(self.addresses)


class Check(_Section):
    """Before the first step: does the teacher outperform the student?"""

    examples: int = _key(100, "validation examples that teacher and student answer", ge=10)
    own_labels: bool = _key(True, "train the student on the task's own labels alone, as a control")


class Elicit(_Section):
    """Step 1: the teacher generates draft questions and rationales."""

    questions: int = _key(40, "valid draft questions to generate (paper: 250 per task)", ge=4)
    shown: int = _key(3, "seed questions in each prompt (paper: 3)", ge=1)
    one_draw: bool = _key(False, "draw seeds once per batch of prompts: faster (shared prefix), less diverse")
    asked: int = _key(5, "questions requested per prompt (paper: 5)", ge=1)
    temperature: float = _key(1.0, "of questions", ge=0.0, le=2.0)
    top_p: float = _key(1.0, "of questions, also in tailor", gt=0.0, le=1.0)
    repeat_penalty: float = _key(
        0.8,
        "inputs for given answers, also in tailor: nats against going on with a phrase of an example or of an earlier "
        "input, more the longer it is (DRY sampling; not by a server); 0: none",
        ge=0.0,
    )
    question_tokens: int = _key(300, "maximum tokens of a completion with questions", ge=16)
    rationale_tokens: int = _key(120, "maximum tokens of a rationale", ge=8)
    rouge: float = _key(0.7, "ROUGE-L F1 from which a question counts as a duplicate", gt=0.0, le=1.0)
    by_label: bool = _key(True, "closed-answer tasks: the teacher writes inputs for given answers, as many for each")
    label: LabelPolicy = _key("teacher", "label of a draft: the teacher's target, a majority vote, or dropped")
    grammar: bool = _key(True, "constrain the end of a rationale to an answer in its tags")
    opinion_shots: int = _key(
        24, "closed-answer tasks: few-shot examples of a direct answer, one more vote; 0: off", ge=0
    )
    max_prompts: int = _key(0, "prompts before giving up; 0: ten times the minimum", ge=0)


class Calibrate(_Section):
    """Step 2: the preference set, the k most discriminating validation questions."""

    k: int = _key(40, "size of the preference set (paper: 40)", ge=2)
    items: int = _key(100, "validation questions in the response matrix", ge=10)
    shots: _ShotCounts = _key((0, 1, 2, 3), "numbers of few-shot examples for each model (paper: 0 to 3)")
    models: tuple[ModelRef, ...] = _key((), "respondents besides teacher and student")


class Prefer(_Section):
    """Step 3: the student's one-shot score of every draft."""

    score: Literal["likelihood", "forced", "accuracy", "influence"] = _key(
        "likelihood",
        "likelihood: of the right answer; forced: is it likeliest; accuracy: generated (paper); influence: what a "
        "training step on the draft adds to the log-probability of the right answer",
    )
    bias_free: bool = _key(True, "closed-answer tasks: remove the answer bias that a draft induces")
    length_free: bool = _key(True, "closed-answer tasks: regress log(length) out of the score")
    answer_tokens: int = _key(96, "maximum tokens of an answer (accuracy only)", ge=4)
    race: Literal["auto", "on", "off"] = _key(
        "auto", "adaptive scoring; auto: from 40 drafts and 24 questions on; off: full grid (paper)"
    )
    race_share: float = _key(0.25, "adaptive scoring: at most this share of the full grid", gt=0.0, le=1.0)
    race_error: float = _key(
        0.05, "adaptive scoring: risk at which the rank of a draft counts as decided", gt=0.0, lt=0.5
    )
    engine: Literal["auto", "student"] = _key(
        "auto", "auto: the fastest engine for 500+ scores (may be bfloat16); student: its usual engine"
    )
    student_file: str = _key("", "score with the student quantized to this type; empty: 16 bits")


class Align(_Section):
    """Step 4: DPO of the teacher on the student's preferences."""

    question_pairs: int = _key(50, "preference pairs of questions (paper: 50 per task)", ge=0)
    rationale_pairs: int = _key(250, "preference pairs of rationales (paper: 250 per task)", ge=0)
    pairs_per_question: int = _key(
        2, "pairs of rationales of one question: best and worst, second best and second worst", ge=1
    )
    min_gap: float = _key(0.02, "minimum score difference; a smaller one is a tie and is dropped", ge=0.0)
    min_gap_errors: float = _key(
        1.0, "the same in its standard errors, where it has one (adaptive scoring, influence)", ge=0.0
    )
    also: tuple[str, ...] = _key(
        (), "folders of runs on other tasks, same teacher and student, whose pairs are trained on as well"
    )
    target_kl: float = _key(
        0.1,
        "nats a token between the aligned and the original teacher on held-out prompts, which sets the learning "
        "rate; 0: fixed rate",
        ge=0.0,
    )
    learning_rate: float = _key(2e-5, "with target_kl the first rate (paper: 1e-7, all weights)", gt=0.0)
    batch_size: int = _key(4, "pairs per optimizer step (paper: 16)", ge=1)
    epochs: float = _key(1.0, "with target_kl more, where that makes fewer than 8 steps", gt=0.0, le=1000.0)
    beta: float = _key(0.1, "strength of the KL penalty of DPO", gt=0.0)
    sft_weight: float = _key(1.0, "weight of the SFT loss on chosen completions; 0: DPO only", ge=0.0)
    ld_alpha: float = _key(
        1.0, "weight of the tokens by which one side is longer than the other; 1: plain DPO", ge=0.0, le=1.0
    )
    weights: Literal["16-bit", "nf4"] = _key(
        "16-bit", "of the teacher while it is trained; nf4: four bits (QLoRA), a quarter of the memory"
    )
    lora_rank: int = _key(8, ge=1)
    rslora: bool = _key(True, "scale the adapter by 1/sqrt(rank): one learning rate fits every rank")
    lora_targets: tuple[_Name, ...] = _key((), "layers to adapt, such as q_proj; empty: every linear layer")
    max_length: int = _key(0, "tokens of prompt and longer side; a longer pair is dropped; 0: none is", ge=0)
    shots: int | None = _key(None, "few-shot examples in the prompts of rationale pairs; unset: as in tailor", ge=0)
    probe_every: int = _key(4, "optimizer steps between checks for model collapse", ge=1)
    probe_prompts: int = _key(4, "held-out prompts per check", ge=1)
    fresh_drafts: int = _key(
        12, "prompts that both teachers answer after training, to compare their drafts; 0: none", ge=0
    )


class Tailor(_Section):
    """Step 5: the aligned teacher generates the training data."""

    questions: int = _key(150, "training examples to generate (paper: about 290 per task)", ge=8)
    temperature: float = _key(1.0, ge=0.0, le=2.0)
    label: LabelPolicy = _key("vote", "as in elicit")
    even_labels: bool = _key(True, "closed-answer tasks: balance labels when subsampling")
    best_of: int = _key(4, 'drafts for each example with data = "best-of-n"', ge=2, le=64)
    max_prompts: int = _key(0, "as in elicit", ge=0)


class Tune(_Section):
    """Step 6: supervised fine-tuning of the student."""

    method: Literal["full", "lora"] = "full"
    learning_rate: float = _key(2e-5, "paper: 2e-5", gt=0.0)
    epochs: float = _key(2.0, "paper: 1", gt=0.0, le=1000.0)
    batch_size: int = _key(4, ge=1)
    lora_rank: int = _key(16, ge=1)
    target: Literal["auto", "answer", "answer-first", "reasoning-first"] = _key(
        "auto", "what the student writes; auto: the cheapest form that a short trial finds no worse"
    )
    own_labels: bool = _key(True, "add the task's labelled seed rows to the training data")
    soft_labels: float = _key(
        0.0,
        "closed answers: share of the teacher's distribution in the target, the label has the rest; 0: off",
        ge=0.0,
        le=1.0,
    )


class Train(_Section):
    """How align and tune use this machine; nothing here changes what they learn."""

    processes: int = _key(1, "processes that share each training step; one a GPU", ge=1, le=1024)
    shard_teacher: bool = _key(
        False,
        "align: spread the teacher over the processes (FSDP); for one that no GPU holds; needs addresses in "
        "`teacher.server`",
    )


class Evaluate(_Section):
    """Last, once: evaluation on the held-out test split."""

    limit: int = _key(0, "test examples; 0: all", ge=0)
    shots: _ShotCounts = _key((0,), "numbers of few-shot examples with which the student is tested")
    answer_tokens: int = _key(96, "maximum tokens of an answer with reasoning", ge=4)
    teacher: bool = _key(True, "evaluate the teacher as well")


class Deploy(_Section):
    """The target device and its latency limit for an answer: see docs/runs.md."""

    device: str = _key("", "device profile, or a fingerprint in `rates`; empty: no latency limit")
    file: _Name = _key("Q4_K_M", "quantization type, or name, of the file that runs on the device")
    max_answer_seconds: float = _key(3.0, "latency limit from the prompt to the last token of the answer", gt=0.0)
    rates: str = _key("", "measured speeds: student.json, bench.jsonl or their folder; empty: predict")
    draws: int = _key(8, "most samples for a question whose rationale is too long", ge=0)


class Cluster(_Section):
    """Where the models run: on a Ray cluster, see docs/cluster.md. The same run may go on with another, or none."""

    address: str = _key("", "local, auto or HOST:PORT (`--ray`); empty: this machine without Ray")
    workers: int = _key(0, "processes with models; 0: as many as fit", ge=0)
    cpus_per_worker: int = _key(0, "cores of each; 0: those of a node, or of a GPU's share of it", ge=0)
    gpus_per_worker: float = _key(-1.0, "GPUs of each; -1: one where nodes have any", ge=-1.0)


class RunConfig(_Section):
    """A whole run, as in ``run.toml``."""

    name: str = _key("", "folder under runs/; empty: task and student")
    seed: int = _key(0, ge=0, lt=2**31)
    rounds: int = _key(1, "2 or more: further data where the student of the round before errs", ge=1, le=10)
    data: Data = _key("arte", "training data of the student; all but arte are ablations")
    task: TaskConfig = TaskConfig()
    teacher: TeacherConfig = TeacherConfig(model="qwen2.5-coder-0.5b-instruct")
    student: ModelConfig = ModelConfig(model="smollm2-135m-instruct")
    check: Check = Check()
    elicit: Elicit = Elicit()
    calibrate: Calibrate = Calibrate()
    prefer: Prefer = Prefer()
    align: Align = Align()
    tailor: Tailor = Tailor()
    tune: Tune = Tune()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    deploy: Deploy = Deploy()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _pairs_for_data(self) -> RunConfig:
        if self.aligned and not (self.n_question_pairs or self.n_rationale_pairs):
            raise ValueError(f'align: data = "{self.data}" needs question_pairs or rationale_pairs above 0')
        return self

    @property
    def aligned(self) -> bool:
        """Whether the teacher is aligned in this run."""
        return self.data not in UNALIGNED

    @property
    def alignment(self) -> str:
        """What decides the pairs of the alignment: `data`, which several arms share."""
        return "arte" if self.data in TECHNIQUE_ARMS else self.data

    @property
    def best_of(self) -> int:
        """How many drafts the teacher writes for each training example."""
        return self.tailor.best_of if self.data == "best-of-n" else 1

    @property
    def n_question_pairs(self) -> int:
        return 0 if self.data in ("rationale-only", *UNALIGNED) else self.align.question_pairs

    @property
    def n_rationale_pairs(self) -> int:
        return 0 if self.data in ("question-only", *UNALIGNED) else self.align.rationale_pairs


def short_name(model: str) -> str:
    """Return a model reference as a part of a folder's name; a quantization stays in it."""
    name = Path(model.removeprefix("openai:").partition("@")[0]).name
    return name.lower().replace(":", "-").removesuffix(".gguf")


def load_toml(path: Path) -> dict[str, Any]:
    """Read one TOML file. Raises InputError: missing, or not TOML; says the line."""
    return read_toml(path, "See `arte-edge ls` for the shipped presets.")


def parse_set(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn ``align.learning_rate=1e-6`` and the like into nested tables; a later one wins."""
    tables: dict[str, Any] = {}
    for assignment in assignments:
        key, found, text = assignment.partition("=")
        parts = key.strip().replace("-", "_").split(".")
        if not found or not all(parts):
            raise InputError(f"--set {assignment}: not of the form key=value", "Example: --set tune.epochs=2")
        try:
            value = toml_loads(f"v = {text}")["v"]
        except (ValueError, KeyError):
            value = text.strip()  # a bare word is a string: quotes do not survive every shell
        table = tables
        for part in parts[:-1]:
            below = table.get(part)
            table[part] = below if isinstance(below, dict) else {}  # task=x, then task.ref=y
            table = table[part]
        table[parts[-1]] = value
    return tables


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid on top, tables merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def build(source: str, *layers: Mapping[str, Any]) -> RunConfig:
    """Return the validated configuration of `layers`, the last one on top. `source` is named in errors.

    Raises InputError: every problem at once, each with its key; an unknown key with its nearest neighbour.
    """
    tables: dict[str, Any] = {}
    for layer in layers:
        tables = merge(tables, layer)
    reject(problems_of(tables), f"{source}: ")
    return RunConfig.model_validate(tables)


def reject(found: Sequence[Problem], where: str = "") -> None:
    """Raise an InputError that names every problem, if there are any."""
    if found:
        messages, hints = zip(*found, strict=True)
        raise InputError(where + "; ".join(messages), " ".join(dict.fromkeys(filter(None, hints))))


def problems_of(tables: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with nested tables; nothing if they are a run."""
    try:
        RunConfig.model_validate(tables)
    except ValidationError as error:
        return problems(error, RunConfig)
    return []


def dump_toml(config: RunConfig) -> str:
    """Return the configuration as TOML, every key written out."""
    import tomlkit

    return tomlkit.dumps(config.model_dump(mode="json", exclude_none=True))


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys in which two nested tables differ."""
    keys: list[str] = []
    for key in sorted({*a, *b}):
        one, two = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            keys += differences(one, two, f"{prefix}{key}.")
        elif one != two:
            keys.append(prefix + key)
    return keys
