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


def test_a_teacher_sees_worked_examples_first_and_no_question_twice(house: Any) -> None:
    seed = house.task.seed[1]
    worked = FewShotExample(input=seed.input, reasoning=" It ends in 1. ", target=seed.target)
    task = replace(house.task, worked=(worked,))
    shots = teacher_shots(task, 3)
    assert shots[0].answer == "It ends in 1. <ans>odd</ans>"
    assert [shot.question for shot in shots].count(seed.input) == 1
    assert len(shots) == 3
    assert teacher_shots(task, 0) == []


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
