"""Does the artifact still do the task? Both answer the same examples, and the answers are compared in pairs.

Each side is asked as the tuned student is in use: its own chat template, the reasoning
started for it, greedy decoding, the answer read out of its tags. Validation examples
unless this is the final evaluation: a gate that looked at the test split would spend it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from arte_edge.distill.prompts import ANSWER_STOPS, STEP_BY_STEP, student_messages
from arte_edge.errors import InputError
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.runtimes.protocol import Runtime
from arte_edge.tasks.answers import extract, matches
from arte_edge.tasks.task import Example, Task
from arte_edge.verify.check import Check
from arte_edge.verify.logits import Progress
from arte_edge.verify.prompts import plain_text

__all__ = ["ANSWER_TOKENS", "Answered", "answers", "check_accuracy", "measure_accuracy"]

ANSWER_TOKENS = 96  # what the evaluation of a run allows by default
_BATCH = 32  # examples between two reports of progress


@dataclass(frozen=True)
class Answered:
    """What a model wrote for one example, and what was read out of it."""

    example: Example
    prompt: str
    text: str
    answer: str | None  # None: no answer was found in the text
    right: bool
    seconds: float | None  # from the prompt to the last token, where it was timed


def measure_accuracy(
    reference: Runtime,
    artifact: Runtime,
    task: Task,
    limit: int = 0,
    *,
    final: bool = False,
    plain: bool = False,
    progress: Progress | None = None,
) -> PairedAccuracy:
    """Let both answer `limit` examples (0: all) of the validation split, of the test split if `final`.

    With `plain` the chat templates are left aside, as a run with ``template = "none"`` does.

    Raises:
        InputError: the split is empty.
    """
    split = "test" if final else "validation"
    examples = task.load_test() if final else task.validation
    examples = examples[:limit] if limit else examples
    if not examples:
        raise InputError(f"Task '{task.name}' has no {split} examples", f"Label some in {split}.jsonl.")
    before = _right(reference, task, examples, plain, progress)
    after = _right(artifact, task, examples, plain, progress)
    accuracy = PairedAccuracy.of(task.name, split, sum(after), len(after))
    return accuracy.paired_with(reference.name, before, after)


def _right(
    model: Runtime, task: Task, examples: Sequence[Example], plain: bool, progress: Progress | None
) -> list[bool]:
    return [one.right for one in answers(model, task, examples, plain, progress=progress)]


def answers(
    model: Runtime,
    task: Task,
    examples: Sequence[Example],
    plain: bool = False,
    *,
    max_tokens: int = ANSWER_TOKENS,
    timed: bool = False,
    progress: Progress | None = None,
) -> list[Answered]:
    """Let `model` answer `examples` greedily, in their order; with `plain` without its chat template.

    With `timed` they are asked one at a time, as a user asks, and each is timed.
    """
    found: list[Answered] = []
    asked: set[str] = set()
    size = 1 if timed else _BATCH
    for start in range(0, len(examples), size):
        if progress is not None:
            progress(f"answers of {model.name}", start, len(examples))
        part = examples[start : start + size]
        prompts = [_prompt(model, task, example, plain) for example in part]
        begin = time.perf_counter()
        texts = model.generate(prompts, max_tokens, ANSWER_STOPS)
        # What was asked before is remembered, not written again: that is no time of the model's.
        seconds = time.perf_counter() - begin if timed and prompts[0] not in asked else None
        asked.update(prompts)
        for example, prompt, text in zip(part, prompts, texts, strict=True):
            answer = extract(text, task.answer)
            right = matches(answer, example.target, task.answer)
            found.append(Answered(example, prompt, text, answer, right, seconds))
    return found


def _prompt(model: Runtime, task: Task, example: Example, plain: bool) -> str:
    messages = student_messages(task, example.input)
    text = None if plain else model.render(messages)
    return (plain_text(messages) if text is None else text) + STEP_BY_STEP


def check_accuracy(accuracy: PairedAccuracy, allowed: float | None) -> Check:
    """Fail if the drop exceeds `allowed` and is significant (exact McNemar test, p < 0.05).

    On a hundred examples chance alone moves accuracy by several points, so a drop that
    the paired test cannot tell from chance does not reject a file.
    """
    before, difference = accuracy.reference_alone, accuracy.difference
    assert before is not None and difference is not None
    shares = (
        f"{before.accuracy:.1%} -> {accuracy.accuracy:.1%} [{accuracy.low:.1%}, {accuracy.high:.1%}] on "
        f"{accuracy.n} {accuracy.split} examples of {accuracy.task}; difference {difference:+.1%} "
        f"[{accuracy.difference_low:+.1%}, {accuracy.difference_high:+.1%}], p = {accuracy.p_value:.2g}"
    )
    lost = allowed is not None and -difference > allowed and accuracy.significant
    note = f"The artifact lost answers that the reference gets right: {shares}." if lost else shares
    return Check("accuracy drop", -difference, allowed, not lost, note)
