"""Draft questions: prompt the teacher until enough valid ones exist (paper, step 1).

A draft is valid if its tags close, its target is an answer of the task's kind, it is no near-duplicate
of a seed or an earlier draft, and it is in neither validation nor test. Of the test split only hashes
are known here. Rejected drafts are stored with the reason.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any, Protocol

from arte_edge.distill.cached_calls import advice
from arte_edge.distill.config import Elicit
from arte_edge.distill.prompts import question_messages, question_prefill
from arte_edge.distill.run_context import RunContext
from arte_edge.errors import EngineError, StoppedEarly
from arte_edge.runtimes.completion import Completion, Engine, Request, Sampling
from arte_edge.tasks.answers import canonical
from arte_edge.tasks.task import Example, Task, content_key

# An opening tag of the next question ends the last one too: small teachers forget to close it.
_QUESTION = re.compile(
    r"<input>(?P<input>.*?)</input>\s*<target>(?P<target>.*?)</target>\s*(?P<close></Question_\d+>)?", re.DOTALL
)
_BLOCK = re.compile(r"<Question_\d+>(.*?)(?=<Question_\d+>|\Z)", re.DOTALL)
_TAG = re.compile(r"</?(input|target|ans|Question_\d+)>")  # "<=50K" is an answer
_LONGEST = 1500  # characters of one question; longer ones are rambling
_ALIKE = 0.25  # share of near-duplicates among the seeds from which they are typical of the task
_BUDGET = "elicit.question_tokens"
_MARGIN = 1.2
_EMPTY_ROUNDS = 3  # rounds without a valid draft before giving up


Parsed = tuple[str, str] | str  # an input with its answer, or why there is none


@dataclass(frozen=True)
class QuestionPlan:
    """How many drafts are needed, and how they are sampled; the prompts are those of `elicit`."""

    elicit: Elicit
    needed: int
    temperature: float
    max_prompts: int
    seed: int

    @property
    def budget(self) -> int:
        """Prompts after which drafting gives up."""
        return self.max_prompts or 10 * -(-self.needed // self.elicit.asked)

    def next_prompts(self, n_valid: int, n_sent: int, group: int) -> int:
        """Return how many prompts follow the first `n_sent`, which gave `n_valid` drafts; 0: the budget is spent."""
        rate = max(n_valid / (n_sent * self.elicit.asked), 0.1) if n_sent else 0.5
        # A few more than needed: another round with four prompts takes as long as one with twelve.
        wanted = math.ceil(_MARGIN * (self.needed - n_valid) / (self.elicit.asked * rate))
        # One full batch at most: a second one with few prompts would take as long as a full one.
        return min(max(4, wanted), group, self.budget - n_sent)


@dataclass
class Drafts:
    """The result of drafting. Rows of `valid`: id, input, target, prompt; of `rejected`: reason, text, prompt."""

    valid: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)  # of `valid`
    prompts: int = 0

    def reasons(self) -> dict[str, int]:
        return dict(Counter(row["reason"] for row in self.rejected).most_common())


class NearDuplicates:
    """Finds texts whose ROUGE-L F1 with a known text reaches a threshold (Self-Instruct's filter at 0.7).

    A text is compared only with those that have some of its rarest words: with all, n texts take n² comparisons.
    """

    def __init__(self, threshold: float, known: Iterable[str]) -> None:
        from rouge_score import rouge_scorer

        self._threshold = threshold
        self._scorer = rouge_scorer.RougeScorer(["rougeL"])
        self._known: list[str] = []
        self._n_word: list[int] = []  # of each known text
        self._same: dict[str, int] = {}  # content key -> place of the first known text that has it
        self._places: dict[str, list[int]] = {}  # word -> places of the known texts that have it
        self.compared = 0  # known texts of which common words were counted
        for text in known:
            self.add(text)

    def add(self, text: str) -> None:
        words, place = _words(text), len(self._known)
        self._known.append(text)
        self._n_word.append(len(words))
        self._same.setdefault(content_key(text), place)
        for word in words:
            self._places.setdefault(word, []).append(place)

    def find(self, text: str) -> str | None:
        """Return the first known text of which `text` is a near-duplicate."""
        # ROUGE only sees Latin letters and digits: without them it never finds a duplicate.
        same = self._same.get(content_key(text), len(self._known))
        words = set(found := _words(text))
        for place in self._candidates(found):
            if place >= same:
                break
            known = self._known[place]
            # The longest common subsequence is at most the words in common: most candidates end here.
            least = self._threshold * (len(words) + self._n_word[place]) - 1e-9
            if 2 * len(words.intersection(_words(known))) < least:
                continue
            if self._scorer.score(known, text)["rougeL"].fmeasure >= self._threshold:
                return known
        return self._known[same] if same < len(self._known) else None

    def _candidates(self, words: Sequence[str]) -> list[int]:
        """Return in order the places of all known texts that may have enough of `words`.

        A near-duplicate of n words has at least c of them, c = r (n + c) / 2 at a threshold r, so it has one of any
        n - c + 1: the rarest are looked up (the prefix filter of Chaudhuri et al. 2006).
        """
        n, r, n_word = len(words), self._threshold, self._n_word
        if r > 1:
            return []
        by_word = sorted((self._places.get(word, []) for word in words), key=len)
        rarest = by_word[: n - math.ceil(r * n / (2 - r) - 1e-9) + 1]
        common = Counter(chain.from_iterable(rarest))
        self.compared += len(common)
        others, least = n - len(rarest), r * n - 2e-9
        return sorted(
            place
            for place, count in common.items()
            if 2 * min(count + others, n_word[place]) >= least + r * n_word[place]
        )


def _words(text: str) -> list[str]:
    """Return the words that ROUGE sees, repeated ones numbered: what two texts have in common is a set."""
    words: Counter[str] = Counter()
    found = []
    for word in re.findall(r"[a-z0-9]+", text.lower()):
        words[word] += 1
        found.append(word if words[word] == 1 else f"{word} {words[word]}")
    return found


def parse_questions(text: str) -> list[Parsed]:
    """Split a teacher's answer into (input, target) pairs; a malformed block gives the reason instead."""
    found: list[Parsed] = []
    blocks = _BLOCK.findall(text)
    for i, block in enumerate(blocks):
        match = _QUESTION.search(block)
        if match is None:
            # The last block is usually truncated by max_tokens.
            found.append("cut off" if i == len(blocks) - 1 else "tags do not close")
            continue
        question, target = match["input"].strip(), match["target"].strip()
        if not question or not target:
            found.append("empty input or target")
        elif len(question) > _LONGEST or _TAG.search(target) or "<input>" in question:
            found.append("tags do not close")
        else:
            found.append((question, target))
    return found or ["no question at all"]


class DraftSource(Protocol):
    """Where drafts come from: prompts, and the reading of what a teacher makes of them."""

    def requests(self, first: int, n: int, have: Mapping[str, int]) -> list[Request]:
        """Return prompts number `first` to ``first + n - 1``; `have` are the valid drafts so far, by answer."""

    def parse(self, number: int, text: str, finish: str) -> list[Parsed]:
        """Return the drafts in the completion of a prompt."""

    def full(self, label: str, have: Mapping[str, int]) -> bool:
        """Return whether no more drafts with this answer are needed."""


@dataclass(frozen=True)
class QuestionSource:
    """The paper's prompts: seeds in tags, and new questions with their answers in the same tags."""

    run: RunContext
    engine: Engine
    plan: QuestionPlan

    def requests(self, first: int, n: int, have: Mapping[str, int]) -> list[Request]:
        """See `DraftSource`; each prompt has its own sample of seeds, or all have one."""
        run, elicit, requests = self.run, self.plan.elicit, []
        for i in range(first, first + n):
            rng = random.Random(f"{self.plan.seed}/{first if elicit.one_draw else i}")
            seeds = rng.sample(list(run.task.seed), min(elicit.shown, len(run.task.seed)))
            messages = question_messages(run.task, seeds, elicit.asked)
            prompt = run.render(self.engine, messages, question_prefill(len(seeds)), run.config.teacher)
            requests.append(Request(prompt, i))
        return requests

    def parse(self, number: int, text: str, finish: str) -> list[Parsed]:
        # A server that does not go on after the prefill may begin with a tag of its own.
        begun = text.lstrip().startswith("<Question_")
        return parse_questions(text if begun else question_prefill(0) + text)

    def full(self, label: str, have: Mapping[str, int]) -> bool:
        return False


def repeat_penalty(run: RunContext) -> float:
    """Return `Sampling.repeat_penalty` of a run's drafts.

    It is for inputs for given answers alone: texts in tags repeat the tags, a server samples without it, and in some
    tasks the seeds themselves repeat each other's phrases.
    """
    elicit, teacher = run.config.elicit, run.config.teacher
    if not run.by_label or teacher.on_server or teacher.starts_vllm:
        return 0.0
    alike = _share_alike(tuple(seed.input for seed in run.task.seed), elicit.rouge) > _ALIKE
    return 0.0 if alike else elicit.repeat_penalty


def elicit_inputs(run: RunContext) -> dict[str, Any]:
    """Return the settings of drafting; without the penalty where there is none: earlier runs did not know it."""
    return run.config.elicit.model_dump(mode="json", exclude=None if repeat_penalty(run) else {"repeat_penalty"})


def draft_sampling(run: RunContext, plan: QuestionPlan) -> Sampling:
    """Return how drafts are sampled."""
    return Sampling(
        temperature=plan.temperature,
        top_p=plan.elicit.top_p,
        max_tokens=plan.elicit.question_tokens,
        seed=plan.seed,
        repeat_penalty=repeat_penalty(run),
    )


def draft_questions(
    run: RunContext, engine: Engine, plan: QuestionPlan, what: str, source: DraftSource, known: Sequence[str] = ()
) -> Drafts:
    """Draft until `plan.needed` valid questions exist, none of them a near-duplicate of the `known` ones.

    Raises:
        StoppedEarly: the budget of prompts is spent, or several rounds in a row have no valid draft.
        EngineError: every call of a round failed.
    """
    drafts = Drafts()
    filters = _Filter(run.task, plan.elicit.rouge, known)
    if filters.alike > _ALIKE:
        run.reporter.warn(
            f"{what}: {filters.alike:.0%} of this task's own seeds are near-duplicates of another "
            f"(ROUGE-L {plan.elicit.rouge:g}), so only exact repeats are rejected"
        )
    empty_rounds = 0
    sampling = draft_sampling(run, plan)
    while len(drafts.valid) < plan.needed:
        n = plan.next_prompts(len(drafts.valid), drafts.prompts, run.calls.group)
        if n <= 0 or empty_rounds >= _EMPTY_ROUNDS:
            raise StoppedEarly(
                f"{what}: only {len(drafts.valid)} of {plan.needed} valid questions after {drafts.prompts} "
                f"prompts ({_list(drafts.reasons())})",
                "Use a stronger teacher, or raise elicit.max_prompts or tailor.max_prompts. Finished calls are cached: "
                "re-run the same command to resume.",
            )
        requests = source.requests(drafts.prompts, n, drafts.answers)
        found = f" ({len(drafts.valid)} of {plan.needed} valid so far)"
        answers = run.calls.complete(engine, requests, sampling, what, so_far=found, budget=_BUDGET, spare=True)
        before = len(drafts.valid)
        _collect(drafts, answers, drafts.prompts, plan.needed, filters, source)
        if all(answer.error for answer in answers):
            raise EngineError(
                f"{what}: every call failed: {answers[0].error}", advice(answers, _BUDGET, plan.elicit.question_tokens)
            )
        drafts.prompts += n
        empty_rounds = empty_rounds + 1 if len(drafts.valid) == before else 0
    return drafts


def _collect(
    drafts: Drafts, answers: Sequence[Completion], first: int, needed: int, filters: _Filter, source: DraftSource
) -> None:
    for i, answer in enumerate(answers, first):
        if answer.error:
            reason = f"call failed: {answer.error.splitlines()[0][:80]}"
            drafts.rejected.append({"reason": reason, "text": answer.error, "prompt": i})
            continue
        for draft in source.parse(i, answer.text, answer.finish):
            if isinstance(draft, str):
                drafts.rejected.append({"reason": draft, "text": answer.text[:400], "prompt": i})
                continue
            question, target = draft
            if source.full(target, drafts.answers):
                continue
            reason, target = filters.check(question, target)
            if reason:
                drafts.rejected.append({"reason": reason, "text": f"{question} => {target}", "prompt": i})
            elif len(drafts.valid) < needed:
                key = Example(question, target).key
                drafts.valid.append({"id": key[:16], "input": question, "target": target, "prompt": i})
                drafts.answers[target] += 1


class _Filter:
    """Gives the reason to reject a draft, and remembers the accepted ones."""

    def __init__(self, task: Task, rouge: float, known: Sequence[str] = ()) -> None:
        self._task = task
        self._test = task.test_keys()
        self.alike = _share_alike(tuple(seed.input for seed in task.seed), rouge)
        # ROUGE only compares words: expressions that differ in brackets are equal to it.
        self._near = NearDuplicates(rouge if self.alike <= _ALIKE else math.inf, [])
        self._labels = {
            **{seed.input: "repeats a seed" for seed in task.seed},
            **{item.input: "overlaps validation" for item in task.validation},
        }
        for text in (*self._labels, *known):
            self._near.add(text)

    def check(self, question: str, target: str) -> tuple[str, str]:
        """Return (reason, target in canonical form); no reason means valid."""
        answer = canonical(target, self._task.answer)
        if answer is None:
            return "target is no answer of this task", target
        options = self._task.answer.options(question)
        if self._task.answer.closed and answer not in options:
            return "target is not among the options", target
        if Example(question, answer).key in self._test:
            return "overlaps test", target
        if (known := self._near.find(question)) is not None:
            return self._labels.get(known, "repeats a draft"), target
        self._near.add(question)
        return "", answer


def valid_drafts(
    task: Task, rouge: float, answers: Sequence[Completion], source: DraftSource
) -> list[list[tuple[str, str]]]:
    """Return the drafts in each of a teacher's `answers` to the first prompts of `source` that a stage would take."""
    drafts = Drafts()
    _collect(drafts, answers, 0, _LONGEST * len(answers), _Filter(task, rouge), source)
    found: list[list[tuple[str, str]]] = [[] for _ in answers]
    for row in drafts.valid:
        found[row["prompt"]].append((row["input"], row["target"]))
    return found


@lru_cache(maxsize=8)  # the filter of every stage compares a task's seeds
def _share_alike(texts: tuple[str, ...], rouge: float) -> float:
    """Return the share of `texts` that are near-duplicates of an earlier one."""
    near = NearDuplicates(rouge, [])
    n = 0
    for text in texts:
        n += near.find(text) is not None
        near.add(text)
    return n / max(len(texts), 1)


def _list(reasons: dict[str, int]) -> str:
    return ", ".join(f"{n} × {reason}" for reason, n in reasons.items()) or "none was generated"
