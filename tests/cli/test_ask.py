"""``arte-edge ask`` and ``chat``: what is on stdout and on stderr, the JSON, and combinations that make no sense."""

import io
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny import Capture, Patch, cli_json

import arte_edge as ae
from arte_edge.cli.main import main

pytest.importorskip("llama_cpp")


def test_the_answer_is_on_stdout_and_the_time_on_stderr(bench_gguf: Path, capsys: Capture) -> None:
    assert main(["ask", str(bench_gguf), "hello", "--max-tokens", "5"]) == 0
    printed, reply = capsys.readouterr(), ae.ask(bench_gguf, "hello", max_tokens=5)
    assert printed.out == f"{reply.answer}\n" and f"{reply.tokens} tokens in" in printed.err
    row = cli_json(capsys, "ask", str(bench_gguf), "hello", "--max-tokens", "5")
    assert set(row) == {"input", "answer", "text", "tokens", "seconds"}
    assert row | {"seconds": 0} == asdict(reply) | {"seconds": 0}


def test_a_task_constrains_the_answer_unless_told_not_to(bench_gguf: Path, capsys: Capture) -> None:
    words = ["ask", str(bench_gguf), "dim the lights", "--task", "home_intents"]
    assert main(words) == 0 and capsys.readouterr().out.strip() in ae_choices()
    assert main([*words, "--no-grammar"]) == 0
    assert capsys.readouterr().out == "(no answer in the task's form)\n"


def ae_choices() -> tuple[str, ...]:
    from arte_edge.tasks.loaders import load_task

    return load_task("home_intents").answer.choices


def test_a_table_is_closed_with_a_line_and_says_the_same_as_json(
    bench_gguf: Path, model_cache: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "in.csv").write_text("text\nfirst\n\nsecond\n")
    words = ["ask", str(bench_gguf), "--file", str(tmp_path / "in.csv"), "-o", str(tmp_path / "out.csv")]
    assert main([*words, "--max-tokens", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "" and "out.csv: 2 rows, 2 answered; 2 of them now" in printed.err
    row = cli_json(capsys, *words, "--max-tokens", "3")
    assert (row["rows"], row["new"], row["out"]) == (2, 0, str(tmp_path / "out.csv"))


@pytest.mark.parametrize(
    "words", [[], ["text", "--file", "in.csv"], ["--file", "in.csv"], ["text", "-o", "out.csv"], [""], ["  "]], ids=str
)
def test_what_makes_no_sense_is_one_error(words: list[str], bench_gguf: Path, capsys: Capture) -> None:
    assert main(["ask", str(bench_gguf), *words]) == 2
    assert capsys.readouterr().err.count("error:") == 1


def test_a_chat_answers_each_line_by_itself(bench_gguf: Path, capsys: Capture, monkeypatch: Patch) -> None:
    lines = "first\n\nbad \udce9\nsecond\nfirst".encode(errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), "utf-8"))
    assert main(["chat", str(bench_gguf), "--max-tokens", "4"]) == 0
    printed = capsys.readouterr()
    replies = [str(ae.ask(bench_gguf, text, max_tokens=4)) for text in ("first", "second", "first")]
    assert printed.out.splitlines() == replies and replies[0] != replies[1]
    assert printed.err.count(" tokens in ") == 3 and "not UTF-8" in printed.err
