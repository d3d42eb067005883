"""``arte-edge bench``: speed, and with ``--task`` accuracy, of a model's files on this or another device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arte_edge.cli import interrupt
from arte_edge.errors import ArteError, InputError

_MODEL = "A .gguf file, an ONNX or checkpoint folder, an export's or a run's folder, a name of 'models ls'."


def bench(
    ctx: typer.Context,
    source: Annotated[list[str] | None, typer.Argument(metavar="MODEL...", help=_MODEL)] = None,
    n_prompt: Annotated[
        str | None, typer.Option("-p", "--n-prompt", metavar="N,..", help="Prompt tokens; 0: skip. [512]")
    ] = None,
    n_gen: Annotated[
        str | None, typer.Option("-n", "--n-gen", metavar="N,..", help="Generated tokens; 0: skip. [128]")
    ] = None,
    n_depth: Annotated[
        str | None,
        typer.Option("-d", "--n-depth", metavar="N,..", help="Tokens already in the KV cache (context depth). [0]"),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(
            "-t",
            "--threads",
            metavar="N,..",
            help="As in 1,2,4 or 1-4+1. [auto: ARTE_EDGE_THREADS, else one per fast core]",
        ),
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option("-r", "--repetitions", metavar="N", help="Measured repetitions. [5]")
    ] = None,
    type_k: Annotated[
        str | None,
        typer.Option("-ctk", "--cache-type-k", metavar="T,..", help="KV-cache type for keys (GGUF). [f16]"),
    ] = None,
    type_v: Annotated[
        str | None,
        typer.Option("-ctv", "--cache-type-v", metavar="T,..", help="KV-cache type for values (GGUF). [f16]"),
    ] = None,
    warmup: Annotated[
        bool | None, typer.Option("--warmup/--no-warmup", help="Repeat until steady before measuring. [on]")
    ] = None,
    warmup_s: Annotated[
        float | None, typer.Option("--warmup-seconds", metavar="S", help="Longest warm-up. [20]")
    ] = None,
    delay_s: Annotated[float | None, typer.Option("--delay", metavar="S", help="Pause before each test. [0]")] = None,
    sustained_s: Annotated[
        float | None,
        typer.Option("--sustained", metavar="S", help="Keep decoding this long to see throttling. [0]"),
    ] = None,
    power_watts: Annotated[
        float | None, typer.Option(metavar="W", help="Steady reading of an external power meter.")
    ] = None,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", metavar="S", help="Timeout per test, seconds. [1800]")
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(help="llama-cpp-python, xllamacpp, onnxruntime-genai, onnxruntime, ... [auto]"),
    ] = None,
    roofline: Annotated[
        bool | None,
        typer.Option("--roofline/--no-roofline", help="Also print the predicted decode rate. [on]"),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Named settings: default, quick, sustained, or a .toml.")] = None,
    task: Annotated[str | None, typer.Option(help="Also measure accuracy on this task.")] = None,
    split: Annotated[str, typer.Option(help="Split of the task: test or validation.")] = "test",
    limit: Annotated[int, typer.Option(min=0, help="Most examples; marks the result partial.")] = 0,
    bbh: Annotated[Path | None, typer.Option(help="Folder of BIG-Bench-Hard files that contains the task.")] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed; --no-speed needs --task.")] = True,
    grammar: Annotated[
        bool, typer.Option("--grammar/--no-grammar", help="Accuracy also with the answers' grammar (GGUF).")
    ] = True,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME|USER@HOST", help="Measure on this device over ssh (see 'devices')."),
    ] = None,
    compile_there: Annotated[
        bool, typer.Option("--compile", help="With --device: compile llama-cpp-python there.")
    ] = False,
    output: Annotated[str, typer.Option("-o", "--output", help="md, csv, json or jsonl.")] = "md",
    as_json: Annotated[bool, typer.Option("--json", help="Same as -o json.")] = False,
    output_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write rows to .md, .csv, .json or .jsonl.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save/--no-save", help="Save rows in an export's bench.jsonl and student.json.")
    ] = True,
) -> None:
    """Measure speed, memory, heat and energy of a model.

    Needs no configuration. Flags, defaults and JSON fields are llama-bench's where they mean the same; lists
    multiply. Rates that other work disturbed are marked "?" and kept out of cards and recommendations.
    """
    if not source:
        raise InputError("Missing argument MODEL.", f"{_MODEL} For example: arte-edge bench model.gguf")
    from arte_edge.bench.report import Output
    from arte_edge.bench.runner import bench as run_bench
    from arte_edge.bench.settings import BenchSettings

    if device:  # the job there is joined, files that were copied are kept
        interrupt.resumes()
    given = {key: ctx.params[key] for key in BenchSettings.model_fields if ctx.params[key] is not None}
    with Output("json" if as_json else output, output_file) as out:
        outcome = run_bench(
            source,
            suite=suite,
            task=task,
            split=split,  # type: ignore[arg-type]  # checked there
            limit=limit,
            bbh=bbh,
            speed=speed,
            grammar=grammar,
            device=device,
            compile_there=compile_there,
            save=save,
            reporter=out,
            on_row=out.row,
            **given,
        )
    if not outcome.ok:
        raise ArteError(f"All tests failed (first: {outcome.rows[0].status})", outcome.rows[0].reason)
