"""The check before anything is spent: who is better at the task, what the teacher is good for, and when a run stops."""

import re
from dataclasses import replace
from typing import Any

import pytest
from tiny import Capture, Patch

from arte_edge.distill.evaluation import majority_baseline
from arte_edge.distill.stages.check import check
from arte_edge.errors import StoppedEarly
from arte_edge.tasks.task import Answer, Example


def checked(house: Any, *, force: bool = False, **tables: Any) -> dict[str, Any]:
    run = house.run(**tables)
    try:
        return check(run, force=force) | {"role of the run": run.role}
    finally:
        run.close()


def test_a_teacher_that_is_clearly_better_than_own_labels_labels(house: Any) -> None:
    house.by_label = True
    summary = checked(house)
    assert summary["n"] == 40 and summary["chance"] == 0.5
    assert summary["teacher"]["accuracy"] == 1.0
    assert summary["student"]["accuracy"] == summary["student_constrained"]["accuracy"] == 0.5
    assert (summary["own_labels"]["accuracy"], summary["own_labels"]["rows"]) == (0.75, 8)
    assert summary["p_student"] < 0.001 and summary["p_own_labels"] < 0.01
    assert summary["role"] == summary["role of the run"] == "labels"
    assert "better than the student of your own labels alone (100% against 75%" in summary["why"]


def test_the_control_is_trained_on_the_seeds_as_it_is_asked(house: Any) -> None:
    checked(house)
    rows = house.rows("check/own-labels")
    assert [row["completion"] for row in rows] == [seed.target for seed in house.task.seed]
    instruction = f"{house.task.description}\nReply with the answer alone."
    assert all(instruction in row["prompt"] for row in rows)
    assert instruction in (house.folder / "check" / "own-labels" / "chat_template.jinja").read_text().replace(
        "\\n", "\n"
    )
    asked = house.tuned[next(iter(house.tuned))].prompts
    assert asked == house.student.prompts, "the student as it is and the control are asked the same"


@pytest.mark.parametrize("known", [4, 3, 2])  # of four numbers
def test_a_teacher_that_is_not_clearly_better_writes_inputs_and_needs_no_accuracy(house: Any, known: int) -> None:
    house.by_label, house.teacher.knows = True, lambda n: n % 4 < known
    house.learned = lambda rows: lambda n: True
    summary = checked(house)
    assert summary["role"] == summary["role of the run"] == "inputs"
    assert "not clearly better" in summary["why"]


@pytest.mark.parametrize("kind", ["text", "tags"])
def test_without_inputs_for_a_given_answer_a_teacher_as_good_as_own_labels_stops_the_run(house: Any, kind: str) -> None:
    house.by_label, house.learned = kind == "text", lambda rows: lambda n: True
    if kind == "text":
        house.task = replace(house.task, answer=Answer(kind="text"))
    with pytest.raises(StoppedEarly) as caught:
        checked(house)
    assert "own-labels" in caught.value.hint
    summary = checked(house, force=True)
    assert summary["role"] == "labels" and "inputs cannot be written" in summary["why"]
    events = (house.folder / "events.jsonl").read_text("utf-8")
    assert "the student of your own labels is as good as the teacher: 100% against 100%" in events


def test_a_configured_role_is_taken_and_labels_still_have_to_be_better(house: Any) -> None:
    house.by_label, house.learned = True, lambda rows: lambda n: True
    teacher = {"model": house.teacher.name}
    assert checked(house, teacher=teacher | {"role": "inputs"})["why"] == "teacher.role = inputs"
    with pytest.raises(StoppedEarly):
        checked(house, teacher=teacher | {"role": "labels"})


def test_without_the_control_the_teacher_is_held_against_the_student_alone(house: Any) -> None:
    summary = checked(house, check={"own_labels": False})
    assert summary["own_labels"] is None and summary["p_own_labels"] is None
    assert summary["role"] == "labels" and not house.trained
    house.student.knows, house.folder = lambda n: True, house.folder.with_name("knowing")
    house.folder.mkdir()
    with pytest.raises(StoppedEarly) as caught:
        checked(house, check={"own_labels": False})
    assert caught.value.exit_code == 4


def test_a_rerun_asks_and_trains_nothing_and_another_rate_trains_again(house: Any) -> None:
    house.by_label = True
    first, spent = checked(house), house.calls
    assert checked(house) == first
    assert (house.calls, len(house.trained)) == (spent, 1)
    house.learned = lambda rows: lambda n: True
    control = house.folder / "check" / "own-labels"
    (control / "training.json").unlink()  # what a training with another setting does not find
    (house.folder / "check" / "own-labels-F16.gguf").write_text("of the earlier training")
    assert checked(house, tune={"epochs": 7})["n"] == 40
    assert len(house.trained) == 2


def test_a_teacher_near_chance_stops_with_its_figures(house: Any, capsys: Capture) -> None:
    house.teacher.knows = lambda n: n % 8 < 4
    assert house.distill() == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "the teacher is near chance: 50% right" in said
    assert "n = 40" in said and "majority baseline is 50%" in said
    assert "--force" in said


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
    assert '"original-teacher"' in said and '"best-of-n"' in said


@pytest.mark.parametrize("template", ["{{ messages[0].nope.nope }}", "{% for %}", "{{ 1 // 0 }}"])
def test_a_template_that_does_not_render_is_an_input_error(house: Any, template: str, capsys: Capture) -> None:
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
