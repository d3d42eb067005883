"""Every prompt of the method in one place.

Each function returns chat messages; `arte_edge.runtimes.prompt_render` renders them. Few-shot examples
are turns of the conversation: chat models follow a format far better if they seem to have followed it
before. A prefill starts the model's answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from arte_edge.asking.form import ANSWER_CLOSE, ANSWER_OPEN, tagged
from arte_edge.runtimes.prompt_render import Message
from arte_edge.tasks.task import Example, Task

STEP_BY_STEP = "Let's think step by step."
# Replaces the student's own reasoning in constrained answers.
ANSWER_PREFILL = f"{STEP_BY_STEP} The answer is {ANSWER_OPEN}"
ANSWER_STOPS = (ANSWER_CLOSE, "\nQuestion:", "\n\n\n")

_TAG_RULE = f"End with the final answer between {ANSWER_OPEN} and {ANSWER_CLOSE}."
_BRIEF = "Reason in one to three short sentences."


class Shot(NamedTuple):
    """A few-shot example: a question and its answer with reasoning and tags."""

    question: str
    answer: str


def teacher_shots(task: Task, n: int) -> list[Shot]:
    """Return up to `n` shots for the teacher: the task's worked examples, if it has none, seeds with direct answers.

    Never both: after a direct answer a small teacher gives one too, or no answer at all, instead of its reasons.
    """
    if not task.worked:
        return answer_shots(task.seed, n)
    return [Shot(w.input, f"{w.reasoning.strip()} {tagged(w.target)}") for w in task.worked[:n]]


def answer_shots(seeds: Sequence[Example], n: int) -> list[Shot]:
    """Return `n` of `seeds` with direct answers as shots, balanced over the answers."""
    by_target: dict[str, list[Example]] = {}
    for seed in seeds:
        by_target.setdefault(seed.target, []).append(seed)
    # Round-robin over the answers: eight shots with one label bias a small model to it.
    groups = list(by_target.values())
    turns = sorted((rank, i) for i, group in enumerate(groups) for rank in range(len(group)))
    return [Shot(groups[i][rank].input, tagged(groups[i][rank].target)) for rank, i in turns[: max(n, 0)]]


def _turns(shots: Sequence[Shot], opening: str = "") -> list[Message]:
    return [
        message
        for shot in shots
        for message in (
            {"role": "user", "content": f"Question: {shot.question}"},
            {"role": "assistant", "content": f"{opening} {shot.answer.strip()}".strip()},
        )
    ]


def question_text(number: int, text: str, target: str) -> str:
    """Return one question in the tags of the paper (section 3.1)."""
    return f"<Question_{number}><input>{text}</input><target>{target}</target></Question_{number}>"


def question_messages(task: Task, seeds: Sequence[Example], n_new: int) -> list[Message]:
    """Prompt the teacher for `n_new` more questions like `seeds`, in tags (paper, section 3.1)."""
    shown = "\n".join(question_text(i, seed.input, seed.target) for i, seed in enumerate(seeds, 1))
    first, last = len(seeds) + 1, len(seeds) + n_new
    content = (
        f"Task: {task.description.strip()}\n\n"
        f"Here are {len(seeds)} questions of this task with their right answers:\n{shown}\n\n"
        f"Write {n_new} new questions of the same task, numbered {first} to {last}, in the same tags. "
        "Make them differ from these and from each other, and make sure that each target is right."
    )
    return [{"role": "user", "content": content}]


def input_messages(
    task: Task, label: str, n_input: int, condition: str, others: Sequence[tuple[str, Sequence[Example]]] = ()
) -> list[Message]:
    """Prompt the teacher for `n_input` inputs whose right answer is `label`, one a line.

    `others` are lists of examples for other answers: as earlier turns they show the form, and what `label` is not.
    """

    def order(answer: str, n: int) -> str:
        return f"Write {n} inputs whose right answer is {answer}, numbered, one a line."

    system = f"Task: {task.description.strip()}\nYou write inputs for this task."
    turns = [
        message
        for answer, examples in others
        for message in (
            {"role": "user", "content": order(answer, len(examples))},
            {"role": "assistant", "content": input_list(examples)},
        )
    ]
    last = f"{order(label, n_input)} {condition} Make them differ from each other."
    return [{"role": "system", "content": system}, *turns, {"role": "user", "content": last}]


def input_list(examples: Sequence[Example]) -> str:
    """Return examples as the numbered list that the teacher is to write."""
    return "\n".join(f"{i}. {example.input}" for i, example in enumerate(examples, 1))


def input_prefill(shown: Sequence[Example]) -> str:
    """Return the start of the teacher's answer: known examples of the answer, and the number of the first new one."""
    return f"{input_list(shown)}\n{len(shown) + 1}.".lstrip()


def question_prefill(n_seeds: int) -> str:
    """Return the start of the teacher's answer: the first new question's opening tags."""
    return f"<Question_{n_seeds + 1}><input>"


def rationale_messages(task: Task, question: str, technique: str | None, shots: Sequence[Shot] = ()) -> list[Message]:
    """Prompt the teacher to reason about `question`.

    With `technique` None this is the *naive* prompt of alignment and tailoring: the text of the technique is removed,
    so that the teacher learns by itself when to use it (paper, section 3.4, "prompt erasure").
    """
    how = technique.strip() if technique else STEP_BY_STEP
    system = f"{task.description.strip()}\n{_BRIEF} {_TAG_RULE}"
    question_turn = {"role": "user", "content": f"Question: {question}\n\n{how}"}
    return [{"role": "system", "content": system}, *_turns(shots), question_turn]


def student_messages(task: Task, question: str, shots: Sequence[Shot] = ()) -> list[Message]:
    """Prompt the student, after `shots`; its answer starts with `STEP_BY_STEP` (paper, section 3.3)."""
    system = f"{task.description.strip()}\n{_TAG_RULE}"
    question_turn = {"role": "user", "content": f"Question: {question}"}
    return [{"role": "system", "content": system}, *_turns(shots, STEP_BY_STEP), question_turn]


def direct_messages(task: Task, question: str, shots: Sequence[Shot] = ()) -> list[Message]:
    """Prompt for the answer only, without reasoning; `shots` must do the same."""
    system = f"{task.description.strip()}\nGive the answer alone, between {ANSWER_OPEN} and {ANSWER_CLOSE}."
    question_turn = {"role": "user", "content": f"Question: {question}"}
    return [{"role": "system", "content": system}, *_turns(shots), question_turn]
