"""What the two trainers can be told. `arte_edge.distill.config` maps a run's tables to these."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["CollapseLimits", "DpoSettings", "Lora", "SftSettings"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lora(_Settings):
    """The adapter: which layers get one, and how large it is."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0, description="the update is scaled by alpha / rank")
    targets: tuple[str, ...] = Field(default=(), description="layer names; empty: every linear layer")


class _Training(_Settings):
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(ge=1, description="examples (SFT) or pairs (DPO) in one forward pass")
    accumulate: int = Field(default=1, ge=1, description="forward passes to one optimizer step")
    epochs: float = Field(default=1.0, gt=0)
    warmup: float = Field(ge=0, le=1, description="share of the steps in which the rate rises to its peak")
    max_length: int = Field(default=1024, ge=8, description="tokens; a longer example is dropped and counted")
    seed: int = Field(default=0, ge=0)
    save_every_s: float = Field(default=120.0, ge=0, description="seconds of work that a kill may cost")


class SftSettings(_Training):
    """Supervised fine-tuning; the paper: 2e-5, one epoch, 3 % warm-up, linear decay."""

    learning_rate: float = Field(default=2e-5, gt=0, description="for LoRA ten times as much")
    batch_size: int = Field(default=8, ge=1)
    warmup: float = Field(default=0.03, ge=0, le=1)
    lora: Lora | None = Field(default=None, description="None: all weights are trained")
    dtype: Literal["auto", "bfloat16", "float16"] = Field(
        default="auto", description="of the written checkpoint; auto: float16, for Gemma bfloat16"
    )


class CollapseLimits(_Settings):
    """When an aligned teacher counts as broken, each limit against how the run began."""

    min_valid: float = Field(default=0.5, ge=0, le=1, description="share of the first valid-draft rate")
    length_factor: float = Field(default=2.0, gt=1, description="mean length may change by this factor")
    max_chosen_drop_nats: float = Field(
        default=20.0, gt=0, description="fall of a chosen completion's log-probability, mean of recent steps"
    )


class DpoSettings(_Training):
    """Direct preference optimization with LoRA; the defaults are what survives a small teacher."""

    learning_rate: float = Field(default=5e-6, gt=0, description="the paper: 1e-7, all weights")
    batch_size: int = Field(default=2, ge=1)
    accumulate: int = Field(default=2, ge=1)
    warmup: float = Field(default=0.1, ge=0, le=1)
    beta: float = Field(default=0.1, gt=0, description="how strongly the reference holds")
    losses: tuple[Literal["sigmoid", "sft", "ipo", "hinge"], ...] = Field(
        default=("sigmoid", "sft"), min_length=1, description='the paper: ["sigmoid"]'
    )
    loss_weights: tuple[float, ...] = Field(default=(), description="one a loss; empty: 1.0 each")
    lora: Lora = Lora()
    probe_every: int = Field(default=4, ge=1, description="optimizer steps between two looks")
    limits: CollapseLimits = CollapseLimits()

    @model_validator(mode="after")
    def _one_weight_a_loss(self) -> DpoSettings:
        if self.loss_weights and len(self.loss_weights) != len(self.losses):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} values for {len(self.losses)} losses"
            )
        return self
