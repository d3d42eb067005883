"""The check before anything is spent, and what a run refuses before it calls a model."""

import re
from dataclasses import replace
from typing import Any

import pytest
from tiny import Capture, Patch

from arte_edge.distill.evaluation import majority_baseline
from arte_edge.distill.stages.check import check
from arte_edge.errors import StoppedEarly
from arte_edge.tasks.task import Answer, Example


def test_a_good_teacher_of_a_guessing_student_passes(house: Any) -> None:
    summary = check(house.run(), force=False)
    assert summary["n"] == 40
    assert summary["teacher"]["accuracy"] == 1.0
    assert summary["student_forced"]["accuracy"] == 0.5
    assert summary["chance"] == 0.5
    assert summary["p_value"] < 0.001


def test_a_teacher_near_chance_stops_with_its_figures(house: Any, capsys: Capture) -> None:
    house.teacher.knows = lambda n: n % 8 < 4
    assert house.distill() == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "the teacher is near chance: 50% right" in said
    assert "n = 40" in said and "majority baseline is 50%" in said
    assert "--force" in said


def test_a_teacher_no_better_than_the_student_stops(house: Any) -> None:
    house.student.knows = lambda n: True
    run = house.run()
    with pytest.raises(StoppedEarly) as caught:
        check(run, force=False)
    assert caught.value.exit_code == 4


def test_force_continues_and_pays_for_nothing_twice(house: Any) -> None:
    house.teacher.knows = lambda n: n % 8 < 4
    with pytest.raises(StoppedEarly):
        check(house.run(), force=False)
    spent = house.calls
    assert check(house.run(), force=True)["teacher"]["accuracy"] == 0.5
    assert house.calls == spent


def test_chance_is_the_most_frequent_answer_or_a_guess_among_the_options(house: Any) -> None:
    run = house.run()
    rows = (Example("a", "odd"), Example("b", "odd"), Example("c", "odd"), Example("d", "even"))
    assert majority_baseline(run, rows) == 0.75
    run.task = replace(run.task, answer=Answer(kind="choice", choices=("odd", "even", "neither", "both")))
    assert majority_baseline(run, tuple(Example(str(i), f"{i}") for i in range(8))) == 0.25
    run.task = replace(run.task, answer=Answer(kind="text"))
    assert majority_baseline(run, rows) == 0.75


def test_a_teacher_on_a_server_is_not_asked_to_align(house: Any, capsys: Capture, monkeypatch: Patch) -> None:
    def nothing(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened")

    for name in ("resolve", "open_local", "open_engine"):
        monkeypatch.setattr(f"arte_edge.distill.run_context.{name}", nothing)
    assert house.distill("--teacher", "openai:big@http://127.0.0.1:9/v1") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "teacher.model: openai:big is a server" in said
    assert 'data = "original-teacher"' in said


@pytest.mark.parametrize("template", ["{{ messages[0].nope.nope }}", "{% for %}", "{{ 1 // 0 }}"])
def test_a_template_that_does_not_render_is_an_input_error(
    house: Any, template: str, capsys: Capture
) -> None:
    house.teacher.chat_template = template
    assert house.distill() == 2
    assert "chat template does not render" in " ".join(capsys.readouterr().err.split())
    assert house.calls == 0


def test_a_teacher_without_a_valid_draft_stops_at_its_budget_or_before_and_is_paid_once(
    house: Any, capsys: Capture
) -> None:
    house.teacher.drafts = lambda i: "x</input><target>seven</target></Question_4>" if i % 2 else "No."
    few = ("--set", "elicit.questions=8", "--set", "elicit.max_prompts=6")
    assert house.distill(*few) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"only 0 of 8 valid questions after 6 prompts", said)
    assert "3 × cut off" in said and "3 × target is no answer of this task" in said
    assert (house.folder / "check" / "manifest.json").is_file()
    spent = house.calls
    assert house.distill(*few) == 4 and house.calls == spent
    assert house.distill("--update", "--set", "elicit.questions=200") == 4  # whose budget is 400 prompts
    assert house.teacher.calls < 200
