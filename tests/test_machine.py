from pathlib import Path

import pytest
from tiny import Patch

from arte_edge.errors import ArteError
from arte_edge.machine import available_cores, thread_count


def test_the_caller_comes_before_the_environment_and_that_before_the_cores(monkeypatch: Patch) -> None:
    monkeypatch.setenv("ARTE_EDGE_THREADS", "3")
    assert (thread_count(7), thread_count(), thread_count(0)) == (7, 3, 3)
    monkeypatch.delenv("ARTE_EDGE_THREADS")
    assert thread_count() == available_cores() >= 1


@pytest.mark.parametrize("text", ["four", "0", "-1", "1.5", "²"])
def test_a_wrong_number_is_an_error_of_the_user(monkeypatch: Patch, text: str) -> None:
    monkeypatch.setenv("ARTE_EDGE_THREADS", text)
    with pytest.raises(ArteError, match="ARTE_EDGE_THREADS") as error:
        thread_count()
    assert text in error.value.message
    assert thread_count(2) == 2


def test_nobody_else_reads_the_variable() -> None:
    package = Path(__file__).parents[1] / "arte_edge"
    readers = [p for p in package.rglob("*.py") if '"ARTE_EDGE_THREADS"' in p.read_text("utf-8")]
    assert [path.name for path in readers] == ["machine.py"]
