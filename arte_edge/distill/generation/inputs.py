"""Inputs for given answers: the teacher is told a label and writes inputs for it, so data are balanced by construction.

A small teacher that labels badly still writes well: told that the answer is "play music", it writes sentences that ask
for music. Inputs differ by conditions that take turns (length, style, difficulty), some of them near misses to an
answer that the student confuses with the given one. Where the student errs more, more is written (`focus_of`): the
counts of errors on validation examples steer it, the examples themselves are never shown.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from arte_edge.distill.generation.questions import Parsed, QuestionPlan
from arte_edge.distill.prompts import input_messages, input_prefill
from arte_edge.distill.run_context import RunContext
from arte_edge.runtimes.completion import Engine, Request
from arte_edge.tasks.task import Example

_CONDITIONS = (
    "Vary the wording.",
    "Make them short, a few words each.",
    "Make them long, with details that do not matter.",
    "Write them casually, as people speak.",
    "Make them specific, with names, numbers or places.",
    "Make them polite and indirect.",
    "Use other words than the examples do.",
    "Make them unusual, but with only one right answer.",
)
_NEAR_MISS = "Make them easy to mistake for {other}, but the right answer must be {label}."
_NEAR_MISSES = 0.25  # share of the prompts of an answer that the student confuses with another
_SHOWN = 5  # examples of an answer in a prompt, at most
_OTHERS = 3  # other answers whose lists are earlier turns: without them a small teacher leaves the form
_FLOOR = 0.5  # weight of an answer without errors, against 1 for the mean number of errors
_LINE = re.compile(r"\s*\d+[.)]\s*(.+)")
_BEGUN = re.compile(r"\s*\d+[.)]\s")  # "12.5 of 30" is an input
_LONGEST = 1500  # characters of an input, as in `generation.questions`


@dataclass(frozen=True)
class Focus:
    """Which answers need more inputs, relative to each other, and which answers they are mistaken for."""

    weight: dict[str, float] = field(default_factory=dict)  # empty: all alike; a missing one has `_FLOOR`
    confused: dict[str, tuple[str, ...]] = field(default_factory=dict)


def focus_of(pairs: Iterable[tuple[str, str | None]], *, weighted: bool) -> Focus:
    """Return the focus of a student's errors: `pairs` of right and given answers.

    Not `weighted`, every answer gets as many inputs, and the errors choose near misses alone.
    """
    wrong = [(target, given) for target, given in pairs if given != target]
    confused: dict[str, Counter[str]] = defaultdict(Counter)
    for target, given in wrong:
        if given is not None:
            confused[target][given] += 1
    errors = Counter(target for target, _ in wrong)
    mean = sum(errors.values()) / max(len(errors), 1)
    weight = {label: _FLOOR + n / mean for label, n in errors.items()} if weighted else {}
    others = {label: tuple(other for other, _ in found.most_common(3)) for label, found in confused.items()}
    return Focus(weight, others)


class InputSource:
    """Prompts for inputs of given answers, the answer that lacks most first, and the reading of what came back."""

    def __init__(self, run: RunContext, engine: Engine, plan: QuestionPlan, focus: Focus):
        self._run, self._engine, self._plan, self._focus = run, engine, plan, focus
        rest = _FLOOR if focus.weight else 1.0
        self._weight = {label: focus.weight.get(label, rest) for label in run.task.answer.options("")}
        total = sum(self._weight.values())
        self._quota = {label: math.ceil(plan.needed * w / total) for label, w in self._weight.items()}
        self._by_label: dict[str, list[Example]] = {}  # in the order of the seeds
        for seed in run.task.seed:
            self._by_label.setdefault(seed.target, []).append(seed)
        self._order: list[str] = []
        self._turns: Counter[str] = Counter()
        self._asked: dict[int, str] = {}  # prompt number -> answer

    def requests(self, first: int, n: int, have: Mapping[str, int]) -> list[Request]:
        """Return prompts number `first` to ``first + n - 1``.

        The answers take turns by weight, whatever number is needed: asked for more, the first prompts stay cached.
        Where an answer has enough inputs, the one that lacks most has its turn.
        """
        coming = dict.fromkeys(self._quota, 0.0) | dict(have)
        requests = []
        for number in range(first, first + n):
            label = self._turn(number)
            if self.full(label, have):
                label = max(self._quota, key=lambda one: self._quota[one] - coming[one])
                coming[label] += self._plan.elicit.asked / 2
            self._asked[number] = label
            requests.append(Request(self.prompt(label, number)[0], number))
        return requests

    def _turn(self, number: int) -> str:
        while len(self._order) <= number:
            label = min(self._weight, key=lambda one: (self._turns[one] + 1) / self._weight[one])
            self._turns[label] += 1
            self._order.append(label)
        return self._order[number]

    def parse(self, number: int, text: str, finish: str) -> list[Parsed]:
        """Return the inputs of a numbered list, each with the answer that it was written for."""
        # A server that does not go on after the prefill may begin with a number of its own.
        begun = _BEGUN.match(text)
        lines = [line for line in (text if begun else f"0.{text}").split("\n") if line.strip()]
        if not begun and len(lines) > 1 and lines[0].rstrip().endswith(":"):
            lines.pop(0)  # "Here are five inputs:", of a server
        cut = [lines.pop()] if finish == "length" and lines else []
        found: list[Parsed] = ["cut off"] * len(cut)
        for line in lines:
            match = _LINE.fullmatch(line)
            written = match[1].strip().strip('"“”').strip() if match else ""
            if match and written and len(written) <= _LONGEST:
                found.append((written, self._asked[number]))
            elif match:
                found.append("empty or too long")
        return found or ["no input at all"]

    def full(self, label: str, have: Mapping[str, int]) -> bool:
        """Return whether there are enough inputs for an answer."""
        return have.get(label, 0) >= self._quota.get(label, 0)

    def prompt(self, label: str, number: int) -> tuple[str, int]:
        """Return prompt number `number`, for inputs of `label`, and the number at which its list goes on.

        Lists of other answers are earlier turns, the same for most prompts, so that they share a beginning.
        """
        rng = random.Random(f"{self._plan.seed}/{number}/{label}")
        seeds = self._by_label.get(label, [])
        shown = rng.sample(seeds, min(_SHOWN, len(seeds)))
        condition = rng.choice(_CONDITIONS)
        others = [other for other in self._by_label if other != label][:_OTHERS]
        if (confused := self._focus.confused.get(label)) and rng.random() < _NEAR_MISSES:
            near = rng.choice(confused)
            condition = _NEAR_MISS.format(other=near, label=label)
            others = [*[other for other in others if other != near][: _OTHERS - 1], near]
        lists = [(other, self._by_label[other][:_SHOWN]) for other in others if other in self._by_label]
        n_input = len(shown) + self._plan.elicit.asked
        messages = input_messages(self._run.task, label, n_input, condition, lists)
        return self._run.render(self._engine, messages, input_prefill(shown), self._run.config.teacher), len(shown) + 1
