"""Step 4, align: DPO aligns the teacher with the student's preferences (paper, section 3.4).

Pairs of questions answer the question-generation prompt, pairs of rationales the naive step-by-step
prompt, the very prompts of tailoring. With `align.also` the pairs of other tasks' runs are trained on as well, as the
paper aligns one teacher over 23 tasks. The step is sized by what it does (`train.kl_target`). The result is
a LoRA adapter; for a teacher that came as GGUF it is also written as GGUF, so that llama.cpp can run the
aligned teacher, here or elsewhere. Both teachers then answer new prompts (`fresh_drafts`): an alignment that changed
nothing, or that the student does not like better, is a warning in the stage and in the closing text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from arte_edge.cache import sha256_file
from arte_edge.console import doing
from arte_edge.distill.config import RunConfig
from arte_edge.distill.generation.inputs import InputSource
from arte_edge.distill.generation.questions import QuestionPlan, draft_sampling
from arte_edge.distill.generation.rationales import rationale_prompt, short_shots
from arte_edge.distill.gpu_plan import TokenizerOnly
from arte_edge.distill.preference.dpo_pairs import (
    Drawn,
    Ties,
    draw_input_pairs,
    draw_question_pairs,
    draw_rationale_pairs,
    length_report,
    shuffle_sides,
)
from arte_edge.distill.prompts import question_messages, question_prefill, teacher_shots
from arte_edge.distill.run_context import Row, RunContext, Summary
from arte_edge.distill.stages.elicit import draft_plan, first_focus, focus_inputs
from arte_edge.distill.stages.fresh_drafts import Fresh, draft_afresh, held_out_source, versus
from arte_edge.distill.train.collapse import ProbeResult, is_untrained
from arte_edge.distill.train.common import DpoSettings, Lora
from arte_edge.distill.train.dpo import DpoResult, train_dpo
from arte_edge.errors import InputError, StoppedEarly
from arte_edge.runtimes.completion import Engine
from arte_edge.runtimes.loader import open_local
from arte_edge.tasks.answers import canonical

Adapter = tuple[Path, str]
_RSLORA_SCALE = 2 * 8**0.5  # times 1/sqrt(rank): at rank 8 as without rsLoRA
_MOVED = 1e-3  # nats a token, below which an alignment changed nothing
_FEWER_VALID = 0.05  # by which the share of usable drafts may fall


def align(run: RunContext, others: Sequence[RunContext] = ()) -> tuple[Summary, Adapter]:
    """Write pairs.jsonl and the adapter; return the summary and the adapter as the teacher's engine loads it.

    `others` are runs of other tasks that have finished `prefer`.

    Raises StoppedEarly: no pair is left once ties are dropped.
    """
    config = run.config.align
    inputs = _inputs(run)
    if others:  # no key without them: alignments of before they were possible stay
        inputs["others"] = [_inputs(other) | {"seed": other.config.seed} for other in others]
    with run.stage("align", inputs, _describe) as stage:
        if stage.todo:
            also = [_pairs_of_other(other) for other in others]
            drawn = _pairs(run)  # last: its engines stay open
            if others:
                drawn = _mixed([drawn, *also], run.config.seed)
            if not drawn.pairs:
                raise StoppedEarly(
                    f"align: every pair is a tie at align.min_gap = {config.min_gap:g} and align.min_gap_errors = "
                    f"{config.min_gap_errors:g}: the scores do not distinguish drafts",
                    "Elicit more questions, lower align.min_gap, or compare with data = 'original-teacher'.",
                )
            # Now, while the teacher is open: it takes seconds to open again.
            original, start = _original_drafts(run), _probe(run, run.engine(run.config.teacher))

            def probe(adapter_dir: Path) -> ProbeResult:
                return start if is_untrained(adapter_dir) else _probe_with(run, adapter_dir)

            stage.write("pairs.jsonl", drawn.pairs)
            stage.write("held_out.jsonl", drawn.held_out)
            with run.training("DPO, with checks") as progress:
                result = train_dpo(
                    run.checkpoint(run.config.teacher),
                    _texts(drawn.pairs),
                    stage.folder / "adapter",
                    dpo_settings(run.config),
                    held_out=_texts(drawn.held_out),
                    probe=probe,
                    progress=progress,
                    processes=run.config.train.processes,
                    sharded=run.config.train.shard_teacher,
                )
            if result.dropped:
                run.reporter.warn(
                    f"align: {result.dropped} of {len(drawn.pairs)} pairs are longer than the teacher or "
                    "align.max_length allows and were left out"
                )
            if result.collapse:
                run.reporter.warn(
                    f"alignment stopped early: {result.collapse}; the adapter of step {result.kept_step} is used"
                )
            adapter = _converted_adapter(run, stage.folder)
            tasks = {"tasks": 1 + len(others)} if others else {}
            stage.finish(
                tasks | _summary(run, drawn, result) | {"adapter_sha256": adapter[1]} | _fresh(run, adapter, original)
            )
    path = _adapter_path(run, stage.folder)
    if not path.exists():  # made where the teacher ran on another engine
        _converted_adapter(run, stage.folder)
    weights = path if path.suffix else path / "adapter_model.safetensors"
    recorded = stage.files.get(weights.relative_to(stage.folder).as_posix())
    run.caveats = caveats(stage.summary)
    for sentence in run.caveats:
        run.reporter.warn(sentence)
    return stage.summary, (path, recorded or sha256_file(weights))


def _inputs(run: RunContext) -> Summary:
    """Return what decides the pairs of a run and how they are trained on; where other runs are does not."""
    config = run.config.align
    # Alignments of before the key was there, all of 16 bits, stay.
    plain = {"weights"} if config.weights == "16-bit" else set()
    return {
        "align": config.model_dump(mode="json", exclude={"also", *plain}),
        "data": run.config.alignment,
        "teacher": run.identity(run.config.teacher),
        "scores": run.outputs("prefer"),
        "asked": [run.config.elicit.shown, run.config.elicit.asked],
        **run.data_inputs(),
        **focus_inputs(run),
    }


def _texts(pairs: list[Row]) -> list[dict[str, str]]:
    return [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs]


def _summary(run: RunContext, drawn: Drawn, result: DpoResult) -> Summary:
    pairs = drawn.pairs
    return {
        "pairs": result.pairs,
        "too_long": result.dropped,
        "question_pairs": sum(pair["level"] == "question" for pair in pairs),
        "ties_dropped": drawn.ties,
        "gap": round(sum(abs(pair["gap"]) for pair in pairs) / len(pairs), 4),
        "lengths": length_report(pairs),
        "steps": result.steps,
        "kept_step": result.kept_step,
        "stopped": result.collapse,
        "margin": _last(result.history, "rewards/margins"),
        "accuracy": _last(result.history, "rewards/accuracies"),
        "kl": result.held_out.kl,
        "target_kl": run.config.align.target_kl,
        "held_out": {**asdict(result.held_out), "margin": round(result.held_out.margin, 4)},
    }


def _original_drafts(run: RunContext) -> Fresh | None:
    """Return the teacher's answers to new prompts before it is aligned, None if that is switched off."""
    if not run.config.align.fresh_drafts:
        return None
    with doing("drafts of the original teacher"):
        return draft_afresh(run, run.engine(run.config.teacher))


def _fresh(run: RunContext, adapter: Adapter, original: Fresh | None) -> Summary:
    """Return what both teachers' answers to new prompts say, nothing without those of the original one."""
    if original is None:
        return {}
    teacher = run.config.teacher
    run.close_engines()  # one copy of the teacher in memory
    with doing("drafts of the aligned teacher"):
        aligned = draft_afresh(run, run.engine_with(run.local(teacher), adapter, teacher))
    return {"fresh": versus(run, original, aligned)}


def caveats(summary: Summary) -> list[str]:
    """Return what a user must know of an alignment before its results; nothing of one that works."""
    found, fresh, kl = [], summary.get("fresh", {}), summary.get("kl")
    same = fresh.get("prompts") and not fresh["changed"]
    if summary.get("stopped"):
        found.append(
            f"the alignment was stopped ({summary['stopped']}) at {0.0 if kl is None else kl:.3f} nats a token"
        )
    elif kl is not None and (kl < _MOVED or same):
        found.append(
            f"the alignment changed nothing: {kl:.1e} nats a token from the original teacher"
            + (f", all {fresh['prompts']} new drafts the same" if same else "")
            + ". No difference between the two teachers can be expected; raise align.target_kl."
        )
    elif kl is not None and kl < summary["target_kl"] / 2:
        found.append(
            f"the alignment ended at {kl:.3f} nats a token, short of align.target_kl = {summary['target_kl']:g}"
        )
    if fresh.get("valid_after", 1) < fresh.get("valid_before", 0) - _FEWER_VALID:
        found.append(
            f"of the aligned teacher's new drafts {fresh['valid_after']:.0%} are usable, of the original's "
            f"{fresh['valid_before']:.0%}: the others repeat the examples or each other, or are malformed"
        )
    if fresh.get("gain", 1) <= 0 and not same:
        found.append(
            f"the student scores the aligned teacher's new drafts no higher ({fresh['gain']:+.3f} on "
            f"{fresh['scored']} prompts, 95 % interval {fresh['gain_low']:+.3f} to {fresh['gain_high']:+.3f}): "
            "the alignment did not reach what it is for"
        )
    return found


def _pairs(run: RunContext) -> Drawn:
    """Return DPO pairs with their rendered prompts, those held out, and how many were dropped as ties."""
    config, elicit, seed = run.config.align, run.config.elicit, run.config.seed
    rationales = run.read("prefer", "scores.jsonl")
    errors: dict[str, list[float]] = {}
    for row in rationales:
        errors.setdefault(row["question"], []).append(row.get("standard_error", 0.0))
    questions = [
        row | {"standard_error": math.hypot(*errors[row["id"]]) / len(errors[row["id"]])}
        for row in run.read("prefer", "questions.jsonl")
    ]
    engine, plan = run.engine(run.config.teacher), draft_plan(run.config)
    texts = {row["id"]: row["input"] for row in questions}
    ties, n_pair = Ties(config.min_gap, config.min_gap_errors), run.config.n_question_pairs
    if run.by_label:
        by_question = draw_input_pairs(questions, n_pair, elicit.asked, ties, seed)
        _prompt_inputs(run, engine, plan, by_question.pairs)
        _prompt_inputs(run, engine, replace(plan, seed=seed - 1), by_question.held_out)
    else:
        shown = min(elicit.shown, len(run.task.seed))
        by_question = draw_question_pairs(questions, n_pair, elicit.asked, shown + 1, ties, seed)
        for i, pair in enumerate([*by_question.pairs, *by_question.held_out]):
            seeds = random.Random(f"{seed}/align/{i}").sample(list(run.task.seed), shown)
            messages = question_messages(run.task, seeds, pair["n"])
            pair["prompt"] = run.render(engine, messages, question_prefill(shown), run.config.teacher)
    n_pair = run.config.n_rationale_pairs
    by_rationale = draw_rationale_pairs(
        rationales if run.reasons else [], n_pair, config.pairs_per_question, ties, seed
    )
    shots = short_shots(run)
    shots = shots if config.shots is None else teacher_shots(run.task, config.shots)
    for pair in (*by_rationale.pairs, *by_rationale.held_out):
        pair["prompt"] = rationale_prompt(run, engine, texts[pair["question"]], None, shots)
    pairs = by_question.pairs + by_rationale.pairs
    random.Random(f"{seed}/mix").shuffle(pairs)
    # Both kinds in turn: the first ones are measured after every step.
    kinds = (by_question.held_out if run.config.n_question_pairs else [], by_rationale.held_out)
    held_out = [pair for turn in zip_longest(*kinds) for pair in turn if pair is not None]
    if run.config.alignment == "random":  # the control: the same pairs, but lots decide which side is chosen
        lots = random.Random(f"{seed}/random")
        pairs, held_out = shuffle_sides(pairs, lots), shuffle_sides(held_out, lots)
    return Drawn(pairs, held_out, by_question.ties + by_rationale.ties)


def _pairs_of_other(run: RunContext) -> Drawn:
    """Return the pairs of another task's run; a vLLM of its own, which would only render prompts, is not started."""
    if (teacher := run.config.teacher).starts_vllm:
        run.lend(teacher, TokenizerOnly(str(run.checkpoint(teacher))))
    drawn = _pairs(run)
    run.close_engines()
    return drawn


def _mixed(drawn: Sequence[Drawn], seed: int) -> Drawn:
    """Return the pairs of several tasks in random order, those held out of each task in turn."""
    pairs = [pair for one in drawn for pair in one.pairs]
    random.Random(f"{seed}/tasks").shuffle(pairs)
    turns = zip_longest(*(one.held_out for one in drawn))
    held_out = [pair for turn in turns for pair in turn if pair is not None]
    return Drawn(pairs, held_out, sum(one.ties for one in drawn))


def _prompt_inputs(run: RunContext, engine: Engine, plan: QuestionPlan, pairs: list[Row]) -> None:
    """Give pairs of inputs their prompt, which asks for as many as a side has, and number the sides from there."""
    focus = first_focus(run)
    for i, pair in enumerate(pairs):
        asked = plan.elicit.model_copy(update={"asked": pair["n"]})
        source = InputSource(run, engine, replace(plan, elicit=asked), focus)
        pair["prompt"], first = source.prompt(pair["label"], i)
        for side in ("chosen", "rejected"):
            lines = "\n".join(f"{number}. {text}" for number, text in enumerate(pair[side], first))
            pair[side] = lines.removeprefix(f"{first}.")  # which the prompt has written already


def dpo_settings(run: RunConfig) -> DpoSettings:
    """Return the settings of the training."""
    config = run.align
    both = config.sft_weight > 0
    alpha = _RSLORA_SCALE * config.lora_rank**0.5 if config.rslora else 2.0 * config.lora_rank
    return DpoSettings(
        learning_rate=config.learning_rate,
        batch_size=1,
        accumulate=config.batch_size,
        epochs=config.epochs,
        beta=config.beta,
        losses=("sigmoid", "sft") if both else ("sigmoid",),
        loss_weights=(1.0, config.sft_weight) if both else (),
        ld_alpha=config.ld_alpha,
        lora=Lora(rank=config.lora_rank, alpha=alpha, targets=config.lora_targets),
        weights=config.weights,
        target_kl=config.target_kl,
        max_length=config.max_length,
        probe_every=config.probe_every,
        seed=run.seed,
    )


def _probe(run: RunContext, engine: Engine) -> ProbeResult:
    """Check for model collapse: a teacher generates a few held-out drafts.

    Repeats of seeds are valid here: of so few drafts their share is a matter of chance.
    """
    source = held_out_source(run, engine)
    requests = source.requests(0, run.config.align.probe_prompts, {})
    with doing("check for collapse"):
        answers = engine.complete(requests, draft_sampling(run, replace(draft_plan(run.config), seed=-1)))
    drafts = [d for i, one in enumerate(answers) for d in source.parse(i, one.text, one.finish)]
    valid = [d for d in drafts if not isinstance(d, str) and canonical(d[1], run.task.answer) is not None]
    tokens = [answer.completion_tokens for answer in answers]
    return ProbeResult(len(valid) / max(len(drafts), 1), sum(tokens) / len(tokens))


def _probe_with(run: RunContext, adapter_dir: Path) -> ProbeResult:
    """Check the teacher with the adapter so far."""
    engine = _open_with(run, adapter_dir, adapter_dir.parent / f"{adapter_dir.name}.gguf")
    try:
        return _probe(run, engine)
    finally:
        engine.close()


def _open_with(run: RunContext, adapter_dir: Path, gguf: Path) -> Engine:
    model = run.local(run.config.teacher)
    if run.config.teacher.addresses:
        return run.open_served(run.config.teacher, adapter_dir)
    return open_local(
        model,
        kind=run.kind(run.config.teacher),
        parallel=run.config.align.probe_prompts,
        adapter=_converted(model.gguf, adapter_dir, gguf)
        if run.on_llamacpp(run.config.teacher)
        else (adapter_dir, str(adapter_dir)),
    )


def _converted(base: Path | None, adapter_dir: Path, out: Path) -> Adapter:
    from arte_edge.gguf.from_base import adapter_to_gguf

    assert base is not None  # `RunContext.on_llamacpp` checked
    adapter_to_gguf(adapter_dir, base, out)
    return out, sha256_file(out)


def _adapter_path(run: RunContext, folder: Path) -> Path:
    return folder / "adapter.gguf" if run.on_llamacpp(run.config.teacher) else folder / "adapter"


def _converted_adapter(run: RunContext, folder: Path) -> Adapter:
    """Return the adapter in the form that the teacher's engine loads, with its sha256.

    For a GGUF teacher the form of llama.cpp is always written: on another machine that may be its engine.
    """
    path, gguf, base = folder / "adapter", folder / "adapter.gguf", run.local(run.config.teacher).gguf
    gguf.unlink(missing_ok=True)  # of an earlier training
    if run.on_llamacpp(run.config.teacher):
        return _converted(base, path, gguf)
    if base is not None:
        with suppress(InputError):  # a layer that llama.cpp has no name for
            _converted(base, path, gguf)
    return path, sha256_file(path / "adapter_model.safetensors")


def _last(history: Any, key: str) -> float | None:
    values = [row[key] for row in history if key in row]
    return round(float(values[-1]), 4) if values else None


def _describe(summary: Summary) -> str:
    margin, parts = summary["margin"], []
    tasks = f" of {n} tasks" if (n := summary.get("tasks")) else ""
    parts.append(
        f"{summary['pairs']} pairs{tasks} "
        f"({summary['question_pairs']} of questions, {summary['ties_dropped']} ties dropped"
        + (f", {summary['too_long']} too long" if summary.get("too_long") else "")
        + f"), {summary['steps']} steps"
    )
    if margin is not None:
        # DPO's model of preference (Bradley-Terry): P(chosen over rejected) is the logistic function of the margin.
        parts.append(f"prefers the chosen text with {0.5 + 0.5 * math.tanh(margin / 2):.1%} (untrained: 50 %)")
    if (kl := summary.get("kl")) is not None:  # older runs measured neither this nor what follows
        parts.append(f"{kl:.2g} nats a token from the original teacher on held-out prompts")
        if n := summary["held_out"]["pairs"]:
            parts.append(f"{summary['held_out']['right']} of {n} held-out pairs right")
    if fresh := summary.get("fresh"):
        longer = fresh["tokens_after"] / max(fresh["tokens_before"], 1) - 1
        parts.append(
            f"{fresh['changed']} of {fresh['prompts']} new drafts changed, {longer:+.0%} tokens, "
            f"{fresh['valid_after']:.0%} usable ({fresh['valid_before']:.0%} before)"
        )
        if "gain" in fresh:
            parts.append(
                f"the student's score of new drafts {fresh['score_before']:.3f} → {fresh['score_after']:.3f} "
                f"({fresh['gain']:+.3f}, 95 % interval {fresh['gain_low']:+.3f} to {fresh['gain_high']:+.3f})"
            )
    return ", ".join(parts)
