"""Problems, as a person reads them."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from arte_edge.errors import InputError
from arte_edge.tasks.problems import Problem, explain_validation, refuse


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rate: float = 1.0


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner
    many: tuple[Inner, ...] = ()
    steps: int


def test_nothing_wrong_raises_nothing() -> None:
    refuse([], "t")


def test_the_first_problem_is_raised_with_its_hint_alone() -> None:
    with pytest.raises(InputError) as caught:
        refuse([Problem("f:1", "bad", "Mend it.")], "t")
    assert (caught.value.message, caught.value.hint) == ("f:1: bad", "Mend it.")


def test_every_complaint_of_a_model_becomes_a_problem() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": {"rat": 1}, "many": [{}, {"rete": 1}], "step": 4})
    problems = list(explain_validation(caught.value, Outer, "x.toml"))
    assert sorted((str(problem), problem.hint) for problem in problems) == [
        ("x.toml: inner.rat: unknown key", "Did you mean 'rate'?"),
        ("x.toml: many.1.rete: unknown key", "Did you mean 'rate'?"),
        ("x.toml: step: unknown key", "Did you mean 'steps'?"),
        ("x.toml: steps: this key is missing", ""),
    ]
