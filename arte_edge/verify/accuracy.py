"""Paired accuracy: reference and artifact answer the same task examples.

Both are prompted as a run's student in use: with their own chat template and a prefilled start of the
reasoning, decoded greedily, the answer extracted from its tags. Validation examples unless this is the final
evaluation: verification must not use up the test split.
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

__all__ = ["ANSWER_TOKENS", "ExampleAnswer", "answer_examples", "check_accuracy", "measure_accuracy"]

ANSWER_TOKENS = 96  # default limit in the evaluation of a run
_BATCH = 32  # examples per progress report


@dataclass(frozen=True)
class ExampleAnswer:
    """A model's output for one example, and the answer in it."""

    example: Example
    prompt: str
    text: str
    answer: str | None  # None: the text has no answer in the task's form
    right: bool
    seconds: float | None  # from prompt to last token, if timed


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
    """Let both models answer `limit` examples (0: all) of the validation split, or of the test split if `final`.

    With `plain` they are prompted without chat template, as in a run with ``template = "none"``.

    Raises InputError: the split is empty.
    """
    split = "test" if final else "validation"
    examples = task.load_test() if final else task.validation
    examples = examples[:limit] if limit else examples
    if not examples:
        raise InputError(f"Task '{task.name}' has no {split} examples", f"Label some in {split}.jsonl.")
    before, after = (
        [answer.right for answer in answer_examples(model, task, examples, plain, progress=progress)]
        for model in (reference, artifact)
    )
    accuracy = PairedAccuracy.of(task.name, split, sum(after), len(after))
    return accuracy.paired_with(reference.name, before, after)


def answer_examples(
    model: Runtime,
    task: Task,
    examples: Sequence[Example],
    plain: bool = False,
    *,
    max_tokens: int = ANSWER_TOKENS,
    timed: bool = False,
    progress: Progress | None = None,
) -> list[ExampleAnswer]:
    """Let `model` answer `examples` greedily, in order; with `plain` without its chat template.

    With `timed` they are sent one at a time, as by a user, and each is timed.
    """
    found: list[ExampleAnswer] = []
    sent: set[str] = set()
    size = 1 if timed else _BATCH
    for start in range(0, len(examples), size):
        if progress is not None:
            progress(f"answers of {model.name}", start, len(examples))
        part = examples[start : start + size]
        prompts = [_prompt(model, task, example, plain) for example in part]
        begin = time.perf_counter()
        texts = model.generate(prompts, max_tokens, ANSWER_STOPS)
        # The answer to a repeated prompt comes from the runtime's cache, so its time means nothing.
        seconds = time.perf_counter() - begin if timed and prompts[0] not in sent else None
        sent.update(prompts)
        for example, prompt, text in zip(part, prompts, texts, strict=True):
            answer = extract(text, task.answer)
            right = matches(answer, example.target, task.answer)
            found.append(ExampleAnswer(example, prompt, text, answer, right, seconds))
    return found


def _prompt(model: Runtime, task: Task, example: Example, plain: bool) -> str:
    messages = student_messages(task, example.input)
    text = None if plain else model.render(messages)
    return (plain_text(messages) if text is None else text) + STEP_BY_STEP


def check_accuracy(accuracy: PairedAccuracy, allowed: float | None) -> Check:
    """Fail if the drop exceeds `allowed` and is significant (exact McNemar test, p < 0.05).

    On a hundred examples chance alone changes accuracy by several points.
    """
    before, difference = accuracy.reference_alone, accuracy.difference
    assert before is not None and difference is not None
    shares = (
        f"{before.accuracy:.1%} -> {accuracy.accuracy:.1%} [{accuracy.low:.1%}, {accuracy.high:.1%}] on "
        f"{accuracy.n} {accuracy.split} examples of {accuracy.task}; difference {difference:+.1%} "
        f"[{accuracy.difference_low:+.1%}, {accuracy.difference_high:+.1%}], p = {accuracy.p_value:.2g}"
    )
    failed = allowed is not None and -difference > allowed and accuracy.significant
    note = (
        f"The artifact fails on examples that the reference answers correctly: {shares}."
        if failed
        else shares
    )
    return Check("accuracy drop", -difference, allowed, not failed, note)
