"""Detect model collapse during alignment, and stop before the teacher is broken.

DPO on few pairs can lower the probability of the chosen text itself, and a teacher then forgets the format that it
must generate or never stops, while rewards look fine. So at regular steps the adapter is saved as a PEFT folder, the
teacher generates a few drafts with it (the probe), and the last adapter that passed is used. The result of a check is
written down at once: a resumed run repeats none, and knows how the teacher performed at the start.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arte_edge.cache import rename_into_place, write_atomic
from arte_edge.distill.train.checkpoints import Workspace
from arte_edge.distill.train.common import CollapseLimits, DpoSettings
from arte_edge.distill.train.ranks import agreed, is_main
from arte_edge.files import json_loads
from arte_edge.store import read_jsonl, write_jsonl

if TYPE_CHECKING:
    from transformers import TrainerCallback

_RECENT = 4  # steps whose mean is judged: one batch alone is noise


@dataclass(frozen=True)
class ProbeResult:
    """The teacher's drafts for a few held-out prompts."""

    valid_rate: float  # share of valid drafts, 0 to 1
    mean_tokens: float  # mean length of its completions


Probe = Callable[[Path], ProbeResult]  # from a PEFT folder to what the teacher generates with it


def chosen_drop_nats(chosen_rewards: Sequence[float], beta: float) -> float:
    """Return the loss of log-probability of chosen completions against the reference, mean of recent steps.

    `chosen_rewards` is TRL's ``rewards/chosen`` of each step, which is beta times the gain: unlike
    ``logps/chosen`` it does not move with which pairs happen to be in a batch.
    """
    recent = chosen_rewards[-_RECENT:]
    return -sum(recent) / len(recent) / beta if recent else 0.0


def collapse_reason(
    limits: CollapseLimits, start: ProbeResult | None, now: ProbeResult | None, drop_nats: float
) -> str:
    """Return why the teacher counts as collapsed; empty if it does not."""
    if drop_nats > limits.max_chosen_drop_nats:
        limit = limits.max_chosen_drop_nats
        return f"chosen texts lost {drop_nats:.1f} nats of log-probability (limit {limit:g})"
    if start is None or now is None:
        return ""
    floor = limits.min_valid * start.valid_rate
    if now.valid_rate < floor:
        return f"valid drafts fell from {start.valid_rate:.0%} to {now.valid_rate:.0%} (limit {floor:.0%})"
    low, high = start.mean_tokens / limits.length_factor, start.mean_tokens * limits.length_factor
    if start.mean_tokens and not low <= now.mean_tokens <= high:
        return (
            f"mean length went from {start.mean_tokens:.0f} to {now.mean_tokens:.0f} tokens "
            f"(limits {low:.0f} and {high:.0f})"
        )
    return ""


def copy_adapter(source: Path, target: Path) -> Path:
    """Copy the PEFT adapter in `source`, whole or not at all and without its base's path; return `target`."""
    staged = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    shutil.copyfile(source / "adapter_model.safetensors", staged / "adapter_model.safetensors")
    config = json_loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = None  # PEFT writes where the base lay on this machine
    text = json.dumps(config, indent=2, sort_keys=True)
    write_atomic(staged / "adapter_config.json", text.encode())
    shutil.rmtree(target, ignore_errors=True)
    return rename_into_place(staged, target)


def _folder_name(step: int) -> str:
    return f"step-{step}"


def is_untrained(adapter: Path) -> bool:
    """Return whether the adapter that a probe gets is the one before the first step, which changes nothing."""
    return adapter.name == _folder_name(0)


class CollapseMonitor:
    """The checks of one training, stored in its work folder."""

    def __init__(
        self,
        workspace: Workspace,
        settings: DpoSettings,
        probe: Probe | None,
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        """`ended` says whether the training ends with the current step, whatever its schedule."""
        self._folder, self._settings, self._probe, self._ended = workspace.folder, settings, probe, ended
        self._file = self._folder / "probes.jsonl"
        rows = read_jsonl(self._file) if self._file.is_file() else []
        self.checks: list[dict[str, Any]] = [row for row in rows if {"step", "reason"} <= row.keys()]

    @property
    def reason(self) -> str:
        """Why the training must stop; empty while all checks passed."""
        return next((check["reason"] for check in self.checks if check["reason"]), "")

    @property
    def good_step(self) -> int:
        """The last step whose adapter passed."""
        return int(max(check["step"] for check in self.checks if not check["reason"]))

    def adapter(self, step: int) -> Path:
        """Return the folder of the adapter that was checked after `step`."""
        return self._folder / "adapters" / _folder_name(step)

    def forget_after(self, step: int) -> None:
        """Drop the checks of steps that a resumed training repeats."""
        self.checks = [check for check in self.checks if check["step"] <= step]

    def due(self, state: Any) -> bool:
        step: int = state.global_step
        return step % self._settings.probe_every == 0 or step == state.max_steps or self._ended()

    def check_if_due(self, state: Any, checkpoint: Path) -> None:
        """Check the adapter in the trainer's `checkpoint` if a check is due at its step."""
        if self.due(state):
            self.check(state.global_step, checkpoint, _chosen_rewards(state))

    def check(self, step: int, adapter: Path, chosen_rewards: Sequence[float]) -> None:
        """Check the adapter in the folder `adapter`, unless this step was checked before."""
        if any(check["step"] == step for check in self.checks):
            return
        now = None
        if is_main():
            copy = copy_adapter(adapter, self.adapter(step))
            now = self._probe(copy) if self._probe else None
        self._record(step, agreed(now), chosen_rewards)

    def _record(self, step: int, now: ProbeResult | None, chosen_rewards: Sequence[float]) -> None:
        drop_nats = chosen_drop_nats(chosen_rewards, self._settings.beta)
        reason = collapse_reason(self._settings.limits, self._start(), now, drop_nats)
        probed = {} if now is None else {"valid_rate": now.valid_rate, "mean_tokens": now.mean_tokens}
        self.checks.append({"step": step, **probed, "chosen_drop_nats": drop_nats, "reason": reason})
        if is_main():
            write_jsonl(self._file, self.checks)

    def _start(self) -> ProbeResult | None:
        if not self.checks or "valid_rate" not in self.checks[0]:
            return None
        return ProbeResult(self.checks[0]["valid_rate"], self.checks[0]["mean_tokens"])

    def callback(self) -> TrainerCallback:
        """Return the callback that checks when one is due, and stops the training on a collapse."""
        from transformers import TrainerCallback

        monitor = self

        class Checking(TrainerCallback):  # type: ignore[misc]
            def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                drop_nats = chosen_drop_nats(_chosen_rewards(state), monitor._settings.beta)
                if drop_nats > monitor._settings.limits.max_chosen_drop_nats:
                    monitor._record(state.global_step, None, _chosen_rewards(state))
                    control.should_training_stop = True

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_save = control.should_save or monitor.due(state)

            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                monitor.check_if_due(state, Path(args.output_dir) / f"checkpoint-{state.global_step}")
                control.should_training_stop = control.should_training_stop or bool(monitor.reason)

        return Checking()


def _chosen_rewards(state: Any) -> list[float]:
    return [row["rewards/chosen"] for row in state.log_history if "rewards/chosen" in row]
