"""The stages of a run on GPUs: `estimate` counts their calls, `gpu_plan` says what a call and a training take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from arte_edge.console import out
from arte_edge.distill.gpu_plan import Gpus, Placement, Training


@dataclass
class GpuPlan:
    """Hours of each stage (calls and training), where the models run, what a training needs."""

    gpus: Gpus
    call_hours: Mapping[str, float]
    placed: Mapping[str, Placement]
    trainings: list[Training]
    notes: list[str] = field(default_factory=list)

    def hours_of(self, stage: str) -> float:
        """Return the hours of a stage, or of all: ``total``."""
        calls = sum(hours for name, hours in self.call_hours.items() if stage in (name, "total"))
        return calls + sum(each.hours for each in self.trainings if stage in (each.stage, "total"))

    def usd_of(self, stage: str) -> float | None:
        usd = self.gpus.usd(self.hours_of(stage))
        return None if usd is None else round(usd, 2)

    def as_row(self) -> dict[str, Any]:
        return {
            "n": self.gpus.n,
            "kind": self.gpus.kind,
            "usd_per_hour": self.gpus.usd_per_hour,
            "models": {who: {**asdict(one), "memory_gb": one.memory_gb} for who, one in self.placed.items()},
            "trainings": [each.as_row() for each in self.trainings],
        }

    def print(self) -> None:
        """Print where the models run and what a training needs, on stdout."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, justify in (("GB a GPU", "left"), ("GPUs", "right"), ("weights", "right")):
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for name in ("optimizer", "cache or activations", "sum", "tokens/s read, written"):
            table.add_column(name, justify="right")
        for who, one in self.placed.items():
            rates = f"{one.prefill_tokens_per_s:,.0f}, {one.decode_tokens_per_s:,.0f}"
            numbers = (one.weights_gb, 0.0, one.kv_gb, one.memory_gb)
            table.add_row(who, f"{one.replicas} × {one.gpus_each}", *(f"{gb:.1f}" for gb in numbers), rates)
        for each in self.trainings:
            numbers = (each.weights_gb, each.optimizer_gb, each.activations_gb, each.memory_gb)
            table.add_row(each.stage, f"{each.processes} × 1", *(f"{gb:.1f}" for gb in numbers), "")
        out.print(table)
