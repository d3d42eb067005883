"""Is a file's answer the one that its users get: without anything that only arte-edge knows, from every server?

Two things are checked. The file's own chat template must hold the task's instruction if the reference's does: a
student that answers well behind a prompt of ours alone answers nobody else. And the servers that users start on the
file must answer a few questions as the runtime's chat function does.
"""

from __future__ import annotations

from collections.abc import Sequence

from arte_edge.asking.form import held_form
from arte_edge.runtimes.protocol import Runtime, Served
from arte_edge.tasks.task import Example, Task
from arte_edge.verify.accuracy import Questions
from arte_edge.verify.check import Check
from arte_edge.verify.logits import Progress
from arte_edge.verify.tokenizer import excerpt, first_difference

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
