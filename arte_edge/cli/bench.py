"""``arte-edge bench`` and ``compare``: speed and accuracy of models here or on a device; two results side by side."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arte_edge.cli import interrupt
from arte_edge.console import WIDTH, cut, emit_json
from arte_edge.errors import ArteError, InputError

if TYPE_CHECKING:
    from arte_edge.bench.compare import Comparison, QualityPair, SpeedPair
    from arte_edge.results.rows import QualityRow, SpeedRow

_MODEL = "A .gguf file, an ONNX or checkpoint folder, an export's or a run's folder, a name of 'models ls'."
_RESULTS = "A bench.jsonl, output of `bench -o json`, an export or run folder, or a measured model."


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
        str | None, typer.Option("-ctk", "--cache-type-k", metavar="T,..", help="KV-cache type for keys (GGUF). [f16]")
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
        float | None, typer.Option("--sustained", metavar="S", help="Keep decoding this long to see throttling. [0]")
    ] = None,
    power_watts: Annotated[
        float | None, typer.Option(metavar="W", help="Steady reading of an external power meter.")
    ] = None,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", metavar="S", help="Timeout per test and per answer, seconds. [1800]")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="llama-cpp-python, xllamacpp, onnxruntime-genai, onnxruntime, ... [auto]")
    ] = None,
    roofline: Annotated[
        bool | None, typer.Option("--roofline/--no-roofline", help="Also print the predicted decode rate. [on]")
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
        str | None, typer.Option(metavar="NAME|USER@HOST", help="Measure on this device over ssh (see 'devices').")
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


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help=_RESULTS)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The results to compare with A, given in the same ways.")],
    force: Annotated[
        bool, typer.Option("--force", help="Compare speeds although settings differ, and print the differences.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two sets of results: speed and accuracy.

    Speeds as ratios with confidence intervals, correct answers as paired tests. Results that are not comparable
    (other prompt or answer lengths, threads, cache types, device, task or split) are rejected with exit code 2.
    """
    from arte_edge.bench.compare import compare as compare_rows
    from arte_edge.bench.compare import rows_of

    found = compare_rows(rows_of(a), rows_of(b), force=force)
    if as_json:
        emit_json(found.as_dict())
    else:
        typer.echo("\n".join(lines_of(found)))


def lines_of(found: Comparison) -> list[str]:
    """Return a comparison as text, 80 columns wide."""
    lines: list[str] = []
    groups: dict[tuple[str, ...], list[SpeedPair]] = {}
    for one in found.speeds:
        names = one.a.model_filename, one.b.model_filename, one.a.runtime, one.b.runtime
        groups.setdefault(names, []).append(one)
    for pairs in groups.values():
        lines += _heading(pairs[0].a, pairs[0].b)
        lines.append(f"{'test':<12} {'thr':>3} {'A t/s':>9} {'B t/s':>9}  {'B/A':>5} {'95 %':<15}  verdict")
        lines += [_speed_line(one) for one in pairs]
        lines += [*_costs(pairs), ""]
    for pair in found.qualities:
        lines += [*_heading(pair.a, pair.b), *_quality_lines(pair), ""]
    for title, items in (
        ("Different on both sides", found.differs),
        ("Only in A", found.only_a),
        ("Only in B", found.only_b),
    ):
        if items:
            lines += [*_wrapped(f"{title}: {'; '.join(items)}."), ""]
    return lines[:-1] if lines and not lines[-1] else lines


def _heading(a: SpeedRow | QualityRow, b: SpeedRow | QualityRow) -> list[str]:
    return [cut(f"{side}  {row.model_filename}  ({row.runtime})") for side, row in (("A", a), ("B", b))]


def _speed_line(one: SpeedPair) -> str:
    shown, interval, verdict = "-", "", one.verdict
    if one.rate is not None:
        shown = f"{one.rate.value:.3f}"
        if one.rate.low is not None and one.rate.high is not None:
            interval = f"[{one.rate.low:.3f}, {one.rate.high:.3f}]"
    verdict = one.disturbed or verdict
    return (
        f"{one.a.test:<12} {one.a.n_threads:>3} {_rate(one.a):>9} {_rate(one.b):>9}  "
        f"{shown:>5} {interval:<15}  {verdict}"
    ).rstrip()


def _rate(row: SpeedRow) -> str:
    if not row.ok:
        return {"out-of-memory": "no memory", "timeout": "too long"}.get(row.status, row.status)
    return f"{row.median_ts:.0f}" if row.median_ts >= 1000 else f"{row.median_ts:.2f}"


def _costs(pairs: list[SpeedPair]) -> list[str]:
    """Return the highest resident memory of the pairs, and energy where it was measured."""
    lines = []
    memory = [(one.a.peak_rss_bytes, one.b.peak_rss_bytes) for one in pairs]
    known = [(a, b) for a, b in memory if a is not None and b is not None]
    if known:
        a, b = (max(values) / 2**20 for values in zip(*known, strict=True))
        lines.append(f"peak memory: A {a:.0f} MiB, B {b:.0f} MiB")
    for one in pairs:
        if one.a.energy_j and one.b.energy_j and one.a.energy_source == one.b.energy_source:
            a, b = (1000 * row.energy_j / _tokens(row) for row in (one.a, one.b) if row.energy_j)
            lines.append(f"{one.a.test}: A {a:.3g} mJ a token, B {b:.3g} ({one.a.energy_source})")
    return lines


def _tokens(row: SpeedRow) -> int:
    return max(1, len(row.samples_ns) * (row.n_prompt + row.n_gen))


def _quality_lines(one: QualityPair) -> list[str]:
    paired = one.paired
    rights = [f"{side} {row.right}/{row.n} = {row.right / row.n:.1%}" for side, row in _sides(one)]
    text = (
        f"{one.a.task}, {one.a.split}: {', '.join(rights)}; B - A {paired.difference:+.1%} "
        f"[{paired.difference_low:+.1%}, {paired.difference_high:+.1%}] on {paired.n} examples, "
        f"p = {paired.p_value:.2g}: {one.verdict}"
    )
    lines = _wrapped(text)
    times = [
        f"{side} {row.answer_seconds_p50:.2f} s (p95 {row.answer_seconds_p95:.2f})"
        for side, row in _sides(one)
        if row.answer_seconds_p50 is not None and row.answer_seconds_p95 is not None
    ]
    if len(times) == 2:
        lines.append(f"  an answer: {', '.join(times)}")
        if one.a.device.fingerprint != one.b.device.fingerprint:
            lines.append("  measured on different devices: times are not comparable")
    return lines


def _sides(one: QualityPair) -> tuple[tuple[str, QualityRow], tuple[str, QualityRow]]:
    return ("A", one.a), ("B", one.b)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")
