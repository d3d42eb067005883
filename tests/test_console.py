"""What a pipe or a log is told while something works, and that what is printed is what was given."""

import time

import pytest
from tiny import Capture, Patch

from arte_edge import console
from arte_edge.console import Reporter, emit_json, heartbeat, step_progress, tolerate_any_encoding


def test_silence_is_broken_by_the_step_that_runs_with_its_counts(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(console, "SILENCE_S", 0.2)
    reporter = Reporter(quiet=True)  # as with --json: stderr still tells
    with heartbeat("distill"):
        with reporter.stage("elicit"):
            time.sleep(0.5)
            with reporter.bar("draft rationales", 8) as step:
                time.sleep(0.1)
                step(2, 50)
                time.sleep(0.5)
        with step_progress("teacher", " MB", 1_000_000) as progress:
            progress("part 1", 3_000_000, 12_000_000)
            time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    time.sleep(0.5)
    assert capsys.readouterr().err == ""  # it ends with the verb
    assert "distill: elicit: 0 s so far" in lines
    assert any("distill: elicit: draft rationales: 2 of 8, " in line and "left" in line for line in lines)
    assert "teacher: part 1" in lines
    assert any(line.startswith("distill: teacher: part 1: 3 of 12 MB, about ") for line in lines)
    assert 4 <= len(lines) <= 9


@pytest.mark.parametrize("text", ["[bold]x[/bold]", "[/x]", "a :fire: b", "\ud83d"])
def test_what_is_printed_is_what_was_given(text: str, capsys: Capture) -> None:
    tolerate_any_encoding()
    reporter = Reporter()
    reporter.say(text, "head")
    reporter.warn(text)
    reporter.done("stage", text, 1.0)
    emit_json({"text": text})
    printed = capsys.readouterr()
    shown = text.encode("utf-8", "replace").decode()
    assert [shown in line for line in printed.err.splitlines()] == [True] * 3
    assert text in printed.out or "\\ud83d" in printed.out
