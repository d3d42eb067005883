"""What is drawn is in the committed data (tests/tasks/test_scaffold.py); here, where nothing more can be drawn."""

import pytest
from shipped_tasks.draw import Draw, fill
from tiny import Patch

from arte_edge.tasks.task import Example


def test_a_generator_that_is_too_narrow_says_so(monkeypatch: Patch) -> None:
    monkeypatch.setattr("shipped_tasks.draw._MAX_TRIES", 50)
    with pytest.raises(RuntimeError, match="the generator is too narrow"):
        fill(lambda label: ("same", Example("same", label)), ("a", "b"), Draw(0))
