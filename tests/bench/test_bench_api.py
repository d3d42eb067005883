"""``bench.runner.bench`` from Python: an object comes back, nothing is printed, wrong values raise."""

import subprocess
import sys
from typing import Any

import pytest
from tiny import Capture

from arte_edge.bench.runner import bench
from arte_edge.bench.settings import Reporter, Request
from arte_edge.errors import InputError

QUICK: dict[str, Any] = {"n_prompt": "4", "n_gen": 8, "repetitions": 2, "warmup": False, "threads": "1"}
QUICK["roofline"] = False


class Seen(Reporter):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def progress(self, text: str) -> None:
        self.texts.append(text)


def test_it_returns_rows_and_prints_nothing(capsys: Capture) -> None:
    seen, rows = Seen(), []
    outcome = bench("null:1", reporter=seen, on_row=rows.append, **QUICK)
    assert [row.test for row in outcome.speed] == ["pp4", "tg8"] == [row.test for row in rows]
    assert outcome.ok and outcome.quality == () and str(outcome.paths[0]) == "null:1"
    assert any("tg8" in text for text in seen.texts)
    html = outcome._repr_html_()
    assert html.count("<tr>") == 3 and "tg8" in html and "tokens/s" in html
    assert capsys.readouterr() == ("", "")


def test_a_wrong_value_is_an_input_error_that_names_it_before_anything_is_measured() -> None:
    for wrong, named in (({"n_promt": 4}, "n_prompt"), ({"n_gen": 2.5}, "n_gen"), ({"task": "no_such"}, "no_such")):
        with pytest.raises(InputError) as error:
            bench("null", on_row=lambda row: pytest.fail(row.test), **QUICK | wrong)
        assert named in f"{error.value.message} {error.value.hint}"


def test_a_request_that_a_device_cannot_run_ends_with_2_and_prints_no_row() -> None:
    request = Request(source="nothing.gguf").model_dump_json()
    command = [sys.executable, "-m", "arte_edge.bench.runner", request]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "nothing.gguf" in done.stderr and done.stdout == ""
