"""``arte-edge bench``: how fast, and with ``--task`` how right, a model's files are on this or another device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arte_edge.cli.console import err
from arte_edge.errors import ArteError, InputError

if TYPE_CHECKING:
    from arte_edge.bench.case import BenchSettings
    from arte_edge.bench.result import QualityRow, SpeedRow
    from arte_edge.cli.bench_output import Output

__all__ = ["bench"]

_MODEL = "A .gguf file, an ONNX or checkpoint folder, an export's or a run's folder, a name of 'models ls'."


def bench(
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL...", help=_MODEL)] = None,
    n_prompt: Annotated[
        str | None, typer.Option("-p", "--n-prompt", metavar="N,..", help="Tokens to read; 0: none. [512]")
    ] = None,
    n_gen: Annotated[
        str | None, typer.Option("-n", "--n-gen", metavar="N,..", help="Tokens to write; 0: none. [128]")
    ] = None,
    n_depth: Annotated[
        str | None, typer.Option("-d", "--n-depth", metavar="N,..", help="Tokens in the cache before. [0]")
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(
            "-t", "--threads", metavar="N,..", help="As in 1,2,4 or 1-4+1. [auto: a fast core each]"
        ),
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option("-r", "--repetitions", metavar="N", help="Repetitions that count. [5]")
    ] = None,
    type_k: Annotated[
        str | None, typer.Option("-ctk", "--cache-type-k", metavar="T,..", help="Of the cache, GGUF. [f16]")
    ] = None,
    type_v: Annotated[
        str | None, typer.Option("-ctv", "--cache-type-v", metavar="T,..", help="Of the cache, GGUF. [f16]")
    ] = None,
    warmup: Annotated[
        bool | None, typer.Option("--warmup/--no-warmup", help="Repeat until steady before it counts. [on]")
    ] = None,
    warmup_s: Annotated[
        float | None, typer.Option("--warmup-seconds", metavar="S", help="No warm-up after this. [20]")
    ] = None,
    delay: Annotated[float | None, typer.Option(metavar="S", help="Rest before each test. [0]")] = None,
    sustained: Annotated[
        float | None, typer.Option(metavar="S", help="Go on writing so long; compare first and last. [0]")
    ] = None,
    power_watts: Annotated[
        float | None, typer.Option(metavar="W", help="Steady reading of your own meter.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(metavar="S", help="Of one test. [1800]")] = None,
    runtime: Annotated[
        str | None,
        typer.Option(help="llama-cpp-python, xllamacpp, onnxruntime-genai, onnxruntime, ... [auto]"),
    ] = None,
    roofline: Annotated[
        bool | None, typer.Option("--roofline/--no-roofline", help="Foretell the rate as well. [on]")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="Settings that have a name: default, quick, sustained, or a .toml.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Let it answer this task's examples as well.")] = None,
    split: Annotated[str, typer.Option(help="Of the task: test or validation.")] = "test",
    limit: Annotated[int, typer.Option(min=0, help="Examples at most; marks the result partial.")] = 0,
    bbh: Annotated[Path | None, typer.Option(help="Folder of BIG-Bench-Hard files with the task.")] = None,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure speed; off with --task only.")
    ] = True,
    device: Annotated[
        str | None, typer.Option(metavar="NAME|USER@HOST", help="Measure there, over ssh (see 'devices').")
    ] = None,
    compile_there: Annotated[
        bool, typer.Option("--compile", help="With --device: compile llama-cpp-python there.")
    ] = False,
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", metavar="TASK,..", help="lm-evaluation-harness, as a second opinion."),
    ] = None,
    output: Annotated[str, typer.Option("-o", "--output", help="md, csv, json or jsonl.")] = "md",
    as_json: Annotated[bool, typer.Option("--json", help="The same as -o json.")] = False,
    output_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows to a file too: .md, .csv, .json, .jsonl.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save/--no-save", help="Keep rows in bench.jsonl and student.json of an export.")
    ] = True,
) -> None:
    """Measure speed, memory, heat and energy of MODEL on this device; no configuration needed.

    Flags, defaults and JSON fields are llama-bench's where they mean the same; lists multiply.
    """
    if not models:
        raise InputError("bench: which model?", f"{_MODEL} For example: arte-edge bench model.gguf")
    if split not in ("test", "validation"):
        raise InputError(f"--split {split}: not a split", "test or validation.")
    if not speed and task is None:
        raise InputError("--no-speed: nothing is left to measure", "Give a --task, or leave it out.")
    given: dict[str, Any] = {
        "repetitions": repetitions,
        "warmup": warmup,
        "warmup_s": warmup_s,
        "delay_s": delay,
        "sustained_s": sustained,
        "power_watts": power_watts,
        "timeout_s": timeout,
        "runtime": runtime,
        "roofline": roofline,
        "type_k": type_k and tuple(type_k.split(",")),
        "type_v": type_v and tuple(type_v.split(",")),
    }
    settings = _settings(suite, given, {"-p": n_prompt, "-n": n_gen, "-d": n_depth, "-t": threads})
    from arte_edge.cli.bench_output import Output

    with Output("json" if as_json else output, output_file) as out:
        from arte_edge.bench.targets import find_targets

        paths = find_targets(models, _fetch)
        if device is not None:
            if lm_eval:
                raise InputError("--lm-eval does not go with --device", "It runs here: leave --device out.")
            words = settings.argv() + ([] if speed else ["--no-speed"])
            words += ["--split", split, "--limit", str(limit)] if task else []
            rows = _there(device, paths, words, task, bbh, compile_there, out)
        else:
            rows = _here(paths, settings, speed, task, {"split": split, "limit": limit, "bbh": bbh}, out)
    if save:
        _save(paths, rows)
    if lm_eval:
        _second_opinion(paths, lm_eval.split(","), settings.threads[0], limit)
    if rows and not any(row.status == "ok" for row in rows):
        raise ArteError(f"No test ended well: {rows[0].status}", rows[0].reason)


def _settings(suite: str | None, given: dict[str, Any], lists: dict[str, str | None]) -> BenchSettings:
    from arte_edge.bench.case import parse_counts
    from arte_edge.bench.suite import load_suite, make_settings

    keys = {"-p": "n_prompt", "-n": "n_gen", "-d": "n_depth", "-t": "threads"}
    told = {key: value for key, value in given.items() if value is not None}
    told |= {keys[flag]: parse_counts(flag, text) for flag, text in lists.items() if text is not None}
    return make_settings("bench", load_suite(suite or "default"), told)


def _fetch(ref: str) -> Path:
    """Return the file that a registry name or Hub id leads to; it is fetched if it is not here."""
    from arte_edge.cli.model_progress import model_progress
    from arte_edge.models import resolve

    with model_progress(ref) as progress:
        model = resolve(ref, progress=progress)
    found = model.gguf or model.folder
    assert found is not None  # a LocalModel has one of the two
    return found


def _here(
    paths: Sequence[Path],
    settings: BenchSettings,
    speed: bool,
    task: str | None,
    how: dict[str, Any],
    out: Output,
) -> list[SpeedRow | QualityRow]:
    from arte_edge.bench.answers import run_quality
    from arte_edge.bench.runner import run_bench
    from arte_edge.device.detect import detect

    facts = detect()
    rows: list[SpeedRow | QualityRow] = []
    if speed:
        rows += run_bench(paths, settings, device=facts, reporter=out, on_row=out.row)
    if task is not None:
        threads = settings.threads[0]
        rows += run_quality(paths, task, threads=threads, device=facts, reporter=out, on_row=out.row, **how)
    return rows


def _second_opinion(paths: Sequence[Path], tasks: Sequence[str], threads: int, limit: int) -> None:
    """Print what lm-evaluation-harness says; its figures are no rows of ours, so they go to stderr."""
    from arte_edge.bench.lm_eval import run_lm_eval

    for path in paths:
        for score in run_lm_eval(path, tasks, threads=threads, limit=limit):
            error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
            part = ", partial" if score.partial else ""
            value = f"{score.metric} {score.value:.4f}{error}, n = {score.n}{part}"
            text = f"{path.name}: {score.task} {value} ({score.harness})"
            err.print(text, markup=False, soft_wrap=True)


def _there(
    device: str,
    paths: Sequence[Path],
    words: Sequence[str],
    task: str | None,
    bbh: Path | None,
    compile_there: bool,
    out: Output,
) -> list[SpeedRow | QualityRow]:
    """Measure on another device; it runs this same verb there."""
    from arte_edge.device.catalogue import find_device
    from arte_edge.device.remote import bench_remote
    from arte_edge.distill.progress import Reporter

    folder = None
    if task is not None:
        from arte_edge import catalog

        if bbh is not None:
            raise InputError("--bbh does not go with --device", "Give a task folder with --task.")
        folder = catalog.find("tasks", task)
    return bench_remote(
        find_device(device),
        paths,
        words,
        reporter=Reporter(),
        task=folder,
        compile_there=compile_there,
        on_row=out.row,
    )


def _save(paths: Sequence[Path], rows: Sequence[SpeedRow | QualityRow]) -> None:
    """Append rows to the ``bench.jsonl`` of the exports that they are about, and merge them into student.json."""
    from arte_edge.bench.rows import FILE_NAME, append_rows
    from arte_edge.export.student import FILE_NAME as STUDENT

    names = [path.name for path in paths]
    folders = {path.name: path.resolve().parent for path in paths if names.count(path.name) == 1}
    if twice := sorted({name for name in names if names.count(name) > 1}):
        err.print(
            f"{', '.join(twice)}: named twice, so its results are not kept", markup=False, soft_wrap=True
        )
    for folder in sorted(set(folders.values())):
        mine = [row for row in rows if folders.get(row.model_filename) == folder]
        if not mine or not (folder / STUDENT).is_file():
            continue
        append_rows(folder / FILE_NAME, mine)
        from arte_edge.publish.speeds import merge_rows

        try:
            merge_rows(folder, mine, note=lambda text: err.print(text, markup=False, soft_wrap=True))
        except ArteError as error:  # the measurement is kept; a damaged document is not its fault
            err.print(f"not merged into {STUDENT}: {error.message}", markup=False, soft_wrap=True)
            if error.hint:
                err.print(error.hint, markup=False, soft_wrap=True)
