"""Problems and warnings of a task."""

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from arte_edge import catalog
from arte_edge.errors import InputError
from arte_edge.tasks.folder import load_folder
from arte_edge.tasks.loaders import load_task
from arte_edge.tasks.validation import Problem, explain_validation, quality_warnings, raise_first


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rate: float = 1.0


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner
    many: tuple[Inner, ...] = ()
    steps: int


def test_the_first_problem_is_raised_with_its_hint() -> None:
    raise_first([], "t")
    with pytest.raises(InputError) as caught:
        raise_first([Problem("f:1", "bad", "Fix it.")], "t")
    assert (caught.value.message, caught.value.hint) == ("f:1: bad", "Fix it.")


def test_every_validation_error_becomes_a_problem() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": {"rat": 1}, "many": [{}, {"rete": 1}], "step": 4})
    problems = list(explain_validation(caught.value, Outer, "x.toml"))
    assert sorted((str(problem), problem.hint) for problem in problems) == [
        ("x.toml: inner.rat: unknown key", "Did you mean 'rate'?"),
        ("x.toml: many.1.rete: unknown key", "Did you mean 'rate'?"),
        ("x.toml: step: unknown key", "Did you mean 'steps'?"),
        ("x.toml: steps: this key is missing", ""),
    ]


@pytest.mark.parametrize("name", catalog.names("tasks"))
def test_a_shipped_task_has_no_warning(name: str) -> None:
    assert quality_warnings(load_task(name)) == []


def test_small_and_unbalanced_splits_have_warnings(parity: Path) -> None:
    task = load_folder(parity)
    odd = tuple(row for row in task.validation if row.target == "odd")
    even = tuple(row for row in task.validation if row.target == "even")
    weak = replace(task, seed=even[:3], validation=odd * 4 + even, notes=("dropped 1 row",))
    expected = (
        "dropped 1 row",
        "50 rows",
        "no example of odd",
        "3 of 3 answers are even",
        "40 of 50 answers are odd",
    )
    for warning, part in zip(quality_warnings(weak), expected, strict=True):
        assert part in warning
