"""Paired accuracy: reference and artifact answer the same task examples.

Both are asked as their users ask them: a bare user message through the runtime's own chat function, greedily, the
answer read from the text. What a student answers behind a prompt that its files do not hold is of no use to anybody.
Validation examples unless this is the final evaluation: verification must not use up the test split.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from arte_edge.asking.form import Asking, asking_of, held_form
from arte_edge.asking.grammar import grammar_of
from arte_edge.errors import InputError
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.student_json import read_student
from arte_edge.runtimes.prompt_render import Message
from arte_edge.runtimes.protocol import Runtime, Served
from arte_edge.tasks.answers import leaf_f1, matches
from arte_edge.tasks.task import Example, Task
from arte_edge.verify.check import Check
from arte_edge.verify.logits import Progress, rendered
from arte_edge.verify.tokenizer import excerpt, first_difference

_BATCH = 32  # examples per progress report


@dataclass(frozen=True)
class Questions:
    """How models are asked about a task: the messages in front of a question, and how an answer is read."""

    asking: Asking
    front: tuple[Message, ...] = ()

    def conversation(self, example: Example) -> list[Message]:
        return [*self.front, *self.asking.messages(example.input)]

    def answers(self, model: Runtime, examples: Sequence[Example]) -> list[str]:
        """Return what `model` writes; one without a chat template continues plain text."""
        asked, how = [self.conversation(example) for example in examples], self.asking
        if model.chat_template is None:
            prompts = [rendered(model, messages) for messages in asked]
            return model.generate(prompts, how.answer_tokens, how.answer_stops)
        return model.chat(asked, how.answer_tokens, how.answer_stops)

    def constrained(self, model: Runtime, example: Example) -> str | None:
        """Return what `model` writes if it may write answers in the task's form alone.

        None: the answers are neither a closed set nor JSON, or the runtime follows no grammar.
        """
        how = self.asking
        grammar = grammar_of(how, example.input) if how.answer.closed or how.answer.kind == "json" else None
        if grammar is None:
            return None
        return model.constrained(self.conversation(example), grammar, how.answer_tokens, how.answer_stops)

    def unstopped(self, text: str) -> str:
        """Return `text` without the stop text at its end."""
        stops = self.asking.answer_stops
        return next((text.removesuffix(stop) for stop in stops if text.endswith(stop)), text)


def questions_for(model: Runtime, task: Task, answer_tokens: int = 0) -> Questions:
    """Return how `model` is asked about `task`; `answer_tokens`: the budget of an answer, 0: from its form."""
    asking, front = asking_of(model, task)
    return Questions(replace(asking, answer_tokens=answer_tokens or asking.answer_tokens), tuple(front))


def noted_tokens(path: Path) -> int:
    """Return the budget of an answer that the ``student.json`` beside a file names, 0 without one."""
    try:
        student = read_student(path.resolve().parent)
    except InputError:  # damaged: exporting and benchmarks say so where they need it
        return 0
    return student.asking.answer_tokens if student is not None and student.asking is not None else 0


@dataclass(frozen=True)
class ExampleAnswer:
    """A model's output for one example, and the answer in it."""

    example: Example
    prompt: str
    text: str
    answer: str | None  # None: the text has no answer in the task's form
    right: bool
    seconds: float | None  # from message to last token, if timed
    with_grammar: ExampleAnswer | None = None  # the same constrained to a grammar, if it was and could be


def examples_of(task: Task, limit: int = 0, *, final: bool = False) -> Sequence[Example]:
    """Return up to `limit` validation examples, 0: all; of the test split if `final`.

    Raises InputError: the split is empty.
    """
    split = "test" if final else "validation"
    examples = task.load_test() if final else task.validation
    if not examples:
        raise InputError(f"Task '{task.name}' has no {split} examples", f"Label some in {split}.jsonl.")
    return examples[:limit] if limit else examples


def measure_accuracy(
    reference: Runtime,
    artifact: Runtime,
    task: Task,
    limit: int = 0,
    *,
    final: bool = False,
    questions: Questions | None = None,
    progress: Progress | None = None,
) -> PairedAccuracy:
    """Let both models answer `limit` examples (0: all) of the validation split, or of the test split if `final`.

    Both are asked alike: by default as the reference is asked. Raises InputError: the split is empty.
    """
    examples = examples_of(task, limit, final=final)
    asked = questions or questions_for(reference, task)
    before, after = (answer_examples(model, examples, asked, progress=progress) for model in (reference, artifact))
    accuracy = accuracy_of(task, "test" if final else "validation", after)
    return accuracy.paired_with(reference.name, *([one.right for one in found] for found in (before, after)))


def accuracy_of(task: Task, split: str, found: Sequence[ExampleAnswer]) -> PairedAccuracy:
    """Return the accuracy of a model's answers, of JSON answers with their slot F1."""
    f1 = leaf_f1(((one.answer, one.example.target) for one in found), task.answer)
    return PairedAccuracy.of(task.name, split, sum(one.right for one in found), len(found), f1)


def answer_examples(
    model: Runtime,
    examples: Sequence[Example],
    questions: Questions,
    *,
    timed: bool = False,
    grammar: bool = False,
    progress: Progress | None = None,
) -> list[ExampleAnswer]:
    """Let `model` answer `examples` greedily, in order.

    With `timed` they are sent one at a time, as by a user, and each is timed. With `grammar` each is answered again,
    constrained, where the runtime can: at once, while the prompt is in its cache.
    """
    found: list[ExampleAnswer] = []
    sent: set[str] = set()
    size, how = 1 if timed else _BATCH, questions.asking
    for start in range(0, len(examples), size):
        if progress is not None:
            progress(f"answers of {model.name}", start, len(examples))
        part = examples[start : start + size]
        begin = time.perf_counter()
        texts = questions.answers(model, part)
        # The answer to a repeated question comes from the runtime's cache, so its time means nothing.
        seconds = time.perf_counter() - begin if timed and part[0].input not in sent else None
        sent.update(example.input for example in part)
        for example, text in zip(part, texts, strict=True):
            prompt = rendered(model, questions.conversation(example))
            one = _read(how, ExampleAnswer(example, prompt, text, None, False, seconds))
            if grammar and (bound := questions.constrained(model, example)) is not None:
                one = replace(one, with_grammar=_read(how, replace(one, text=bound, seconds=None)))
            found.append(one)
    return found


def _read(how: Asking, one: ExampleAnswer) -> ExampleAnswer:
    """Return `one` with the answer in its text, and whether it is right."""
    answer = how.read(one.text)
    return replace(one, answer=answer, right=matches(answer, one.example.target, how.answer))


def accuracy_with_grammar(task: Task, split: str, found: Sequence[ExampleAnswer]) -> PairedAccuracy | None:
    """Return the accuracy of constrained answers, paired with the free ones of the same examples; None without any.

    An example that no grammar fits, such as one without options, counts as it was answered.
    """
    if not any(one.with_grammar for one in found):
        return None
    bound = [one.with_grammar or one for one in found]
    pairs = ([one.right for one in each] for each in (found, bound))
    return accuracy_of(task, split, bound).paired_with("without grammar", *pairs)


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
    if accuracy.slot_f1 is not None:
        shares += f", slot F1 {accuracy.slot_f1:.1%}"
    failed = allowed is not None and -difference > allowed and accuracy.significant
    note = f"The artifact fails on examples that the reference answers correctly: {shares}." if failed else shares
    return Check("accuracy drop", -difference, allowed, not failed, note)


_QUESTIONS = 5
_NEAR_TIES = 1  # answers of another build of llama.cpp that may differ: its sums are rounded in another order


def check_as_asked(
    reference: Runtime,
    artifact: Runtime,
    task: Task,
    questions: Questions,
    examples: Sequence[Example],
    allowed: int | None,
    progress: Progress | None = None,
) -> Check:
    """Fail if the artifact's template lacks the instruction, or a server answers otherwise than its chat function.

    Is a file's answer the one that its users get, without anything that only arte-edge knows, from every server? A
    student that answers well behind a prompt of ours alone answers nobody else.

    `allowed` is how many answers may differ, None: any.
    """
    form, theirs = held_form(reference, task), held_form(artifact, task)
    if form and theirs != form:
        what = f"instruction of the form {form}" + (f", but that of {theirs}" if theirs else "")
        note = (
            f"The file's own chat template does not hold the task's {what}: it answers as measured only behind a "
            "prompt that its users do not know. Put the reference's template into the file."
        )
        return Check("as asked", len(examples), allowed, allowed is None, note)
    if progress is not None:
        progress("asking servers", 0, 1)
    asked, differ = examples[:_QUESTIONS], 0
    faults, remarks = [], []
    for server in _servers(artifact, questions, asked):
        if server.unable:
            remarks.append(f"{server.program} gives no answer: {server.unable}")
            continue
        if server.remark:
            remarks.append(f"{server.program} {server.remark}")
        texts = [questions.unstopped(text) for text in questions.answers(artifact, asked)]  # as servers do
        pairs = [(_whole(ours), _whole(theirs)) for ours, theirs in zip(texts, server.texts, strict=True)]
        wrong = [pair for pair in pairs if not _same(*pair, questions, exactly=server.own)]
        if len(wrong) > (0 if server.own else _NEAR_TIES):
            differ = max(differ, len(wrong))
            faults.append(_difference(server, *wrong[0], len(wrong), len(pairs)))
        else:
            remarks.append(f"{server.program} gives the same {len(pairs)} answers")
    how = "a bare question" if form else "a question after the instruction as system text"
    note = "; ".join(faults or [f"{len(asked)} times {how}", *remarks])
    return Check("as asked", differ, allowed, allowed is None or differ <= allowed, f"{note}.")


def _servers(model: Runtime, questions: Questions, examples: Sequence[Example]) -> list[Served]:
    if model.chat_template is None:
        return []
    conversations, how = [questions.conversation(example) for example in examples], questions.asking
    return model.served(conversations, how.answer_tokens, how.answer_stops)


def _whole(text: str) -> str:
    """Return `text` without halves of characters, which programs show or drop as they like."""
    return text.replace("\ufffd", "")


def _same(ours: str, theirs: str, questions: Questions, *, exactly: bool) -> bool:
    if exactly or ours == theirs:
        return ours == theirs
    how = questions.asking
    end = (*how.answer_stops, "")[0]  # left out of both, and an answer in tags is read up to it
    first, other = how.read(ours + end), how.read(theirs + end)
    return first is not None and first == other


def _difference(server: Served, ours: str, theirs: str, n: int, of: int) -> str:
    at = first_difference(ours, theirs)
    return (
        f"{server.program} answers {n} of {of} questions differently from the runtime's own chat function, first "
        f"at character {at}: {excerpt(theirs, at)} for {excerpt(ours, at)}"
    )
