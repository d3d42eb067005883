"""``arte-edge ask``, ``chat`` and ``serve``: questions to a student, in a run or in a file."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arte_edge.cli import interrupt
from arte_edge.console import Reporter, emit_json, err, out
from arte_edge.errors import InputError

if TYPE_CHECKING:
    from arte_edge.asking.ask import Reply

_SOURCE = "A run's folder or name, a .gguf file, an ONNX or checkpoint folder, or an export's folder."
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=_SOURCE)]
Task = Annotated[str | None, typer.Option(help="Task of a model that has no student.json.")]
Grammar = Annotated[bool, typer.Option("--grammar/--no-grammar", help="Permit only answers in the form of the task.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens. Default: the student's own.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the runtime.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def ask(
    source: Source,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="The question.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Table of questions: .csv, .tsv, .jsonl, .json or .parquet.")
    ] = None,
    out_: Annotated[
        Path | None, typer.Option("--out", "-o", help="With --file: .csv, .tsv or .jsonl to write.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="With --file: column of the questions. Default: found by its name.")
    ] = None,
    with_text: Annotated[
        bool, typer.Option("--with-text", help="With --file: write the whole text of each answer as well.")
    ] = False,
    task: Task = None,
    grammar: Grammar = True,
    max_tokens: MaxTokens = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Ask a student one question, or all questions of a table.

    The answer is printed on stdout, the whole text and its time on stderr. An interrupted table resumes with the
    same command.
    """
    from arte_edge import api

    if file is None:
        if text is None or out_ or column or with_text:
            raise InputError("No question", "Give a TEXT, or a table: --file in.csv -o out.csv.")
        reply = api.ask(source, text, task=task, grammar=grammar, max_tokens=max_tokens, threads=threads)
        _print(reply, as_json)
        return
    if text is not None or out_ is None:
        what = "no -o" if text is None else "a TEXT"
        raise InputError(f"--file with {what}", "Give either a TEXT, or --file in.csv -o out.csv.")
    interrupt.resumes()
    table = api.ask_file(
        source,
        file,
        out_,
        column=column,
        with_text=with_text,
        task=task,
        grammar=grammar,
        max_tokens=max_tokens,
        threads=threads,
        reporter=Reporter(),
    )
    if as_json:
        emit_json(asdict(table))
    else:
        err.print(str(table), soft_wrap=True)


def chat(
    source: Source,
    task: Task = None,
    grammar: Grammar = True,
    max_tokens: MaxTokens = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Answer each line of stdin by itself, until Ctrl-D."""
    from arte_edge import api

    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    with api.open_student(source, task=task, grammar=grammar, max_tokens=max_tokens, threads=threads) as student:
        student.model  # noqa: B018 (opened before the first question)
        while True:
            if sys.stdin.isatty():
                err.print("> ", end="")
            if not (line := sys.stdin.readline()):
                return
            if text := line.strip():
                try:
                    _print(student.ask(text), as_json)
                except InputError as error:  # of this question alone
                    err.print(f"{error.message}. {error.hint}", soft_wrap=True)
                sys.stdout.flush()


def _print(reply: Reply, as_json: bool) -> None:
    if as_json:
        emit_json(asdict(reply))
        return
    if reply.text.strip() != reply.answer:
        err.print(reply.text.strip(), style="dim", soft_wrap=True)
    out.print("(no answer in the task's form)" if reply.answer is None else reply.answer, soft_wrap=True)
    err.print(f"{reply.tokens} tokens in {1000 * reply.seconds:,.0f} ms", style="dim")


def serve(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="A .gguf file, an export's folder, or a run's folder or name.")
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8080,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Start llama.cpp's server for a student, here alone.

    Prints a command that prompts it. Ctrl-C ends both.
    """
    from arte_edge import api

    with api.serve(source, port=port, threads=threads) as server:
        err.print(f"{server.url} answers; Ctrl-C ends it. A question:", soft_wrap=True)
        with suppress(BrokenPipeError):
            if as_json:
                emit_json({"url": server.url, "curl": server.curl})
            else:
                print(server.curl, flush=True)
        server.wait()
