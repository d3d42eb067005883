"""What an alignment did to the teacher: the drafts of both teachers for the same new prompts.

They are written as tailor writes them, inputs and questions sampled with the same random numbers, rationales greedily:
a teacher that did not change repeats itself. (Greedily a small teacher lists its examples, and few drafts are left.)

A reward margin says what was learned about the pairs, and a KL divergence how far the teacher moved, but not where to.
So both teachers answer prompts that no stage trains on: how many answers differ, how many drafts are still valid, how
much longer they are, and whether the student scores those of the aligned teacher higher. That is the one number that
says whether the student likes the new teacher better; the interval is paired, over prompts.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np

from arte_edge.asking.form import tagged
from arte_edge.distill.generation.questions import DraftSource, QuestionPlan, draft_sampling, valid_drafts
from arte_edge.distill.generation.rationales import rationale_prompt, rationale_sampling, short_shots
from arte_edge.distill.prompts import Shot
from arte_edge.distill.run_context import RunContext, Summary
from arte_edge.distill.stages.elicit import draft_plan, draft_source, first_focus
from arte_edge.distill.stages.prefer import scored_rows
from arte_edge.runtimes.completion import Completion, Engine, Request
from arte_edge.stats import t_quantile
from arte_edge.tasks.answers import extract
from arte_edge.tasks.task import Example, content_key

_NO_LIMIT = 10**6  # drafts, of which no answer has enough
SCORED = 4  # drafts of a prompt that are scored, at most
_FEWEST = 3  # prompts with a draft of both teachers, below which no interval is stated


@dataclass(frozen=True)
class Fresh:
    """One teacher's answers: texts and tokens of each, all and valid drafts in them, drafts to score by prompt."""

    texts: list[str]
    tokens: list[int]
    n_draft: int
    n_valid: int
    shots: list[list[Shot]]


def held_out_source(run: RunContext, engine: Engine) -> DraftSource:
    """Return the source of question prompts that no stage trains on."""
    return draft_source(run, engine, _new_prompts(run), first_focus(run))


def _new_prompts(run: RunContext) -> QuestionPlan:
    temperature = run.config.tailor.temperature
    return replace(draft_plan(run.config), seed=run.config.seed - 1, needed=_NO_LIMIT, temperature=temperature)


def draft_afresh(run: RunContext, engine: Engine) -> Fresh:
    """Let a teacher answer ``align.fresh_drafts`` new prompts of each kind that it is aligned on."""
    n, elicit = run.config.align.fresh_drafts, run.config.elicit
    answers: list[Completion] = []
    shots: list[list[Shot]] = []
    n_draft = n_valid = 0
    if run.config.n_question_pairs or not run.reasons:
        source = held_out_source(run, engine)
        sampling = draft_sampling(run, _new_prompts(run))
        answers = run.calls.complete(
            engine, source.requests(0, n, {}), sampling, "fresh questions", budget="elicit.question_tokens"
        )
        valid = valid_drafts(run.task, elicit.rouge, answers, source)
        n_valid = sum(map(len, valid))
        n_draft = sum(len(source.parse(i, answer.text, answer.finish)) for i, answer in enumerate(answers))
        if not run.reasons:
            shots = [[Shot(text, tagged(label)) for text, label in drafts] for drafts in valid]
    if run.config.n_rationale_pairs and run.reasons:
        inputs = [example.input for example in _new_inputs(run, n)]
        how = short_shots(run)
        requests = [Request(rationale_prompt(run, engine, text, None, how)) for text in inputs]
        sampling = rationale_sampling(run, engine, elicit.rationale_tokens)
        found = run.calls.complete(engine, requests, sampling, "fresh rationales", budget="elicit.rationale_tokens")
        shots = [
            [Shot(text, answer.text)] if extract(answer.text, run.task.answer) is not None else []
            for text, answer in zip(inputs, found, strict=True)
        ]
        n_draft, n_valid = n_draft + len(found), n_valid + sum(map(len, shots))
        answers = [*answers, *found]
    texts, tokens = [a.text for a in answers], [a.completion_tokens for a in answers]
    return Fresh(texts, tokens, n_draft, n_valid, shots)


def _new_inputs(run: RunContext, n: int) -> list[Example]:
    """Return up to `n` validation examples outside the preference set, of which a score must not see the answers."""
    taken = {content_key(row["input"]) for row in run.read("calibrate", "preference_set.jsonl")}
    free = [example for example in run.task.validation if content_key(example.input) not in taken]
    return random.Random(f"{run.config.seed}/fresh").sample(free, min(n, len(free)))


def versus(run: RunContext, original: Fresh, aligned: Fresh) -> Summary:
    """Return how the aligned teacher's answers differ from the original's, and the student's score of both."""
    before, after = (sum(fresh.tokens) / max(len(fresh.tokens), 1) for fresh in (original, aligned))
    return {
        "prompts": len(original.texts),
        "changed": sum(a != b for a, b in zip(original.texts, aligned.texts, strict=True)),
        "valid_before": round(original.n_valid / max(original.n_draft, 1), 4),
        "valid_after": round(aligned.n_valid / max(aligned.n_draft, 1), 4),
        "tokens_before": round(before, 1),
        "tokens_after": round(after, 1),
        **_scores(run, original, aligned),
    }


def _scores(run: RunContext, original: Fresh, aligned: Fresh) -> Summary:
    """Return the student's mean score of the drafts of both teachers and the paired difference, by prompt.

    The scores are those of `stages.prefer`, all drafts together. Nothing is returned for too few drafts.
    """
    both = [(a[:SCORED], b[:SCORED]) for a, b in zip(original.shots, aligned.shots, strict=True) if a and b]
    if len(both) < _FEWEST:
        return {}
    shots = list(dict.fromkeys(shot for a, b in both for shot in (*a, *b)))  # the same one twice has one score
    drafts = [{"question": str(i), "technique": -1, "tokens": 0, "text": shot.answer} for i, shot in enumerate(shots)]
    questions = {str(i): {"input": shot.question} for i, shot in enumerate(shots)}
    rows, _ = scored_rows(run, drafts, questions, may_adapt=False)
    score = {shot: row["score"] for shot, row in zip(shots, rows, strict=True)}
    means = np.array([[np.mean([score[shot] for shot in side]) for side in pair] for pair in both])
    gains = means[:, 1] - means[:, 0]  # [n_prompt]
    half = t_quantile(0.975, len(gains) - 1) * float(gains.std(ddof=1)) / math.sqrt(len(gains))
    gain = float(gains.mean())
    values = [*means.mean(axis=0), gain, gain - half, gain + half]
    names = ("score_before", "score_after", "gain", "gain_low", "gain_high")
    return {"scored": len(both), **{name: round(float(v), 4) for name, v in zip(names, values, strict=True)}}
