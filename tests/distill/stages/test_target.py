"""What the student writes: the answer alone unless another form is clearly better in a trial."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from arte_edge.distill.stages.check import check
from arte_edge.distill.stages.target import describe, target
from arte_edge.tasks.task import Answer

RULES = {"alone": "answer", "then the reason": "answer-first", "step by step": "reasoning-first"}


def form_of(rows: Sequence[dict[str, str]]) -> str:
    return next(form for rule, form in RULES.items() if rule in rows[0]["prompt"])


def knowing(**of_four: int) -> Callable[[Sequence[dict[str, str]]], Callable[[int], bool]]:
    """Return what students know after a training: so many of four numbers in each form."""

    def learned(rows: Sequence[dict[str, str]]) -> Callable[[int], bool]:
        known = of_four[form_of(rows).replace("-", "_")]
        return lambda n: n % 4 < known

    return learned


def tried(house: Any, **tables: Any) -> tuple[Any, dict[str, Any] | None]:
    house.by_label = True
    run = house.run(**tables)
    check(run, force=True)
    summary = target(run)
    run.close()
    return run, summary


@pytest.mark.parametrize(
    ("known", "form"),
    [
        ({"answer": 3, "answer_first": 3, "reasoning_first": 3}, "answer"),
        ({"answer": 4, "answer_first": 2, "reasoning_first": 2}, "answer"),
        ({"answer": 2, "answer_first": 4, "reasoning_first": 3}, "answer-first"),
        ({"answer": 2, "answer_first": 4, "reasoning_first": 4}, "answer-first"),
        ({"answer": 2, "answer_first": 2, "reasoning_first": 3}, "reasoning-first"),
    ],
)
def test_the_cheapest_form_is_taken_unless_a_dearer_one_is_clearly_better(
    house: Any, known: dict[str, int], form: str
) -> None:
    house.learned = knowing(**known)
    run, summary = tried(house)
    assert summary and summary["form"] == run.form == form
    assert summary["accuracy"] == {name.replace("_", "-"): n / 4 for name, n in known.items()}
    assert set(run.read("target", "trial.jsonl")[0]) == {"input", "target", *summary["accuracy"]}


def test_a_form_that_is_a_little_better_is_not_taken(house: Any) -> None:
    def learned(rows: Sequence[dict[str, str]]) -> Callable[[int], bool]:
        return lambda n: n % 4 < 3 or (form_of(rows) != "answer" and n < 116)  # four more of forty

    house.learned = learned
    run, summary = tried(house)
    assert summary and run.form == "answer"
    assert summary["accuracy"]["answer-first"] > summary["accuracy"]["answer"]


def test_the_check_has_trained_the_first_student_and_a_rerun_trains_none(house: Any) -> None:
    run, summary = tried(house)
    names = [path.relative_to(house.folder).as_posix() for path in house.trained]
    assert names == ["check/own-labels", "target/answer-first", "target/reasoning-first"]
    spent = house.calls
    again, same = tried(house)
    assert (same, again.form, house.calls, len(house.trained)) == (summary, run.form, spent, 3)


def test_reasons_are_the_teachers_and_stand_where_the_form_has_them(house: Any) -> None:
    tried(house)
    first, last = house.rows("target/answer-first")[3], house.rows("target/reasoning-first")[3]
    assert first["completion"] == "<ans>odd</ans> It is 3 at once."
    assert last["completion"] == "It is 3 at once. <ans>odd</ans>"


@pytest.mark.parametrize(("agree", "forms"), [(7, 1), (8, 3), (9, 3)])
def test_forms_with_reasons_are_left_out_where_too_few_reasons_agree(house: Any, agree: int, forms: int) -> None:
    house.task = replace(house.task, seed=house.task.seed + house.task.validation[:4])
    house.task = replace(house.task, validation=house.task.validation[4:])
    asked = [int(seed.input.split()[1]) for seed in house.task.seed]
    house.teacher.knows = lambda n: n not in asked[agree:]
    house.learned = knowing(answer=2, answer_first=2, reasoning_first=4)
    run, summary = tried(house)
    assert summary and summary["with_reasons"] == agree and len(summary["accuracy"]) == forms
    assert ("reasons for 7 rows are too few" in describe(summary)) is (forms == 1)
    assert run.form == ("answer" if forms == 1 else "reasoning-first")
    if forms == 3:  # an answer without reasons would teach to leave them out
        sizes = {form: len(house.rows(f"target/{form}")) for form in ("answer-first", "reasoning-first")}
        assert sizes == {"answer-first": 12, "reasoning-first": agree}


def test_where_there_is_nothing_to_find_out_yet_no_trial_is_made(house: Any) -> None:
    for form in ("answer", "answer-first", "reasoning-first"):
        run, summary = tried(house, tune={"target": form})
        assert (run.form, summary) == (form, None)
    house.task = replace(house.task, answer=Answer(kind="text"))  # the trial waits for the tailored data
    house.folder = house.folder.with_name("open")
    house.folder.mkdir()
    run, summary = tried(house)
    assert (run.form, summary) == ("reasoning-first", None)
    assert not (house.folder / "target").exists()
