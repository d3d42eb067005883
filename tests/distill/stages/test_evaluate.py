"""How students are asked and held against each other, in the answers, in the table and in its first line."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from arte_edge.distill.evaluation import respondent_answers, student_answers, student_choices
from arte_edge.distill.stages.check import check
from arte_edge.distill.stages.evaluate import evaluate, headline, summary_lines, summary_table
from arte_edge.distill.stages.target import target
from arte_edge.distill.stages.tune import tailor_and_tune
from arte_edge.results.accuracy import NOT_KNOWN
from arte_edge.results.comparison import comparison_of
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.tasks.structured import schema_text
from arte_edge.tasks.task import Answer, Example, rows_sha256

ROWS = ["base student", "own labels", "own labels + validation", "tuned student", "teacher"]


def evaluated(house: Any, *, force: bool = True, **tables: Any) -> dict[str, Any]:
    house.by_label = True
    run = house.run(tailor={"questions": 16}, **tables)
    try:
        check(run, force=force)
        target(run)
        return evaluate(run, tailor_and_tune(run, None))
    finally:
        run.close()


def better(rows: Sequence[dict[str, str]]) -> Any:
    """Return what is known of a training: the more rows the more, of the test numbers from 500 to 519."""
    return lambda n: n % 2 == 0 or n < (520 if len(rows) == 24 else 510 if len(rows) == 48 else 506)


def test_every_model_has_its_row_and_the_tuned_student_a_test_against_each_other(house: Any) -> None:
    house.learned = better  # 8 seeds, 48 seeds and validation rows, 8 seeds and 16 tailored rows
    summary = evaluated(house)
    settings = [(row["model"], row["setting"]) for row in summary["rows"]]
    assert {model for model, _ in settings} == set(ROWS)
    assert [s for who, s in settings if who == "tuned student"] == ["as asked", "constrained"]
    accuracy = {(row["model"], row["setting"]): row["accuracy"] for row in summary["rows"]}
    assert [accuracy[who, "as asked"] for who in ROWS[:4]] == [0.5, 0.65, 0.75, 1.0]
    assert accuracy["teacher", "8-shot"] == 1.0
    tests = {(test["against"], test["setting"]): test for test in summary["paired"]}
    assert set(tests) == {one for one in settings if one[0] != "tuned student"}
    own = tests["own labels", "as asked"]
    assert (own["gained"], own["lost"], own["difference"]) == (7, 0, 0.35) and own["low"] > 0
    assert summary["role"] == "inputs" and summary["form"] == "answer"
    columns = {str(column.header): list(column.cells) for column in summary_table(summary).columns}
    models, differences = columns["model"], columns["tuned minus it"]
    assert len(dict.fromkeys(models)) == len(ROWS)
    assert str(differences[models.index("own labels")]).startswith("+35.0")
    assert str(differences[models.index("tuned student")]) == NOT_KNOWN
    assert headline(summary) == summary_lines(summary)[0]
    assert headline(summary).startswith("Better than your own labels alone: +35.0 (+")


def test_a_student_that_is_not_better_says_so_first_and_what_to_try(house: Any) -> None:
    summary = evaluated(house)  # every training teaches three of four numbers
    first = headline(summary)
    assert first.startswith("Not better than your own labels alone: +0.0 (-")
    assert "tailor.questions" in first and "rounds = 2" in first and "stronger teacher" in first


def as_json(house: Any) -> None:
    """Make the task one of intents: its answers are JSON objects."""
    schema = {"type": "object", "properties": {"intent": {"type": "string"}}, "required": ["intent"]}
    task = house.task

    def written(examples: Sequence[Example]) -> tuple[Example, ...]:
        return tuple(Example(e.input, f'{{"intent":"{e.target}"}}') for e in examples)

    test = written(task.load_test())
    house.task = replace(
        task,
        answer=Answer(kind="json", json_schema=schema_text(schema)),
        seed=written(task.seed),
        validation=written(task.validation),
        test_inputs=frozenset(example.key for example in test),
        test_sha256=rows_sha256(test),
        test_loader=lambda: test,
    )


def test_json_answers_have_a_slot_f1_and_a_table_of_80_columns(house: Any) -> None:
    as_json(house)
    answer, draft = '{"intent":"even"}', house.teacher.drafts
    house.teacher.drafts = lambda sample: draft(sample).replace(">even<", f">{answer}<")
    for engine in (house.teacher, house.student):
        engine.answer = lambda prompt: answer
    summary = evaluated(house, tune={"target": "answer"}, data="original-teacher")
    f1 = {(row["model"], row["setting"]): row["slot_f1"] for row in summary["rows"]}
    assert (f1["base student", "as asked"], f1["tuned student", "as asked"]) == (0.5, 0.0)  # "even" is no JSON
    table = summary_table(summary)
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["slot F1"][0] == "50.0%" and columns["right (95 %)"][0] == "50% (30–70)"
    assert Console(width=200).measure(table).maximum <= 80
    assert {row.slot_f1 for row in comparison_of(summary)} >= {0.5, 0.0}


@pytest.mark.parametrize("form", ["answer", "answer-first"])
def test_constrained_json_is_written_by_its_grammar(house: Any, form: Any) -> None:
    as_json(house)
    house.student.supports_grammar = True
    seen: list[str] = []

    def say(request: Request, text: str, sampling: Sampling) -> str:
        seen.append(request.prompt[-5:])
        return '{"intent":"even"}' if sampling.grammar else "even"

    house.student.say = say
    run = house.run()
    engine, how, examples = run.engine(run.config.student), run.asking(form), house.task.validation[:2]
    assert student_answers(run, engine, how, examples, "as asked").accuracy == 0
    assert student_choices(run, engine, how, examples, "constrained").accuracy == 0.5
    run.close()
    assert (seen[-1] == "<ans>") == (form == "answer-first")


def test_without_the_control_there_is_nothing_to_compare_with(house: Any) -> None:
    summary = evaluated(house, check={"own_labels": False}, evaluate={"teacher": False, "limit": 8})
    assert {row["model"] for row in summary["rows"]} == {"base student", "tuned student"}
    assert headline(summary).startswith("Not compared with a student of your own labels")
    assert "n = 8 test examples, a part of the test split: not a result" in summary_lines(summary)[1]


def test_shots_are_turns_in_the_students_own_form_and_the_first_setting_leads(house: Any) -> None:
    summary = evaluated(house, evaluate={"shots": [2], "teacher": False})
    assert {row["setting"] for row in summary["rows"] if row["model"] == "tuned student"} == {"2-shot", "constrained"}
    shot = "Question: Is 0 even or odd?\nAnswer:\neven\n\nQuestion: Is 1 even or odd?\nAnswer:\nodd\n\nQuestion: Is 500"
    assert any(shot in prompt for prompt in house.student.prompts)
    assert headline(summary).startswith("Not better")


@pytest.mark.parametrize(("form", "closing"), [("answer", "</s>"), ("answer-first", "</ans>")])
def test_c_and_c_plus_plus_are_told_apart_by_what_ends_them(house: Any, form: Any, closing: str) -> None:
    """The student goes on after C with nine tenths of probability, so C++ is its answer."""
    house.task = replace(house.task, answer=Answer(kind="choice", choices=("C", "C++")))
    examples = (Example("Which language?", "C++"),)

    def choose_each(prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        seen.append(prompts[0][-5:])
        likely = {"C": 1.0, f"C{closing}": 0.1, "C++": 0.9, f"C++{closing}": 0.9}
        return [np.log([likely[choice] for choice in own]) for own in choices]

    seen: list[str] = []
    house.student.choose_each = choose_each
    run = house.run()
    found = student_choices(run, run.engine(run.config.student), run.asking(form), examples, "constrained")
    run.close()
    assert found.answers == ["C++"] and found.accuracy == 1.0
    assert seen == ["wer:\n" if form == "answer" else "<ans>"]


@pytest.mark.parametrize("form", ["answer", "answer-first", "reasoning-first"])
def test_an_open_answer_as_long_as_the_tasks_longest_is_not_cut_off(house: Any, form: Any) -> None:
    longest = " ".join(map(str, range(150)))
    examples = (Example("Sort them.", longest),)
    house.task = replace(house.task, answer=Answer(kind="text"), validation=examples)
    limits: list[int] = []

    def say(request: Request, text: str, sampling: Sampling) -> str:
        limits.append(sampling.max_tokens)
        opened = request.prompt.endswith("<ans>")
        whole = longest if form == "answer" and not opened else f"{'' if opened else '<ans>'}{longest}</ans>"
        return " ".join(whole.split()[: sampling.max_tokens])

    house.student.say = say
    run = house.run()
    student, how = run.config.student, run.asking(form)
    engine = run.engine(student)
    assert student_answers(run, engine, how, examples, "as asked").accuracy == 1.0
    assert student_choices(run, engine, how, examples, "constrained").accuracy == 1.0
    assert respondent_answers(run, engine, student, examples, (), "respondent").accuracy == 1.0
    run.close()
    assert min(limits) > 150
