"""Everything a run can be told, as frozen models: one table of the TOML file a stage.

The defaults are what survives small models on a laptop; the preset `paper` has the
paper's settings. A key that does not exist is an error that names the nearest one.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "Align",
    "Calibrate",
    "Check",
    "Data",
    "Deploy",
    "Elicit",
    "Evaluate",
    "ModelConfig",
    "Prefer",
    "RunConfig",
    "Tailor",
    "TaskConfig",
    "TeacherConfig",
    "Tune",
]

Data = Literal["arte", "original-teacher", "question-only", "rationale-only", "random"]
LabelPolicy = Literal["teacher", "vote", "drop-disagreement"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskConfig(_Section):
    """Where the task comes from."""

    ref: str = Field(default="home_intents", description="a shipped task's name, a task folder, hub:org/name")
    bbh: str | None = Field(default=None, description="a folder in BIG-Bench Hard's layout that holds `ref`")


class ModelConfig(_Section):
    """One model and how to run it."""

    model: str = Field(description="a registry name, a path, a Hub id, or openai:MODEL@URL")
    engine: Literal["auto", "llamacpp", "transformers"] = Field(
        default="auto", description="auto: llamacpp for GGUF files, else transformers"
    )
    template: Literal["auto", "none"] = Field(
        default="auto", description="none: plain text although the model has a chat template"
    )
    parallel: int = Field(
        default=32, ge=1, le=200, description="sequences decoded together; a server's requests at once"
    )
    shots: int = Field(default=0, ge=0, le=40, description="worked seed examples shown before each question")
    requests_per_minute: float = Field(default=0.0, ge=0.0, description="of a server; 0: no limit")
    tokens_per_minute: float = Field(default=0.0, ge=0.0, description="of a server; 0: no limit")
    timeout_s: float = Field(default=120.0, gt=0.0, description="how long one call to a server may take")


class TeacherConfig(ModelConfig):
    """The teacher: as any model, but shown worked examples unless told otherwise."""

    shots: int = Field(default=8, ge=0, le=40, description="worked examples shown before each question")


class Check(_Section):
    """Before anything is spent: does the teacher know what the student does not?"""

    examples: int = Field(default=40, ge=10, description="validation examples that both answer")


class Elicit(_Section):
    """Step 1: draft questions and rationales of the teacher."""

    questions: int = Field(default=40, ge=4, description="valid draft questions (paper: 250 a task)")
    shown: int = Field(default=3, ge=1, description="seed questions shown in each prompt (paper: 3)")
    one_draw: bool = Field(
        default=False, description="one draw of seeds a round of prompts: they share prefill, but vary less"
    )
    asked: int = Field(default=5, ge=1, description="questions asked for in each prompt (paper: 5)")
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="for questions, here and in tailor")
    question_tokens: int = Field(default=300, ge=16, description="tokens for one prompt's questions")
    rationale_tokens: int = Field(default=120, ge=8)
    rouge: float = Field(default=0.7, gt=0.0, le=1.0, description="ROUGE-L from which two questions are one")
    label: LabelPolicy = Field(default="teacher", description="whose answer counts as a draft's label")
    grammar: bool = Field(default=True, description="hold the end of a rationale to an answer in its tags")
    opinion_shots: int = Field(
        default=24,
        ge=0,
        description="closed answers: shots of the teacher's bare answer, which votes; 0: none",
    )
    max_prompts: int = Field(
        default=0, ge=0, description="prompts before giving up; 0: ten times what would do if all were valid"
    )


class Calibrate(_Section):
    """Step 2: the preference set, the k most discriminating validation questions."""

    k: int = Field(default=40, ge=2, description="questions in the preference set (paper: 40)")
    items: int = Field(default=100, ge=10, description="validation questions in the score matrix")
    shots: tuple[int, ...] = Field(default=(0, 1, 2, 3), description="shots of each model (paper: 0 to 3)")
    models: tuple[str, ...] = Field(default=(), description="more models beside teacher and student")


class Prefer(_Section):
    """Step 3: the student's one-shot score of every draft."""

    score: Literal["likelihood", "forced", "accuracy"] = Field(
        default="likelihood", description="accuracy: generate and match (paper); see docs/runs.md"
    )
    bias_free: bool = Field(
        default=True,
        description="closed answers: order drafts by the score without the answer bias they induce",
    )
    length_free: bool = Field(
        default=True, description="closed answers: and without what a draft's length explains of it"
    )
    answer_tokens: int = Field(default=96, ge=4, description="tokens the student may write (accuracy)")
    race: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="score only what the order needs; auto: from 40 drafts and 24 questions on; off: all (paper)",
    )
    race_share: float = Field(default=0.25, gt=0.0, le=1.0, description="of the full grid, at most")
    race_error: float = Field(
        default=0.05, gt=0.0, lt=0.5, description="risk at which a draft's place counts as decided"
    )
    engine: Literal["auto", "student"] = Field(
        default="auto",
        description="auto: from 500 scores on the fastest here, in bfloat16 too; student: as all else of it",
    )
    student_file: str = Field(
        default="", description="score with the student quantized so, as in Q4_K_M; empty: with 16 bits"
    )


class Align(_Section):
    """Step 4: DPO of the teacher on the student's preferences."""

    question_pairs: int = Field(default=50, ge=0, description="paper: 50 a task")
    rationale_pairs: int = Field(default=250, ge=0, description="paper: 250 a task")
    min_gap: float = Field(default=0.02, ge=0.0, description="score gap below which a pair is a tie")
    learning_rate: float = Field(default=5e-6, gt=0.0, description="paper: 1e-7, full weights")
    batch_size: int = Field(default=4, ge=1, description="pairs an optimizer step (paper: 16)")
    epochs: float = Field(default=1.0, gt=0.0)
    beta: float = Field(default=0.1, gt=0.0)
    sft_weight: float = Field(
        default=1.0, ge=0.0, description="weight of the SFT loss on chosen; 0: DPO alone"
    )
    lora_rank: int = Field(default=8, ge=1)
    lora_targets: tuple[str, ...] = Field(
        default=(), description="layers that get an adapter, such as q_proj; empty: every linear layer"
    )
    shots: int = Field(default=0, ge=0, description="worked examples in the prompts of rationale pairs")
    probe_every: int = Field(default=4, ge=1, description="optimizer steps between looks for a collapse")
    probe_prompts: int = Field(default=4, ge=1, description="held-out prompts of such a look")


class Tailor(_Section):
    """Step 5: the aligned teacher writes the training data."""

    questions: int = Field(
        default=150, ge=8, description="training examples wanted (paper: about 290 a task)"
    )
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    label: LabelPolicy = Field(default="vote", description="as in elicit")
    even_labels: bool = Field(
        default=True, description="closed answers: of more examples than wanted those that spread the labels"
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
    """At the end, once: the untouched test split."""

    limit: int = Field(default=0, ge=0, description="test examples; 0: all of them")
    shots: tuple[int, ...] = Field(default=(0, 3), description="settings in which the student is tested")
    answer_tokens: int = Field(default=96, ge=4)
    teacher: bool = Field(default=True, description="test the teacher as well")


class Deploy(_Section):
    """The device that the student is for, and how long an answer may take there: see docs/recommend.md."""

    device: str = Field(default="", description="profile, or fingerprint in `rates`; empty: no time limit")
    file: str = Field(default="Q4_K_M", description="quantization, or name, of the file that will run there")
    max_answer_seconds: float = Field(
        default=3.0, gt=0.0, description="from the prompt to the answer's last token"
    )
    rates: str = Field(
        default="",
        description="where its speed was measured: a student.json, a bench.jsonl, or a folder with them; "
        "empty: predicted",
    )
    draws: int = Field(
        default=8, ge=0, description="rationales drawn anew for a question whose first is too long, at most"
    )


class RunConfig(_Section):
    """A whole run, as in ``run.toml``."""

    name: str = Field(default="", description="the folder under runs/; empty: task and student")
    seed: int = Field(default=0, ge=0)
    data: Data = Field(default="arte", description="what the student learns from; the others are ablations")
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
        if self.aligned and not (self.wanted_question_pairs or self.wanted_rationale_pairs):
            raise ValueError(f'align: data = "{self.data}" needs question_pairs or rationale_pairs above 0')
        return self

    @property
    def aligned(self) -> bool:
        """Whether the teacher is aligned at all in this run."""
        return self.data != "original-teacher"

    @property
    def wanted_question_pairs(self) -> int:
        return 0 if self.data in ("rationale-only", "original-teacher") else self.align.question_pairs

    @property
    def wanted_rationale_pairs(self) -> int:
        return 0 if self.data in ("question-only", "original-teacher") else self.align.rationale_pairs
