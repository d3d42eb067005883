"""A recommendation: what was chosen and why, as an object, as JSON, as a table and as lines of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arte_edge.cache import megabytes
from arte_edge.publish.recommend.candidates import Candidate, Metric, ParetoFront
from arte_edge.results.accuracy import NOT_KNOWN, PairedAccuracy

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Violation:
    """A constraint that a file does not satisfy, and why. `needs`: the limit that would let it in."""

    file: str
    constraint: str  # max_ram, min_decode, max_drop, max_size, max_answer_seconds, gate
    reason: str
    needs: float | None = None


@dataclass(frozen=True)
class Relaxation:
    """The smallest change of one constraint, or of several, that lets one file in."""

    file: str
    constraints: tuple[tuple[str, float], ...]  # constraint and the limit it would need

    @property
    def text(self) -> str:
        return " and ".join(f"{_option(name)} {_value(name, limit)}" for name, limit in self.constraints)


def _option(constraint: str) -> str:
    return f"--{constraint.replace('_', '-')}"


def _value(constraint: str, limit: float) -> str:
    """Return a limit in the form of its option, rounded to the side that lets the file in."""
    if constraint in ("max_ram", "max_size"):
        return f"{math.ceil(limit / 1e6)}MB"
    return f"{(math.floor if constraint == 'min_decode' else math.ceil)(limit * 10) / 10:g}"


@dataclass(frozen=True)
class Recommendation:
    """The choice among the files of an export. `pick` None: no file satisfies all constraints; `relax` may help."""

    device: str
    candidates: tuple[Candidate, ...]
    front: ParetoFront  # of the files that passed the gate
    violations: tuple[Violation, ...]
    pick: str | None
    why: str
    relax: Relaxation | None = None
    notes: tuple[str, ...] = ()
    model: str = ""  # which every file's name begins with
    folder: str = ""

    def candidate(self, file: str) -> Candidate:
        """Return what is known of one file."""
        return next(c for c in self.candidates if c.file == file)

    @property
    def hint(self) -> str:
        """What to do where no file was picked; empty otherwise."""
        if self.pick is not None:
            return ""
        return f"Relax {self.relax.text}." if self.relax else "Run `arte-edge bench` on the device first."

    @property
    def lines(self) -> list[str]:
        """Why files are excluded, and notes."""
        lines = []
        for one in self.violations:
            option = "" if one.constraint == "gate" else f" ({_option(one.constraint)})"
            lines.append(f"{self._short(one.file)} is excluded{option}: {one.reason}")
        return [*lines, *self.notes]

    @property
    def choice(self) -> list[str]:
        """The choice and the reason for it; without a choice what to relax."""
        if self.pick is None:
            return [self.why, self.hint]
        picked = self.candidate(self.pick)
        known = picked.change or picked.accuracy
        against = f" Against the 16-bit student: {drop_text(known)}." if known else ""
        return [f"Use {Path(self.pick).name}.", self.why + against]

    @property
    def table(self) -> Table:
        """The files with what is known of each; predicted values are marked ~."""
        from rich import box

        from arte_edge.console import ResultTable

        table = ResultTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("file", overflow="fold", min_width=12)
        for name in ("size", "memory", "tokens/s", "answer", "accuracy", "change"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        excluded = {one.file for one in self.violations}
        for c in self.candidates:
            difference = c.change.difference if c.change else None
            table.add_row(
                self._short(c.file) + ("*" if c.file in self.front.files else ""),
                megabytes(c.artifact.size_bytes),
                _cell(c.ram, megabytes),
                _cell(c.decode, "{:.1f}".format),
                _cell(c.answer_s, "{:.1f} s".format),
                c.accuracy.percent if c.accuracy else NOT_KNOWN,
                NOT_KNOWN if difference is None else f"{100 * difference:+.1f}",
                "pick" if c.file == self.pick else "excluded" if c.file in excluded else "",
            )
        axes = ", ".join(self.front.axes)
        table.caption = f"* on the Pareto front of {axes}: no other file is better in one and as good in the rest"
        table.caption_justify = "left"
        return table

    def _short(self, file: str) -> str:
        """Leave out the student's name, with which every file's name begins."""
        return f"…{file.removeprefix(self.model)}" if file.startswith(self.model) else file

    def _repr_html_(self) -> str:
        from arte_edge.console import fragment

        return fragment(f"Files for {self.device}", [self.table], [*self.lines, *self.choice])

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        files = [
            {
                "file": c.file,
                "quantization": c.artifact.quantization,
                "size_bytes": c.artifact.size_bytes,
                "on_front": c.file in self.front.files,
                "accuracy": c.accuracy.model_dump(mode="json") if c.accuracy else None,
                "decode_tokens_per_s": asdict(c.decode) if c.decode else None,
                "prefill_tokens_per_s": asdict(c.prefill) if c.prefill else None,
                "ram_bytes": asdict(c.ram) if c.ram else None,
                "answer_seconds": asdict(c.answer_s) if c.answer_s else None,
            }
            for c in self.candidates
        ]
        relax = self.relax.constraints if self.relax else ()
        return {
            "device": self.device,
            "folder": self.folder,
            "pick": self.pick,
            "why": self.why,
            "front": asdict(self.front),
            "files": files,
            "violations": [asdict(violation) for violation in self.violations],
            "relax": [{"constraint": name, "to": value} for name, value in relax],
            "notes": list(self.notes),
        }


def _cell(metric: Metric | None, form: Callable[[float], str]) -> str:
    return NOT_KNOWN if metric is None else f"{'~' if metric.predicted else ''}{form(metric.value)}"


def drop_text(accuracy: PairedAccuracy) -> str:
    """Return the paired difference from the 16-bit student in points, and whether it is significant."""
    if accuracy.difference is None:
        return "difference from the student not measured"
    points = 100 * accuracy.difference
    text = f"{-points:.1f} points lost" if points < 0 else f"{points:+.1f} points"
    if accuracy.difference_low is not None and accuracy.difference_high is not None:
        text += f" ({100 * accuracy.difference_low:+.1f} to {100 * accuracy.difference_high:+.1f}"
        text += "" if accuracy.p_value is None else f", p = {accuracy.p_value:.2g}"
        text += f", n = {accuracy.n})"
    if accuracy.p_value is not None and points:
        text += ", significant" if accuracy.significant else ", not significant"
    return text
