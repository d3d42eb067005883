"""Step 4, align: DPO moves the teacher to what the student learns from (paper, section 3.4).

Pairs of questions answer the question-generation prompt, pairs of rationales the
naive step-by-step prompt. The result is a LoRA adapter; for a teacher that runs on
llama.cpp it is also written in GGUF form, so that the aligned teacher decodes as fast
as the original one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arte_edge.cache import sha256_file
from arte_edge.distill.config import RunConfig
from arte_edge.distill.pairs import draw_question_pairs, draw_rationale_pairs, length_report
from arte_edge.distill.prompts import question_messages, question_prefill, rationale_messages, teacher_shots
from arte_edge.distill.questions import parse_questions
from arte_edge.distill.run import Run, Summary
from arte_edge.distill.train.collapse import ProbeResult
from arte_edge.distill.train.dpo import train_dpo
from arte_edge.distill.train.settings import DpoSettings, Lora
from arte_edge.errors import InputError, StoppedEarly
from arte_edge.runtimes.completion import Engine, Request, Sampling
from arte_edge.runtimes.loader import is_server, open_local
from arte_edge.runtimes.prompt_render import Message
from arte_edge.store import Stage
from arte_edge.tasks.answers import canonical

__all__ = ["align", "refuse_server"]

Row = dict[str, Any]
Adapter = tuple[Path, str]


def refuse_server(config: RunConfig) -> None:
    """Raise if the run wants to align a teacher whose weights are on somebody's server.

    Raises:
        InputError: with what can be done instead.
    """
    if config.aligned and is_server(config.teacher.model):
        raise InputError(
            f"teacher.model: {config.teacher.model} is a server, and alignment needs the teacher's weights",
            'Take data = "original-teacher" (the teacher writes the data as it is), or a local teacher.',
        )


def align(run: Run) -> tuple[Summary, Adapter]:
    """Write pairs.jsonl and the adapter; return the summary and the adapter as the teacher's engine takes it.

    Raises:
        StoppedEarly: no pair is left once ties are dropped.
    """
    config = run.config.align
    model = run.local(run.config.teacher)

    def body(stage: Stage) -> Summary:
        pairs, ties = _pairs(run)
        if not pairs:
            raise StoppedEarly(
                f"align: every pair is a tie at align.min_gap = {config.min_gap}: the scores do not tell drafts apart",
                "Elicit more questions, lower align.min_gap, or compare with data = 'original-teacher'.",
            )
        stage.write("pairs.jsonl", pairs)
        run.release()  # the trainer needs the memory that engines hold
        with run.reporter.percent("DPO") as progress:
            result = train_dpo(
                model.checkpoint(),
                [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs],
                stage.folder / "adapter",
                _settings(run),
                probe=_probe(run),
                progress=progress,
            )
        if result.collapse:
            run.reporter.warn(f"alignment stopped early: {result.collapse}; step {result.kept_step} is kept")
        adapter = _deployed(run, stage.folder)
        return {
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

    inputs = {
        "align": config.model_dump(mode="json"),
        "data": run.config.data,
        "teacher": run.identity(run.config.teacher),
        "scores": run.outputs("prefer"),
        "asked": [run.config.elicit.shown, run.config.elicit.asked],
    }
    summary = run.stage("align", inputs, body, _say)
    return summary, (_adapter_path(run, run.folder / "align"), summary["adapter_sha256"])


def _pairs(run: Run) -> tuple[list[Row], int]:
    """Return DPO pairs with their rendered prompts, and how many were dropped as ties."""
    config, elicit, seed = run.config.align, run.config.elicit, run.config.seed
    questions = run.read("prefer", "questions.jsonl")
    rationales = run.read("prefer", "scores.jsonl")
    min_gap = config.min_gap
    if run.config.data == "random":
        # The control: as many pairs, but the score that orders them is drawn by lot.
        lot = random.Random(f"{seed}/random")
        questions = [{**row, "score": lot.random()} for row in questions]
        rationales = [{**row, "score": lot.random()} for row in rationales]
        min_gap = 0.0
    engine = run.engine(run.config.teacher)
    shown = min(elicit.shown, len(run.task.seed))
    texts = {row["id"]: row["input"] for row in questions}
    asked, asked_ties = draw_question_pairs(
        questions, run.config.wanted_question_pairs, elicit.asked, shown + 1, min_gap, seed
    )
    reasoned, reasoned_ties = draw_rationale_pairs(
        rationales, run.config.wanted_rationale_pairs, min_gap, seed
    )
    for i, pair in enumerate(asked):
        seeds = random.Random(f"{seed}/align/{i}").sample(list(run.task.seed), shown)
        messages = question_messages(run.task, seeds, elicit.asked)
        pair["prompt"] = _rendered(run, engine, messages, question_prefill(shown))
    for pair in reasoned:
        shots = teacher_shots(run.task, config.shots)
        messages = rationale_messages(run.task, texts[pair["question"]], None, shots)
        pair["prompt"] = _rendered(run, engine, messages)
    mixed = asked + reasoned
    random.Random(f"{seed}/mix").shuffle(mixed)
    return mixed, asked_ties + reasoned_ties


def _rendered(run: Run, engine: Engine, messages: list[Message], prefill: str = "") -> str:
    return run.render(engine, messages, prefill, run.config.teacher)


def _settings(run: Run) -> DpoSettings:
    config = run.config.align
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
        seed=run.config.seed,
    )


def _probe(run: Run) -> Callable[[Path], ProbeResult]:
    """Return the look for a collapse: let the teacher with the adapter so far write a few held-out drafts."""
    config, elicit = run.config.align, run.config.elicit
    shown = min(elicit.shown, len(run.task.seed))

    def look(adapter_dir: Path) -> ProbeResult:
        engine = _open_with(run, adapter_dir, adapter_dir.parent / f"{adapter_dir.name}.gguf")
        try:
            requests = []
            for i in range(config.probe_prompts):
                seeds = random.Random(f"{run.config.seed}/probe/{i}").sample(
                    list(run.task.seed), elicit.shown
                )
                messages = question_messages(run.task, seeds, elicit.asked)
                requests.append(Request(_rendered(run, engine, messages, question_prefill(shown)), i))
            sampling = Sampling(
                temperature=elicit.temperature, top_p=elicit.top_p, max_tokens=elicit.question_tokens, seed=-1
            )
            answers = engine.complete(requests, sampling)
        finally:
            engine.close()
        drafts = [
            draft for answer in answers for draft in parse_questions(question_prefill(shown) + answer.text)
        ]
        valid = [d for d in drafts if not isinstance(d, str) and canonical(d[1], run.task.answer) is not None]
        tokens = [answer.completion_tokens for answer in answers]
        return ProbeResult(len(valid) / len(drafts), sum(tokens) / len(tokens))

    return look


def _open_with(run: Run, adapter_dir: Path, gguf: Path) -> Engine:
    model = run.local(run.config.teacher)
    return open_local(
        model,
        kind=run.config.teacher.engine,
        parallel=run.config.align.probe_prompts,
        adapter=_converted(model.gguf, adapter_dir, gguf)
        if _on_llama(run)
        else (adapter_dir, str(adapter_dir)),
    )


def _on_llama(run: Run) -> bool:
    return run.local(run.config.teacher).gguf is not None and run.config.teacher.engine != "transformers"


def _converted(base: Path | None, adapter_dir: Path, out: Path) -> Adapter:
    from arte_edge.gguf.lora import adapter_to_gguf

    assert base is not None  # `_on_llama` looked
    adapter_to_gguf(adapter_dir, base, out)
    return out, sha256_file(out)


def _adapter_path(run: Run, folder: Path) -> Path:
    return folder / "adapter.gguf" if _on_llama(run) else folder / "adapter"


def _deployed(run: Run, folder: Path) -> Adapter:
    """Return the adapter in the form that the teacher's engine loads, with its sha256."""
    path = folder / "adapter"
    if _on_llama(run):
        return _converted(run.local(run.config.teacher).gguf, path, folder / "adapter.gguf")
    return path, sha256_file(path / "adapter_model.safetensors")


def _last(history: Any, key: str) -> float | None:
    values = [row[key] for row in history if key in row]
    return round(float(values[-1]), 4) if values else None


def _say(summary: Summary) -> str:
    margin = "" if summary["margin"] is None else f", reward margin {summary['margin']:+.3f}"
    return (
        f"{summary['pairs']} pairs ({summary['question_pairs']} of questions, {summary['ties_dropped']} ties dropped), "
        f"{summary['steps']} steps{margin}"
    )
