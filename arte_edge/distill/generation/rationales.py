"""Rationales: how the teacher reasons about a question, labelled and checked.

Prompts are a technique's or the naive one. Where the engine supports a grammar, the reasoning stays
free and only its end is constrained to an answer of the task in its tags: small teachers invent labels
("heater") and forget tags.

A teacher gives an answer when it generates the question (its *target*) and again at the end of every rationale. Small
teachers often disagree with themselves; the label policy decides, and the stage counts what it changed.

A student generates answers as long as those that it was trained on, so under a latency budget
(`arte_edge.distill.latency`) its training data must fit. Truncating breaks the format, and dropping loses most
of the questions, so the teacher is brought to write briefly:

* `short_shots`: its few-shot examples start at a later clause where they are too long: "It is cold, so more heating is
  wanted. <ans>warmer</ans>" becomes "So more heating is wanted. <ans>warmer</ans>".
* `resample`: a question without a rationale that agrees with its label and is short enough gets more
  samples; the first that fits is taken. So the data is the teacher's own, conditional on fitting.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

from arte_edge.asking.form import ANSWER_CLOSE, ANSWER_OPEN, tagged
from arte_edge.asking.grammar import gbnf
from arte_edge.distill.config import LabelPolicy, RunConfig
from arte_edge.distill.prompts import (
    ANSWER_STOPS,
    Shot,
    answer_shots,
    direct_messages,
    rationale_messages,
    teacher_shots,
)
from arte_edge.distill.run_context import Row, RunContext
from arte_edge.runtimes.completion import Completion, Engine, Request, Sampling
from arte_edge.runtimes.loader import is_server
from arte_edge.tasks.answers import comparable, extract
from arte_edge.tasks.task import Answer, content_key

_Policy = LabelPolicy | Literal["told", "direct"]
_BUDGET = "elicit.rationale_tokens"
# A token of English text is about four characters; three leave room for the tags and a longer answer.
_CHARS_PER_TOKEN = 3
_MAX_CHARS = 1500  # llama.cpp rejects grammars with more than 2000 repetitions
# A text counts as repeated if it appears under more questions than this, and than this share of all.
_REPEATED_QUESTIONS, _REPEATED_SHARE = 2, 0.05
_SAMPLES_PER_ROUND = 4  # samples of each question before checking which questions still lack one
_SLACK = 1.5  # tokens of the teacher, whose tokenizer differs, per token of the student
_CLAUSE = re.compile(r"[,;:.!?]\s+|[，；：。！？、]\s*|\n+")


def rationale_prompt(
    run: RunContext,
    engine: Engine,
    question: str,
    technique: str | None,
    shots: Sequence[Shot] | None = None,
) -> str:
    """Return the rendered prompt; `technique` None is the naive step-by-step prompt, `shots` None the task's."""
    shots = teacher_shots(run.task, run.config.teacher.shots) if shots is None else shots
    return run.render(engine, rationale_messages(run.task, question, technique, shots), "", run.config.teacher)


def generate_rationales(
    run: RunContext,
    engine: Engine,
    questions: Sequence[Row],
    techniques: Sequence[str | None],
    what: str,
    shots: Sequence[Shot] | None = None,
) -> list[Row]:
    """Generate one rationale for each question and technique, greedily.

    Returns rows of question (id), technique (index, -1 for naive), text, answer (None if there is
    no complete answer tag), finish.
    """
    # One technique after another: prompts of one technique share their prefix.
    work = [(t, technique, row) for t, technique in enumerate(techniques) for row in questions]
    requests = [Request(rationale_prompt(run, engine, row["input"], technique, shots)) for _, technique, row in work]
    sampling = rationale_sampling(run, engine, run.config.elicit.rationale_tokens)
    answers = run.calls.complete(engine, requests, sampling, what, budget=_BUDGET)
    return [
        rationale_row(run, row, t if technique is not None else -1, answer)
        for (t, technique, row), answer in zip(work, answers, strict=True)
    ]


def label_drafts(
    run: RunContext,
    engine: Engine,
    questions: Sequence[Row],
    techniques: Sequence[str | None],
    policy: LabelPolicy,
    what: str,
    shots: Sequence[Shot] | None = None,
) -> tuple[list[Row], Row]:
    """Label `questions` in place; return their rationales as `generate_rationales` does, and what labelling changed.

    Where the student gives the answer alone the teacher need not reason: each labelled question has one rationale,
    which is its answer in tags. With the policy "teacher" nobody votes there, and each input keeps the answer that it
    was written for: one that does not mean it scores low with the student, and an alignment learns from that.
    """
    rationales: list[Row] = []
    if run.reasons:
        rationales = generate_rationales(run, engine, questions, techniques, f"{what} rationales", shots)
    votes: Sequence[str | None] = [None] * len(questions)
    how: _Policy = policy
    if run.reasons or policy != "teacher":
        votes = direct_votes(run, engine, questions, "direct answers")
        if run.by_label and (run.role == "inputs" or policy != "teacher"):
            how = "told" if run.role == "inputs" else "direct"
    labels = label_rows(run, questions, rationales, votes, how)
    if not run.reasons:
        rationales = [_bare(question) for question in questions if question["label"] is not None]
    return rationales, labels


def _bare(question: Row) -> Row:
    row = {"question": question["id"], "technique": -1, "text": tagged(question["label"])}
    return row | {"answer": question["label"], "finish": "stop", "tokens": 0, "usable": True}


def rationale_sampling(run: RunContext, engine: Engine, tokens: int) -> Sampling:
    """Return how rationales are decoded: greedily, the end constrained to the format if the engine can.

    JSON is longer than a label, and useless cut off: the longest known answer has room besides the reasoning.
    """
    constrained = run.config.elicit.grammar and engine.supports_grammar
    grammar = rationale_grammar(run.task.answer, tokens) if constrained else None
    known = (*run.task.seed, *run.task.validation) if run.task.answer.kind == "json" else ()
    room = max((engine.count_tokens(example.target) for example in known), default=0)
    return Sampling(max_tokens=tokens + room, stop=ANSWER_STOPS, grammar=grammar)


def votes_directly(config: RunConfig, answer: Answer) -> bool:
    """Return whether the teacher gives a direct answer to each question; a server may return no log-probabilities."""
    return answer.closed and config.elicit.opinion_shots > 0 and not is_server(config.teacher.model)


def direct_votes(run: RunContext, engine: Engine, questions: Sequence[Row], what: str) -> list[str | None]:
    """Return the teacher's direct few-shot answer to each question, None where the answer set is open."""
    return [max(own, key=own.__getitem__) if own else None for own in direct_choices(run, engine, questions, what)]


def direct_choices(run: RunContext, engine: Engine, questions: Sequence[Row], what: str) -> list[dict[str, float]]:
    """Return the log-probability of each answer to each question, without reasoning; none where the set is open.

    With many examples and no reasoning a small teacher is often more accurate than with reasoning.
    """
    options = [run.task.answer.options(row["input"]) for row in questions]
    if not questions or not votes_directly(run.config, run.task.answer):
        return [{} for _ in questions]
    shots = answer_shots(run.task.seed, run.config.elicit.opinion_shots)
    prompts = [
        run.render(engine, direct_messages(run.task, row["input"], shots), ANSWER_OPEN, run.config.teacher)
        for row in questions
    ]
    choices = [[option + ANSWER_CLOSE for option in row] for row in options]
    # One request a question: when more are drafted later, those before them stay cached.
    each = [([prompt], [own]) for prompt, own in zip(prompts, choices, strict=True)]
    scores = run.calls.choose_each(engine, each, what)
    return [dict(zip(row, found[0], strict=True)) for row, found in zip(options, scores, strict=True)]


def rationale_row(run: RunContext, question: Row, technique: int, completion: Completion) -> Row:
    """Return the stored row of a rationale: see `generate_rationales`."""
    return {
        "question": question["id"],
        "technique": technique,
        "text": completion.text.strip(),
        "answer": extract(completion.text, run.task.answer),
        "finish": completion.finish,
        "tokens": completion.completion_tokens,
        **({"error": completion.error} if completion.error else {}),
    }


def _drop_outside(kind: Answer, question: Row, rationale: Row) -> None:
    """Take back, in place, an answer that the question does not offer: (F) where there are A to D. It has no vote."""
    answer = rationale["answer"]
    if kind.closed and answer is not None and answer not in kind.options(question["input"]):
        rationale |= {"answer": None, "outside": answer}


def label_rows(
    run: RunContext, questions: Sequence[Row], rationales: Sequence[Row], votes: Sequence[str | None], policy: _Policy
) -> Row:
    """Set ``label`` on each question and ``usable`` on each rationale, in place; return what that changed.

    `votes` are the teacher's direct answers (`direct_votes`); each counts like a rationale's answer.

    The counts are rates in [0, 1]: readable rationales, rationales that agree with the drafted
    target, direct answers that do, questions whose label differs from it, questions dropped; and, as a number, the
    answers outside a question's options.
    """
    kind = run.task.answer
    by_question: dict[str, list[Row]] = defaultdict(list)
    for rationale in rationales:
        by_question[rationale["question"]].append(rationale)
    changed = dropped = agreeing = readable = 0
    for question, vote in zip(questions, votes, strict=True):
        mine = by_question[question["id"]]
        for rationale in mine:
            _drop_outside(kind, question, rationale)
        target = comparable(question["target"], kind) or ""
        answers = [comparable(r["answer"], kind) if r["answer"] is not None else None for r in mine]
        label = decide_label(policy, target, [*answers, vote])
        # The label keeps the spelling of its source, not the normalized form of the comparison.
        written = {target: question["target"], **{a: r["answer"] for a, r in zip(answers, mine, strict=True) if a}}
        question["label"] = None if label is None else written.get(label, label)  # a vote is one of the task's answers
        changed += label is not None and label != target
        dropped += label is None
        for rationale, answer in zip(mine, answers, strict=True):
            rationale["usable"] = agrees(policy, label, answer)
            readable += answer is not None
            agreeing += answer == target
    n, m = max(len(questions), 1), max(len(rationales), 1)
    outside = sum("outside" in row for row in rationales)
    given = [vote == question["target"] for question, vote in zip(questions, votes, strict=True) if vote]
    return {
        "policy": policy,
        "readable": round(readable / m, 4),
        "agree_with_target": round(agreeing / m, 4),
        "label_changed": round(changed / n, 4),
        "questions_dropped": round(dropped / n, 4),
        **({"votes_agree": round(sum(given) / len(given), 4)} if given else {}),
        **({"outside_options": outside} if outside else {}),
    }


def decide_label(policy: _Policy, target: str, answers: Sequence[str | None]) -> str | None:
    """Return the label of a question, or None if it is dropped.

    Args:
        policy: ``teacher`` takes the drafted target; ``vote`` the majority of target and rationales, the
            target breaking a tie that it is part of; ``drop-disagreement`` keeps a question only if
            target and every readable rationale agree. For inputs that were written for the target the last
            answer, the direct one, decides: ``direct`` takes it, ``told`` drops the question if it is another.
        target: the answer drafted with the question, normalized.
        answers: the rationales' answers, normalized; None for an unreadable one.
    """
    given = [answer for answer in answers if answer is not None]
    if policy == "teacher":
        return target
    if policy in ("told", "direct"):
        direct = answers[-1] or target
        return direct if policy == "direct" or direct == target else None
    if not given:
        return None
    if policy == "drop-disagreement":
        return target if set(given) == {target} else None
    votes = Counter([target, *given])
    top = max(votes.values())
    winners = [answer for answer, n in votes.items() if n == top]
    if len(winners) == 1:
        return winners[0]
    return target if target in winners else None


def agrees(policy: _Policy, label: str | None, answer: str | None) -> bool:
    """Return whether a rationale with this answer is usable; with the `teacher` policy every readable one is."""
    return answer is not None and label is not None and (policy == "teacher" or answer == label)


def reject_repeated(rationales: Sequence[Row]) -> int:
    """Set ``usable`` to False, in place, on each usable rationale that is repeated; return how many were.

    A small teacher copies from its instructions: told to restate a request "as a plain order", it answers
    every question with the example in that instruction. Such a text says nothing about its question, its
    answer is right by chance, and a student that is trained on it learns one answer (benchmarks/studies).
    Short reasoning may well fit two questions, so a text counts as repeated from the third on, or from a
    twentieth of all.
    """
    under: dict[str, set[str]] = defaultdict(set)
    for row in rationales:
        under[content_key(row["text"])].add(row["question"])
    n_question = len({row["question"] for row in rationales})
    most = max(_REPEATED_QUESTIONS, math.floor(_REPEATED_SHARE * n_question))
    rejected = 0
    for row in rationales:
        if row["usable"] and len(under[content_key(row["text"])]) > most:
            row["usable"] = False
            rejected += 1
    return rejected


def rationale_grammar(answer: Answer, tokens: int) -> str:
    """Return the GBNF grammar of a rationale that gives one answer of the task within about `tokens` tokens."""
    most = max(_CHARS_PER_TOKEN * (tokens - 12), 16)
    return gbnf(answer, "reasoning-first", min(most, _MAX_CHARS)) or ""


def student_text(run: RunContext, rationale: str) -> str:
    """Return what the student writes of a teacher's rationale: in the form ``answer`` the answer in it alone."""
    return extract(rationale, run.task.answer) or "" if run.form == "answer" else rationale.strip()


def over_budget(run: RunContext, rationales: Iterable[Row]) -> list[Row]:
    """Return the rationales that the student could not generate in time, counted in its own tokens.

    None where there is no reasoning: a label is as long as the task has it.
    """
    if run.budget is None or not run.reasons:
        return []
    fits = _fits(run)
    return [row for row in rationales if not fits(row["text"])]


def short_shots(run: RunContext) -> list[Shot] | None:
    """Return the teacher's few-shot examples shortened to the budget; None without one: the task's own.

    One that no shortening makes fit is left out.
    """
    if run.budget is None:
        return None
    fits = _fits(run)
    short = [
        (shot.question, shortened(shot.answer, fits)) for shot in teacher_shots(run.task, run.config.teacher.shots)
    ]
    return [Shot(question, answer) for question, answer in short if answer is not None]


def shortened(text: str, fits: Callable[[str], bool]) -> str | None:
    """Return a rationale from the first clause on from which it `fits`, its answer tag whole; None if none does."""
    if fits(text):
        return text
    reasoning, tag, answer = text.rpartition(ANSWER_OPEN)
    for clause in _CLAUSE.finditer(reasoning.rstrip()):
        rest = reasoning[clause.end() :]
        short = rest[:1].upper() + rest[1:] + tag + answer
        if fits(short):
            return short
    return None


def resample(
    run: RunContext,
    engine: Engine,
    questions: Sequence[Row],
    rationales: Sequence[Row],
    policy: LabelPolicy,
) -> list[Row]:
    """Sample rationales for the labelled questions that have none which agrees and is short enough.

    At most ``deploy.draws`` for each question. Labels stay as they were decided: a sample does not vote.
    Returns the usable samples, as `generate_rationales` does; none without a budget.
    """
    if run.budget is None:
        return []
    start = run.config.best_of if run.config.best_of > 1 else 0  # the samples before are among `rationales`
    draws = start + run.config.deploy.draws
    found: list[Row] = []
    for first in range(start, draws, _SAMPLES_PER_ROUND):
        have = _short_enough(run, [*rationales, *found])
        lacking = [row for row in questions if row["id"] not in have]
        samples = range(first, min(first + _SAMPLES_PER_ROUND, draws))
        found += sampled(run, engine, lacking, samples, policy, "shorter rationales")
    return found


def sampled(
    run: RunContext,
    engine: Engine,
    questions: Sequence[Row],
    samples: Sequence[int],
    policy: LabelPolicy,
    what: str,
) -> list[Row]:
    """Sample rationales, one for each of `samples`, of the labelled questions; return the usable ones as `resample`."""
    kind, shots = run.task.answer, short_shots(run)
    greedy = rationale_sampling(run, engine, run.config.elicit.rationale_tokens)
    most = greedy.max_tokens
    if run.budget is not None and run.form != "answer":
        most = round(run.budget.answer_tokens * _SLACK)
    sampling = replace(
        greedy,
        temperature=run.config.tailor.temperature,
        top_p=run.config.elicit.top_p,
        max_tokens=min(greedy.max_tokens, most),
        seed=run.config.seed + 1,  # as the tailored questions
    )
    work = [(row, sample) for row in questions if row["label"] is not None for sample in samples]
    requests = [Request(rationale_prompt(run, engine, row["input"], None, shots), sample) for row, sample in work]
    answers = run.calls.complete(engine, requests, sampling, what, budget=_BUDGET)
    found: list[Row] = []
    for (question, _), completion in zip(work, answers, strict=True):
        row = rationale_row(run, question, -1, completion)
        _drop_outside(kind, question, row)
        answer = None if row["answer"] is None else comparable(row["answer"], kind)
        row["usable"] = agrees(policy, comparable(question["label"], kind), answer)
        if row["usable"]:
            found.append({**row, "drawn": True})
    return found


def _fits(run: RunContext) -> Callable[[str], bool]:
    """Return a test whether the student could generate a text in time, counted in its own tokens."""
    assert run.budget is not None
    count, most = run.engine(run.config.student).count_tokens, run.budget.answer_tokens
    return lambda text: count(f" {student_text(run, text)}") <= most


def _short_enough(run: RunContext, rationales: Sequence[Row]) -> set[str]:
    """Return the questions that have a usable rationale which is short enough."""
    usable = [row for row in rationales if row["usable"]]
    long = {id(row) for row in over_budget(run, usable)}
    return {row["question"] for row in usable if id(row) not in long}
