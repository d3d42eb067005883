"""``arte-edge push`` and ``card``: what is wrong with the command itself, in one sentence and with exit 2."""

from pathlib import Path

import pytest
from tiny import Capture

from arte_edge.cli.main import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["push", "{dir}", "--to", "tiny"], "not USER/REPO"),
        (["push", "{dir}", "--to", "a/b/c"], "not USER/REPO"),
        (["push", "{dir}", "--to", "../b"], "not USER/REPO"),
        (["push", "{dir}", "--to", "ada/tiny"], "neither an export nor a checkpoint"),
        (["push", "{dir}"], "--to"),
        (["card", "{dir}"], "no student.json here"),
        (["card", "{dir}", "--base-model", "tiny"], "not a Hub id"),
        (["card", "{dir}", "--benchmark", "gsm8k"], "not DATASET:TASK_ID"),
    ],
    ids=lambda value: " ".join(value[2:]) or value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_exit_code_2(tmp_path: Path, capsys: Capture, words: list[str], said: str) -> None:
    assert main([word.format(dir=tmp_path) for word in words]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert "Traceback" not in told.err
    assert list(tmp_path.iterdir()) == []
