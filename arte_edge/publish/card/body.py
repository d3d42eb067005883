"""The sections of a model card's body that are generated from ``student.json``, each between two markers.

A rerun replaces the text between a section's markers and nothing else. A section whose markers a
person removed stays removed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from arte_edge.cache import megabytes
from arte_edge.errors import InputError
from arte_edge.publish import publishable
from arte_edge.publish.card.metadata import CardOptions
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.student_json import Evaluation, Speed, StudentFile

__all__ = ["SECTIONS", "files_section", "put_section", "wrapped"]

_DASH = "–"
_START, _END = "<!-- arte-edge:{}:start -->", "<!-- arte-edge:{}:end -->"
_ANY_MARK = re.compile(r"<!--\s*arte-edge:[a-z]+:(?:start|end)\s*-->")


def wrapped(name: str, text: str) -> str:
    """Return `text` between the markers of the part `name`."""
    return f"{_START.format(name)}\n{text.rstrip()}\n{_END.format(name)}\n"


def put_section(body: str, name: str, text: str, newline: str, file: str = "README.md") -> str | None:
    """Return `body` with the text between the markers of `name` replaced; None without markers.

    Raises:
        InputError: one of the two is missing, or a marker occurs twice.
    """
    start, end = (re.compile(rf"<!--\s*arte-edge:{name}:{which}\s*-->") for which in ("start", "end"))
    starts, ends = list(start.finditer(body)), list(end.finditer(body))
    if not starts and not ends:
        return None
    inner = (
        body[starts[0].end() : ends[0].start()]
        if len(starts) == len(ends) == 1
        else "<!-- arte-edge:x:end -->"
    )
    if _ANY_MARK.search(inner) or starts[0].end() > ends[0].start():
        raise InputError(
            f"{file}: the markers of '{name}' are not one start and one end",
            f"Leave one {_START.format(name)} and, below it, one {_END.format(name)}; or remove both.",
        )
    new = f"\n{text.rstrip()}\n".replace("\n", newline)
    return body[: starts[0].end()] + new + body[ends[0].start() :]


def lineage_section(student: StudentFile, options: CardOptions) -> str:
    """What the student is, and its lineage."""
    lineage, rows = student.lineage, []
    parameters = f"{student.student.parameter_count / 1e6:,.1f} M parameters"
    rows.append(("student", f"{student.student.name}, {student.student.architecture}, {parameters}"))
    for title, parent in (("base", lineage.base), ("teacher", lineage.teacher)):
        if parent:
            rows.append((title, ", ".join(filter(None, (parent.name, parent.quantization, parent.license)))))
    if lineage.task:
        rows.append(("task", lineage.task))
    if lineage.method == "arte":
        rows.append(
            (
                "method",
                "ARTE: teaching aligned with the student, [arXiv:2406.19227](https://arxiv.org/abs/2406.19227)",
            )
        )
    if lineage.tuning:
        tuning = lineage.tuning
        facts = (
            tuning.method,
            tuning.data,
            _given("learning rate", tuning.learning_rate),
            _given("epochs", tuning.epochs),
        )
        rows.append(("tuning", ", ".join(filter(None, facts))))
    if lineage.data:
        rows.append(("data", f"{lineage.data.rows} rows, sha256 {lineage.data.sha256[:16]}…"))
    if lineage.seed is not None:
        rows.append(("seed", str(lineage.seed)))
    rows.append(("made with", f"arte-edge {student.arte_edge_version}"))
    return _table(("", ""), ((title, _cell(text) if title != "method" else text) for title, text in rows))


def files_section(student: StudentFile, options: CardOptions) -> str:
    """The files, and the fidelity of each to the 16-bit student."""
    passed = publishable.files(student)
    if not passed:
        return "No file passed the gate."
    rows = []
    for artifact in passed:
        metrics = artifact.fidelity.metrics
        rows.append(
            (
                f"`{_cell(artifact.file)}`",
                _cell(artifact.quantization),
                megabytes(artifact.size_bytes),
                f"{artifact.bits_per_weight:.2f}",
                _number(metrics.kl_mean if metrics else None, ".4f"),
                _number(metrics.top1 if metrics else None, ".1%"),
                _number(metrics.perplexity_ratio if metrics else None, ".4f"),
            )
        )
    head = ("file", "type", "size", "bits/weight", "KL mean", "top-1 agreement", "perplexity ratio")
    reference = f"Compared with the 16-bit student ({student.student.dtype}) on the same tokens"
    metrics = next((a.fidelity.metrics for a in passed if a.fidelity.metrics), None)
    tokens = f": {metrics.n_tokens} tokens of {metrics.n_prompts} prompts" if metrics else ""
    return f"{_table(head, rows)}\n{reference}{tokens}; KL divergence in nats a token."


def accuracy_section(student: StudentFile, options: CardOptions) -> str:
    """Accuracy of each file, and of the 16-bit student in a line of its own."""
    rows = []
    own: Sequence[PairedAccuracy] = publishable.evaluations(student.student_evaluations)
    own = [*own, *([student.student_accuracy] if student.student_accuracy else [])]
    for accuracy in own:
        rows.append(_accuracy_row(f"16-bit student ({student.student.dtype})", accuracy, student))
    for artifact in [] if options.checkpoint else publishable.files(student):
        found = publishable.accuracies(artifact)
        rows += [_accuracy_row(f"`{_cell(artifact.file)}`", accuracy, student) for accuracy in found]
        if not found:
            rows.append((f"`{_cell(artifact.file)}`", "not measured", *[_DASH] * 5))
    if not rows:
        return "Not measured yet."
    head = ("file", "examples", "n", "accuracy", "95 % interval", "difference to the student", "measured on")
    return f"{_table(head, rows)}\nWilson intervals; the difference is paired, in points, with its 95 % interval."


def bench_section(student: StudentFile, options: CardOptions) -> str:
    """Speed of each file, one table a device."""
    devices: dict[str, list[tuple[str, Speed]]] = {}
    for artifact in publishable.files(student):
        for speed in publishable.speeds(artifact, options.allow_throttled):
            devices.setdefault(publishable.device_title(speed), []).append((artifact.file, speed))
    parts = []
    for device in sorted(devices):
        cpu = next((speed.cpu for _, speed in devices[device] if speed.cpu and speed.cpu != device), "")
        title = f"**{_cell(device)}**" + (f" ({_cell(cpu)})" if cpu else "")
        head = (
            "file",
            "runtime",
            "threads",
            "prefill tokens/s",
            "decode tokens/s",
            "time to first token",
            "peak memory",
            "max temperature",
        )
        rows = (_speed_row(file, speed, options.allow_throttled) for file, speed in devices[device])
        parts.append(f"{title}\n\n{_table(head, rows)}")
    left_out = sum(publishable.left_out(artifact) for artifact in publishable.files(student))
    if not parts:
        parts.append("Not measured on a device yet: `arte-edge bench`.")
    if left_out and not options.allow_throttled:
        parts.append(f"{left_out} measurement(s) omitted: the device was throttled.")
    if devices:
        parts.append("Medians of repeated runs; every sample is in `bench.jsonl` beside the files.")
    return "\n\n".join(part.rstrip() for part in parts)


SECTIONS: dict[str, tuple[str, Callable[[StudentFile, CardOptions], str]]] = {
    "lineage": ("Lineage", lineage_section),
    "files": ("Files", files_section),
    "accuracy": ("Accuracy", accuracy_section),
    "bench": ("Speed", bench_section),
}


def _accuracy_row(name: str, accuracy: PairedAccuracy, student: StudentFile) -> tuple[str, ...]:
    task = accuracy.task or student.lineage.task
    difference = _DASH
    if accuracy.difference is not None:
        difference = f"{100 * accuracy.difference:+.1f}"
        if accuracy.difference_low is not None and accuracy.difference_high is not None:
            difference += f" ({100 * accuracy.difference_low:+.1f} to {100 * accuracy.difference_high:+.1f})"
    place = (
        f"{publishable.device_title(accuracy)}, {accuracy.runtime}"
        if isinstance(accuracy, Evaluation)
        else "at export"
    )
    return (
        name,
        _cell(f"{task}, {accuracy.split}".lstrip(", ")),
        str(accuracy.n),
        f"{accuracy.accuracy:.1%}",
        f"{accuracy.low:.1%} to {accuracy.high:.1%}",
        difference,
        _cell(place),
    )


def _speed_row(file: str, speed: Speed, show_throttled: bool) -> tuple[str, ...]:
    mark = " (throttled)" if show_throttled and speed.throttled else ""
    depth = f", {speed.n_depth} tokens of context" if speed.n_depth else ""
    return (
        f"`{_cell(file)}`{depth}{mark}",
        _cell(speed.runtime),
        str(speed.threads),
        _number(speed.prefill_tokens_per_s, ".1f"),
        _number(speed.decode_tokens_per_s, ".1f"),
        _number(speed.ttft_ms, ".0f", " ms"),
        _DASH if speed.peak_rss_bytes is None else megabytes(speed.peak_rss_bytes),
        _number(speed.temperature_c_max, ".0f", " °C"),
    )


def _number(value: float | None, form: str, unit: str = "") -> str:
    return _DASH if value is None else f"{value:{form}}{unit}"


def _given(name: str, value: float | None) -> str:
    return "" if value is None else f"{name} {value:g}"


def _cell(text: str) -> str:
    """Return `text` so that it stays in its cell: no markup, no line ends, no markers."""
    flat = " ".join(text.split())
    for sign, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "'")):
        flat = flat.replace(sign, escaped)
    return flat


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
