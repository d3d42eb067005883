"""Every setting of a run, as frozen models: one table of the TOML file for each stage.

The defaults work for small models on a laptop; the preset `paper` has the paper's
settings. An unknown key is an error that names the nearest one. The functions below the
models read TOML files and ``--set``, and name the file and the key in their errors.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arte_edge.errors import InputError, nearest

__all__ = [
    "Align",
    "Calibrate",
    "Check",
    "Data",
    "Deploy",
    "Elicit",
    "Evaluate",
    "LabelPolicy",
    "ModelConfig",
    "Prefer",
    "RunConfig",
    "Tailor",
    "TaskConfig",
    "TeacherConfig",
    "Tune",
    "build",
    "differences",
    "dump_toml",
    "load_toml",
    "parse_set",
    "problems_of",
]

Data = Literal["arte", "original-teacher", "question-only", "rationale-only", "random"]
LabelPolicy = Literal["teacher", "vote", "drop-disagreement"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskConfig(_Section):
    """Where the task comes from."""

    ref: str = Field(
        default="home_intents", description="name of a shipped task, a task folder, or hub:org/name"
    )
    bbh: str | None = Field(default=None, description="folder in BIG-Bench Hard's layout that contains `ref`")


class ModelConfig(_Section):
    """A model and how to run it."""

    model: str = Field(description="registry name, path, Hub id, or openai:MODEL@URL")
    engine: Literal["auto", "llamacpp", "transformers"] = Field(
        default="auto", description="auto: llamacpp for GGUF files, otherwise transformers"
    )
    template: Literal["auto", "none"] = Field(
        default="auto", description="none: plain-text prompts, even if the model has a chat template"
    )
    parallel: int = Field(
        default=32,
        ge=1,
        le=200,
        description="batch size of decoding (sequences); for a server, concurrent requests",
    )
    shots: int = Field(default=0, ge=0, le=40, description="few-shot examples before each question")
    requests_per_minute: float = Field(default=0.0, ge=0.0, description="rate limit of a server; 0: none")
    tokens_per_minute: float = Field(default=0.0, ge=0.0, description="rate limit of a server; 0: none")
    timeout_s: float = Field(default=120.0, gt=0.0, description="timeout of one request to a server, seconds")


class TeacherConfig(ModelConfig):
    """The teacher: like any model, but few-shot by default."""

    shots: int = Field(default=8, ge=0, le=40, description="few-shot examples before each question")


class Check(_Section):
    """Before the first step: does the teacher outperform the student?"""

    examples: int = Field(
        default=40, ge=10, description="validation examples that teacher and student answer"
    )


class Elicit(_Section):
    """Step 1: the teacher generates draft questions and rationales."""

    questions: int = Field(
        default=40, ge=4, description="valid draft questions to generate (paper: 250 per task)"
    )
    shown: int = Field(default=3, ge=1, description="seed questions in each prompt (paper: 3)")
    one_draw: bool = Field(
        default=False,
        description="draw seeds once per batch of prompts: faster (shared prefix), less diverse",
    )
    asked: int = Field(default=5, ge=1, description="questions requested per prompt (paper: 5)")
    temperature: float = Field(default=1.0, ge=0.0, le=2.0, description="of questions")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="of questions, also in tailor")
    question_tokens: int = Field(
        default=300, ge=16, description="maximum tokens of a completion with questions"
    )
    rationale_tokens: int = Field(default=120, ge=8, description="maximum tokens of a rationale")
    rouge: float = Field(
        default=0.7, gt=0.0, le=1.0, description="ROUGE-L F1 from which a question counts as a duplicate"
    )
    label: LabelPolicy = Field(
        default="teacher",
        description="how a draft is labelled: the teacher's target, a majority vote, or drop if they disagree",
    )
    grammar: bool = Field(
        default=True, description="constrain the end of a rationale to an answer in its tags"
    )
    opinion_shots: int = Field(
        default=24,
        ge=0,
        description="closed-answer tasks: few-shot examples for a direct answer of the teacher, one more vote; 0: off",
    )
    max_prompts: int = Field(
        default=0, ge=0, description="prompts before giving up; 0: ten times the minimum"
    )


class Calibrate(_Section):
    """Step 2: the preference set, the k most discriminating validation questions."""

    k: int = Field(default=40, ge=2, description="size of the preference set (paper: 40)")
    items: int = Field(default=100, ge=10, description="validation questions in the response matrix")
    shots: tuple[int, ...] = Field(
        default=(0, 1, 2, 3), description="numbers of few-shot examples for each model (paper: 0 to 3)"
    )
    models: tuple[str, ...] = Field(default=(), description="respondents besides teacher and student")


class Prefer(_Section):
    """Step 3: the student's one-shot score of every draft."""

    score: Literal["likelihood", "forced", "accuracy"] = Field(
        default="likelihood",
        description="likelihood: probability of the right answer; forced: is it the likeliest; "
        "accuracy: generate and match (paper)",
    )
    bias_free: bool = Field(
        default=True,
        description="closed-answer tasks: remove the answer bias that a draft induces (contextual calibration)",
    )
    length_free: bool = Field(
        default=True, description="closed-answer tasks: regress log(length) out of the score"
    )
    answer_tokens: int = Field(default=96, ge=4, description="maximum tokens of an answer (accuracy only)")
    race: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="adaptive scoring: measure only what the ranking needs; auto: from 40 drafts and "
        "24 questions on; "
        "off: the full grid (paper)",
    )
    race_share: float = Field(
        default=0.25, gt=0.0, le=1.0, description="adaptive scoring: at most this share of the full grid"
    )
    race_error: float = Field(
        default=0.05,
        gt=0.0,
        lt=0.5,
        description="adaptive scoring: risk at which the rank of a draft counts as decided",
    )
    engine: Literal["auto", "student"] = Field(
        default="auto",
        description="auto: for 500+ scores, benchmark the available engines and use the fastest (may run in "
        "bfloat16); student: use the engine that runs the student elsewhere",
    )
    student_file: str = Field(
        default="",
        description="score with the student quantized to this type, such as Q4_K_M; empty: 16 bits",
    )


class Align(_Section):
    """Step 4: DPO of the teacher on the student's preferences."""

    question_pairs: int = Field(
        default=50, ge=0, description="preference pairs of questions (paper: 50 per task)"
    )
    rationale_pairs: int = Field(
        default=250, ge=0, description="preference pairs of rationales (paper: 250 per task)"
    )
    min_gap: float = Field(
        default=0.02, ge=0.0, description="minimum score difference; a smaller one is a tie and is dropped"
    )
    learning_rate: float = Field(default=5e-6, gt=0.0, description="paper: 1e-7, all weights")
    batch_size: int = Field(default=4, ge=1, description="pairs per optimizer step (paper: 16)")
    epochs: float = Field(default=1.0, gt=0.0)
    beta: float = Field(default=0.1, gt=0.0, description="strength of the KL penalty of DPO")
    sft_weight: float = Field(
        default=1.0, ge=0.0, description="weight of the SFT loss on chosen completions; 0: DPO only"
    )
    lora_rank: int = Field(default=8, ge=1)
    lora_targets: tuple[str, ...] = Field(
        default=(), description="layers to adapt, such as q_proj; empty: every linear layer"
    )
    shots: int = Field(default=0, ge=0, description="few-shot examples in the prompts of rationale pairs")
    probe_every: int = Field(default=4, ge=1, description="optimizer steps between checks for model collapse")
    probe_prompts: int = Field(default=4, ge=1, description="held-out prompts per check")


class Tailor(_Section):
    """Step 5: the aligned teacher writes the training data."""

    questions: int = Field(
        default=150, ge=8, description="training examples to generate (paper: about 290 per task)"
    )
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    label: LabelPolicy = Field(default="vote", description="as in elicit")
    even_labels: bool = Field(
        default=True, description="closed-answer tasks: balance labels when subsampling"
    )
    max_prompts: int = Field(default=0, ge=0, description="as in elicit")


class Tune(_Section):
    """Step 6: supervised fine-tuning of the student."""

    method: Literal["full", "lora"] = "full"
    learning_rate: float = Field(default=2e-5, gt=0.0, description="paper: 2e-5")
    epochs: float = Field(default=2.0, gt=0.0, description="paper: 1")
    batch_size: int = Field(default=4, ge=1)
    lora_rank: int = Field(default=16, ge=1)


class Evaluate(_Section):
    """Last, once: evaluation on the held-out test split."""

    limit: int = Field(default=0, ge=0, description="test examples; 0: all")
    shots: tuple[int, ...] = Field(
        default=(0, 3), description="numbers of few-shot examples with which the student is tested"
    )
    answer_tokens: int = Field(default=96, ge=4, description="maximum tokens of an answer")
    teacher: bool = Field(default=True, description="evaluate the teacher as well")


class Deploy(_Section):
    """The target device and its latency limit for an answer: see docs/runs.md."""

    device: str = Field(
        default="", description="device profile, or a fingerprint in `rates`; empty: no latency limit"
    )
    file: str = Field(
        default="Q4_K_M", description="quantization type, or name, of the file that runs on the device"
    )
    max_answer_seconds: float = Field(
        default=3.0, gt=0.0, description="latency limit from the prompt to the last token of the answer"
    )
    rates: str = Field(
        default="",
        description="measured speeds: a student.json, a bench.jsonl, or a folder with them; empty: predict them",
    )
    draws: int = Field(
        default=8,
        ge=0,
        description="rationales sampled again, at most, for a question whose first is too long",
    )


class RunConfig(_Section):
    """A whole run, as in ``run.toml``."""

    name: str = Field(default="", description="folder under runs/; empty: task and student")
    seed: int = Field(default=0, ge=0)
    data: Data = Field(
        default="arte", description="training data of the student; the values other than arte are ablations"
    )
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
    evaluate: Evaluate = Evaluate()
    deploy: Deploy = Deploy()

    @model_validator(mode="after")
    def _pairs_for_data(self) -> RunConfig:
        if self.aligned and not (self.n_question_pairs or self.n_rationale_pairs):
            raise ValueError(f'align: data = "{self.data}" needs question_pairs or rationale_pairs above 0')
        return self

    @property
    def aligned(self) -> bool:
        """Whether the teacher is aligned in this run."""
        return self.data != "original-teacher"

    @property
    def n_question_pairs(self) -> int:
        return 0 if self.data in ("rationale-only", "original-teacher") else self.align.question_pairs

    @property
    def n_rationale_pairs(self) -> int:
        return 0 if self.data in ("question-only", "original-teacher") else self.align.rationale_pairs


def load_toml(path: Path) -> dict[str, Any]:
    """Read one TOML file.

    Raises:
        InputError: missing, or not TOML; says the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file", "See `arte-edge ls` for the shipped presets.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from error


def parse_set(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn ``align.learning_rate=1e-6`` and the like into nested tables; a later one wins."""
    tables: dict[str, Any] = {}
    for assignment in assignments:
        key, found, text = assignment.partition("=")
        parts = key.strip().replace("-", "_").split(".")
        if not found or not all(parts):
            raise InputError(f"--set {assignment}: not of the form key=value", "Example: --set tune.epochs=2")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
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

    Raises:
        InputError: every problem at once, each with its key; an unknown key with its nearest neighbour.
    """
    tables: dict[str, Any] = {}
    for layer in layers:
        tables = merge(tables, layer)
    try:
        return RunConfig.model_validate(tables)
    except ValidationError as error:
        problems, hints = zip(*_problems(error), strict=True)
        raise InputError(f"{source}: " + "; ".join(problems), " ".join(filter(None, hints))) from error


def problems_of(tables: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is wrong with nested tables as (message, hint) pairs; empty if they are a run."""
    try:
        RunConfig.model_validate(tables)
    except ValidationError as error:
        return _problems(error)
    return []


def _problems(error: ValidationError) -> list[tuple[str, str]]:
    found = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            hint = nearest(str(item["loc"][-1]), _keys_at(item["loc"][:-1]))
            found.append((f"unknown key '{key}'", hint))
        else:
            message = item["msg"].removeprefix("Value error, ")
            found.append((f"{key}: {message}" if key else message, ""))
    return found


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        options = [annotation, *get_args(annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)


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
