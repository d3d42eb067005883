"""What teacher and student are asked: the shots, the tags, and the erased technique."""

from dataclasses import replace
from typing import Any

from arte_edge.distill.generation.questions import parse_questions
from arte_edge.distill.prompts import (
    STEP_BY_STEP,
    answer_shots,
    direct_messages,
    question_messages,
    question_prefill,
    rationale_messages,
    student_messages,
    teacher_shots,
)
from arte_edge.tasks.answers import extract
from arte_edge.tasks.task import Example, FewShotExample


def test_bare_shots_are_spread_over_the_answers(house: Any) -> None:
    seeds = [Example(f"a{i}", "yes") for i in range(6)] + [Example("b", "no"), Example("c", "maybe")]
    shots = answer_shots(seeds, 4)
    assert [shot.question for shot in shots] == ["a0", "b", "c", "a1"]
    assert shots[1].answer == "<ans>no</ans>"
    assert answer_shots(seeds, 0) == answer_shots(seeds, -1) == answer_shots([], 4) == []
    assert len(answer_shots(seeds, 99)) == 8


def test_a_teacher_sees_worked_examples_alone_or_direct_answers_alone(house: Any) -> None:
    worked = FewShotExample(input="7?", reasoning=" It ends in 7. ", target="odd")
    task = replace(house.task, worked=(worked, worked.model_copy(update={"input": "9?"})))
    assert [shot.answer for shot in teacher_shots(task, 8)] == ["It ends in 7. <ans>odd</ans>"] * 2
    assert [shot.question for shot in teacher_shots(task, 1)] == ["7?"]
    assert teacher_shots(task, 0) == []
    bare = replace(house.task, worked=())
    assert teacher_shots(bare, 3) == answer_shots(bare.seed, 3) and len(teacher_shots(bare, 3)) == 3


def test_the_naive_prompt_erases_the_technique_and_nothing_else(house: Any) -> None:
    technique = "Halve it."
    with_it = rationale_messages(house.task, "Q?", technique)
    naive = rationale_messages(house.task, "Q?", None)
    assert with_it[-1]["content"] == f"Question: Q?\n\n{technique}"
    assert naive[-1]["content"] == f"Question: Q?\n\n{STEP_BY_STEP}"
    assert with_it[:-1] == naive[:-1]


def test_the_questions_shown_are_in_the_tags_that_are_read_back(house: Any) -> None:
    seeds = house.task.seed[:3]
    (message,) = question_messages(house.task, seeds, 5)
    shown = parse_questions(message["content"].partition("\n\nWrite")[0])
    assert shown == [(seed.input, seed.target) for seed in seeds]
    assert "numbered 4 to 8" in message["content"]
    assert question_prefill(3) == "<Question_4><input>"


def test_a_students_shot_is_a_turn_that_ends_in_a_readable_answer(house: Any) -> None:
    shots = answer_shots(house.task.seed, 1)
    system, asked, answered, ask = student_messages(house.task, "Q?", shots)
    assert [m["role"] for m in (system, asked, answered, ask)] == ["system", "user", "assistant", "user"]
    assert answered["content"].startswith(STEP_BY_STEP)
    assert extract(answered["content"], house.task.answer) == house.task.seed[0].target
    assert ask["content"] == "Question: Q?"
    messages = direct_messages(house.task, "Q?", answer_shots(house.task.seed, 2))  # asks for no reasoning
    assert STEP_BY_STEP not in "".join(message["content"] for message in messages)
    assert messages[2]["content"] == "<ans>even</ans>"
