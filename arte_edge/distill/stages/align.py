"""Step 4, align: DPO aligns the teacher with the student's preferences (paper, section 3.4).

Pairs of questions answer the question-generation prompt, pairs of rationales the naive step-by-step
prompt. The result is a LoRA adapter; for a teacher that runs on llama.cpp it is also written as GGUF,
so that the aligned teacher decodes as fast as the original one.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from arte_edge.cache import sha256_file
from arte_edge.console import doing
from arte_edge.distill.config import RunConfig
from arte_edge.distill.generation.inputs import Focus, InputSource
from arte_edge.distill.preference.dpo_pairs import (
    draw_input_pairs,
    draw_question_pairs,
    draw_rationale_pairs,
    length_report,
)
from arte_edge.distill.prompts import question_messages, question_prefill, rationale_messages, teacher_shots
from arte_edge.distill.run_context import Row, RunContext, Summary
from arte_edge.distill.stages.elicit import draft_plan, draft_source
from arte_edge.distill.train.collapse import ProbeResult
from arte_edge.distill.train.common import DpoSettings, Lora
from arte_edge.distill.train.dpo import train_dpo
from arte_edge.errors import StoppedEarly
from arte_edge.runtimes.completion import Engine, Sampling
from arte_edge.runtimes.loader import open_local
from arte_edge.runtimes.prompt_render import Message
from arte_edge.tasks.answers import canonical

__all__ = ["align", "dpo_settings"]

Adapter = tuple[Path, str]


def align(run: RunContext) -> tuple[Summary, Adapter]:
    """Write pairs.jsonl and the adapter; return the summary and the adapter as the teacher's engine loads it.

    Raises StoppedEarly: no pair is left once ties are dropped.
    """
    config = run.config.align
    inputs = {
        "align": config.model_dump(mode="json"),
        "data": run.config.alignment,
        "teacher": run.identity(run.config.teacher),
        "scores": run.outputs("prefer"),
        "asked": [run.config.elicit.shown, run.config.elicit.asked],
        **run.data_inputs(),
    }
    with run.stage("align", inputs, _describe) as stage:
        if stage.todo:
            pairs, ties = _pairs(run)
            if not pairs:
                raise StoppedEarly(
                    f"align: every pair is a tie at align.min_gap = {config.min_gap}: the scores do not "
                    "distinguish drafts",
                    "Elicit more questions, lower align.min_gap, or compare with data = 'original-teacher'.",
                )
            stage.write("pairs.jsonl", pairs)
            run.close_engines()  # the trainer needs the memory that engines hold
            base = run.checkpoint(run.config.teacher)
            with run.reporter.percent("DPO, with checks") as progress:
                result = train_dpo(
                    base,
                    [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs],
                    stage.folder / "adapter",
                    dpo_settings(run.config),
                    probe=lambda adapter_dir: _probe(run, adapter_dir),
                    progress=progress,
                )
            if result.collapse:
                run.reporter.warn(
                    f"alignment stopped early: {result.collapse}; the adapter of step {result.kept_step} is used"
                )
            adapter = _converted_adapter(run, stage.folder)
            stage.finish(
                {
                    "pairs": len(pairs),
                    "question_pairs": sum(pair["level"] == "question" for pair in pairs),
                    "ties_dropped": ties,
                    "gap": round(sum(pair["gap"] for pair in pairs) / len(pairs), 4),
                    "lengths": length_report(pairs),
                    "steps": result.steps,
                    "kept_step": result.kept_step,
                    "stopped": result.collapse,
                    "margin": _last(result.history, "rewards/margins"),
                    "accuracy": _last(result.history, "rewards/accuracies"),
                    "adapter_sha256": adapter[1],
                }
            )
    path = _adapter_path(run, stage.folder)
    weights = path if path.suffix else path / "adapter_model.safetensors"
    recorded = stage.files.get(weights.relative_to(stage.folder).as_posix())
    return stage.summary, (path, recorded or sha256_file(weights))


def _pairs(run: RunContext) -> tuple[list[Row], int]:
    """Return DPO pairs with their rendered prompts, and how many were dropped as ties."""
    config, elicit, seed = run.config.align, run.config.elicit, run.config.seed
    questions = run.read("prefer", "questions.jsonl")
    rationales = run.read("prefer", "scores.jsonl")
    min_gap = config.min_gap
    if run.config.data == "random":
        # The control: as many pairs, but ranked by a random score.
        control = random.Random(f"{seed}/random")
        questions = [{**row, "score": control.random()} for row in questions]
        rationales = [{**row, "score": control.random()} for row in rationales]
        min_gap = 0.0
    engine = run.engine(run.config.teacher)
    texts = {row["id"]: row["input"] for row in questions}
    n_pair = run.config.n_question_pairs
    if run.by_label:
        by_question, question_ties = draw_input_pairs(questions, n_pair, elicit.asked, min_gap, seed)
        source = InputSource(run, engine, run.config.teacher, draft_plan(run.config), Focus())
        for i, pair in enumerate(by_question):
            pair["prompt"], first = source.prompt(pair["label"], i)
            for side in ("chosen", "rejected"):
                lines = "\n".join(f"{number}. {text}" for number, text in enumerate(pair[side], first))
                pair[side] = lines.removeprefix(f"{first}.")  # which the prompt has written already
    else:
        shown = min(elicit.shown, len(run.task.seed))
        by_question, question_ties = draw_question_pairs(
            questions, n_pair, elicit.asked, shown + 1, min_gap, seed
        )
        for i, pair in enumerate(by_question):
            seeds = random.Random(f"{seed}/align/{i}").sample(list(run.task.seed), shown)
            messages = question_messages(run.task, seeds, elicit.asked)
            pair["prompt"] = _rendered(run, engine, messages, question_prefill(shown))
    by_rationale, rationale_ties = draw_rationale_pairs(
        rationales if run.reasons else [], run.config.n_rationale_pairs, min_gap, seed
    )
    for pair in by_rationale:
        shots = teacher_shots(run.task, config.shots)
        messages = rationale_messages(run.task, texts[pair["question"]], None, shots)
        pair["prompt"] = _rendered(run, engine, messages)
    mixed = by_question + by_rationale
    random.Random(f"{seed}/mix").shuffle(mixed)
    return mixed, question_ties + rationale_ties


def _rendered(run: RunContext, engine: Engine, messages: list[Message], prefill: str = "") -> str:
    return run.render(engine, messages, prefill, run.config.teacher)


def dpo_settings(run: RunConfig) -> DpoSettings:
    """Return the settings of the training."""
    config = run.align
    both = config.sft_weight > 0
    return DpoSettings(
        learning_rate=config.learning_rate,
        batch_size=1,
        accumulate=config.batch_size,
        epochs=config.epochs,
        beta=config.beta,
        losses=("sigmoid", "sft") if both else ("sigmoid",),
        loss_weights=(1.0, config.sft_weight) if both else (),
        lora=Lora(rank=config.lora_rank, alpha=2.0 * config.lora_rank, targets=config.lora_targets),
        probe_every=config.probe_every,
        seed=run.seed,
    )


def _probe(run: RunContext, adapter_dir: Path) -> ProbeResult:
    """Check for model collapse: the teacher with the adapter so far generates a few held-out drafts."""
    elicit = run.config.elicit
    engine = _open_with(run, adapter_dir, adapter_dir.parent / f"{adapter_dir.name}.gguf")
    plan = replace(draft_plan(run.config), seed=run.config.seed - 1)  # prompts that no stage trains on
    source = draft_source(run, engine, plan, Focus())
    try:
        requests = source.requests(0, run.config.align.probe_prompts, [])
        sampling = Sampling(
            temperature=elicit.temperature, top_p=elicit.top_p, max_tokens=elicit.question_tokens, seed=-1
        )
        with doing("check for collapse"):
            answers = engine.complete(requests, sampling)
    finally:
        engine.close()
    drafts = [draft for i, a in enumerate(answers) for draft in source.parse(i, a.text, a.finish)]
    valid = [d for d in drafts if not isinstance(d, str) and canonical(d[1], run.task.answer) is not None]
    tokens = [answer.completion_tokens for answer in answers]
    return ProbeResult(len(valid) / max(len(drafts), 1), sum(tokens) / len(tokens))


def _open_with(run: RunContext, adapter_dir: Path, gguf: Path) -> Engine:
    model = run.local(run.config.teacher)
    return open_local(
        model,
        kind=run.config.teacher.engine,
        parallel=run.config.align.probe_prompts,
        adapter=_converted(model.gguf, adapter_dir, gguf)
        if _on_llamacpp(run)
        else (adapter_dir, str(adapter_dir)),
    )


def _on_llamacpp(run: RunContext) -> bool:
    return run.local(run.config.teacher).gguf is not None and run.config.teacher.engine != "transformers"


def _converted(base: Path | None, adapter_dir: Path, out: Path) -> Adapter:
    from arte_edge.gguf.from_base import adapter_to_gguf

    assert base is not None  # `_on_llamacpp` checked
    adapter_to_gguf(adapter_dir, base, out)
    return out, sha256_file(out)


def _adapter_path(run: RunContext, folder: Path) -> Path:
    return folder / "adapter.gguf" if _on_llamacpp(run) else folder / "adapter"


def _converted_adapter(run: RunContext, folder: Path) -> Adapter:
    """Return the adapter in the form that the teacher's engine loads, with its sha256."""
    path = folder / "adapter"
    if _on_llamacpp(run):
        return _converted(run.local(run.config.teacher).gguf, path, folder / "adapter.gguf")
    return path, sha256_file(path / "adapter_model.safetensors")


def _last(history: Any, key: str) -> float | None:
    values = [row[key] for row in history if key in row]
    return round(float(values[-1]), 4) if values else None


def _describe(summary: Summary) -> str:
    margin = summary["margin"]
    # DPO's model of preference (Bradley-Terry): P(chosen over rejected) is the logistic function of the margin.
    learned = (
        ""
        if margin is None
        else f", prefers the chosen text with {0.5 + 0.5 * math.tanh(margin / 2):.1%} (untrained: 50 %)"
    )
    return (
        f"{summary['pairs']} pairs ({summary['question_pairs']} of questions, {summary['ties_dropped']} ties dropped), "
        f"{summary['steps']} steps{learned}"
    )
