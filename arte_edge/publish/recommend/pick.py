"""Which file to use on a device, and why: constraints, Pareto front, choice.

Of the files that satisfy all constraints and are on the front, the choice is the fastest of those
whose accuracy is statistically indistinguishable from the best: their 95 % interval reaches the best
file's accuracy. With few examples that is most of them, and speed decides. A file whose speed is only
predicted is never preferred to one that was measured, however fast the prediction.

``max_drop`` is compared with the measured paired difference from the 16-bit student, significant or
not; the message says which. A constraint that cannot be checked, because nothing was measured or
predicted, counts as not satisfied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arte_edge.device.profiles import Profile
from arte_edge.device.roofline import Predictor
from arte_edge.errors import InputError
from arte_edge.publish.recommend.constraints import Constraints, parse_size, size_text
from arte_edge.publish.recommend.measurements import candidates
from arte_edge.publish.recommend.pareto import Candidate, Metric, ParetoFront, pareto_front
from arte_edge.publish.recommend.table import (
    choice_lines,
    drop_text,
    recommendation_lines,
    recommendation_table,
)
from arte_edge.results.locate import find_export, read_bench, read_export
from arte_edge.results.rows import Row
from arte_edge.results.student_json import StudentFile

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Recommendation",
    "Relaxation",
    "Violation",
    "choose",
    "recommend",
]


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
        return " and ".join(
            f"--{name.replace('_', '-')} {_as_option(name, value)}" for name, value in self.constraints
        )


@dataclass(frozen=True)
class Recommendation:
    """The answer. `pick` None: no file satisfies all constraints, and `relax` says what would help."""

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
    def table(self) -> Table:
        """The files with what is known of each; predicted values are marked ~."""
        return recommendation_table(self)

    def _repr_html_(self) -> str:
        from arte_edge.notebook import fragment

        lines = [*recommendation_lines(self), *choice_lines(self)]
        return fragment(f"Files for {self.device}", [self.table], lines)

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


def recommend(
    source: str | Path,
    *,
    device: str | None = None,
    max_ram: str | None = None,
    max_size: str | None = None,
    min_decode: float | None = None,
    max_drop: float | None = None,
    max_answer_seconds: float | None = None,
    prompt_tokens: int = 256,
    answer_tokens: int = 64,
) -> Recommendation:
    """Recommend one file of an export for a device, by accuracy, speed and size.

    Args:
        source: a run's folder or name, or a folder with ``student.json``.
        device: name of a profile, or a fingerprint that was measured; None: this machine.
        max_ram: peak memory, as in ``1GB`` or ``512MiB``.
        max_size: size of the file.
        min_decode: decode rate in tokens per second.
        max_drop: accuracy lost against the 16-bit student, in points.
        max_answer_seconds: from a prompt to the end of its answer.
        prompt_tokens: length of a prompt, where answers were not timed on the device.
        answer_tokens: length of an answer, likewise.

    Raises:
        InputError: no export there, an unknown device, or not a size.
    """
    from arte_edge.device.roofline import predictor

    constraints = Constraints(
        max_ram_bytes=parse_size(max_ram, "--max-ram") if max_ram else None,
        min_decode=min_decode,
        max_drop=max_drop,
        max_size_bytes=parse_size(max_size, "--max-size") if max_size else None,
        max_answer_seconds=max_answer_seconds,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
    )
    folder = find_export(source)
    student, rows = read_export(folder), read_bench(folder)
    speeds = [speed for artifact in student.artifacts for speed in artifact.speeds]
    measured = {name for speed in speeds for name in (speed.device, speed.fingerprint) if name}
    measured |= {name for row in rows for name in (row.device.profile, row.device.fingerprint) if name}
    profile, names, note = _device(device, measured)
    predict = predictor(folder, profile, prompt_tokens + answer_tokens) if profile.name else None
    found = choose(student, profile, constraints, rows=rows, predict=predict, names=names | profile.names)
    notes = (note, *found.notes) if note else found.notes
    return replace(found, folder=folder.name, notes=notes)


def _device(ref: str | None, measured: set[str]) -> tuple[Profile, frozenset[str], str]:
    """Return the profile behind `ref`, further names that its results may have, and a note.

    A fingerprint that was measured needs no profile; nothing can be predicted for it then.
    """
    from arte_edge.device.profiles import find_device

    if ref is None:
        from arte_edge.device.detect import detect

        facts = detect()
        names = frozenset({facts.fingerprint, facts.profile} - {""})
        if facts.profile:
            return find_device(facts.profile), names, ""
        here = Profile(title="this machine", cores=facts.cores, memory_bytes=(facts.memory_bytes,))
        return here, names, "This machine matches no profile: nothing can be predicted for it."
    try:
        return find_device(ref), frozenset({ref}), ""
    except InputError:
        if ref not in measured:
            raise
        return Profile(title=ref, cores=1, memory_bytes=(1,)), frozenset({ref}), ""


def choose(
    student: StudentFile,
    device: Profile,
    constraints: Constraints,
    *,
    rows: Sequence[Row] = (),
    predict: Predictor | None = None,
    names: frozenset[str] | None = None,
) -> Recommendation:
    """Return the recommendation among the files of `student` for `device`.

    Args:
        rows: of ``bench.jsonl``; results already merged into `student` count without them.
        predict: predicts metrics of a file that was not measured there; None: no predictions.
        names: that results of the device may have, fingerprints included; its own unless given.
    """
    found = candidates(student, names or device.names, constraints, rows, predict)
    good = [c for c in found if c.artifact.status == "ok"]
    violations = [
        Violation(c.file, "gate", "rejected by the fidelity gate") for c in found if c.artifact.status != "ok"
    ]
    for candidate in good:
        violations += _violations(candidate, constraints)
    out = {violation.file for violation in violations}
    feasible = [c for c in good if c.file not in out]
    front = pareto_front(good)
    result = Recommendation(
        device=device.name or device.title,
        candidates=tuple(found),
        front=front,
        violations=tuple(violations),
        pick=None,
        why="",
        notes=_notes(good, front),
        model=student.student.name,
    )
    if not feasible:
        relax = _relaxation(good, violations)
        return replace(result, why=_why_none(good, relax), relax=relax)
    sure = [c for c in feasible if c.decode and not c.decode.predicted] or feasible
    pick, why = _pick(sure, pareto_front(sure), len(feasible), constraints.any)
    faster = tuple(
        f"{c.file} may be faster: {c.decode.value:.1f} tokens/s predicted; measure it."
        for c in feasible
        if c not in sure and c.decode and c.decode.value > _speed(pick)
    )
    return replace(result, pick=pick.file, why=why, notes=result.notes + faster)


def _violations(c: Candidate, constraints: Constraints) -> list[Violation]:
    """Return the constraints that a file does not satisfy."""
    size = Metric(float(c.artifact.size_bytes), "measured")
    limits = (
        ("max_size", constraints.max_size_bytes, size, "size", 1),
        ("max_ram", constraints.max_ram_bytes, c.ram, "memory", 1),
        ("max_answer_seconds", constraints.max_answer_seconds, c.answer_s, "answer time", 1),
        ("min_decode", constraints.min_decode, c.decode, "decode", -1),
    )
    found = []
    for name, limit, metric, what, sign in limits:
        if limit is None:
            continue
        if metric is None:
            found.append(Violation(c.file, name, f"{what}: neither measured nor predicted here"))
        elif sign * metric.value > sign * limit:
            word = "predicted " if metric.predicted else ""
            text = f"{what} {word}{_with_unit(name, metric.value)}, limit {_with_unit(name, limit)}"
            found.append(Violation(c.file, name, text, metric.value))
    if constraints.max_drop is not None:
        found += _accuracy_violation(c, constraints.max_drop)
    return found


def _accuracy_violation(c: Candidate, most_points: float) -> list[Violation]:
    if c.accuracy is None or c.accuracy.difference is None:
        return [Violation(c.file, "max_drop", "accuracy was not measured against the student's")]
    points = -100 * c.accuracy.difference
    if points <= most_points + 1e-9:
        return []
    return [Violation(c.file, "max_drop", f"{drop_text(c.accuracy)}, limit {most_points:g}", points)]


def _pick(
    feasible: Sequence[Candidate], front: ParetoFront, n_feasible: int, constrained: bool
) -> tuple[Candidate, str]:
    """Return the pick among `feasible`, all measured or none, and why."""
    one, all_of = (
        (" that satisfies all constraints", " that satisfy all constraints") if constrained else ("", "")
    )
    best_first = sorted(
        [c for c in feasible if c.file in front.files] or feasible,  # too little may be known for any front
        key=lambda c: (-(c.accuracy.accuracy if c.accuracy else 0.0), -_speed(c), c.artifact.size_bytes),
    )
    top = best_first[0]
    if top.accuracy is None:
        equal = best_first
    else:
        reach = top.accuracy.accuracy
        equal = [c for c in best_first if c.accuracy is not None and c.accuracy.high >= reach]
    pick = min(equal, key=lambda c: (-_speed(c), c.artifact.size_bytes, c.file))
    if n_feasible == 1:
        return pick, f"It is the only file{one}{_speed_text(pick)}."
    if pick.accuracy is None or top.accuracy is None:
        return pick, (f"It is the fastest file{one}{_speed_text(pick)}; accuracy was not measured.")
    if pick is top:
        rest = " and the fastest of those equally accurate" if len(equal) > 1 else ""
        text = f"Of {n_feasible} files{all_of} it is the most accurate{rest}"
        return pick, f"{text}{_speed_text(pick)}."
    gap = 100 * (top.accuracy.accuracy - pick.accuracy.accuracy)
    return pick, (
        f"It is the fastest of the files whose accuracy is statistically indistinguishable from the best"
        f"{_speed_text(pick)}; {top.file} scored {gap:.1f} points higher on {top.accuracy.n} examples, "
        "which is within the 95 % interval."
    )


def _relaxation(good: Sequence[Candidate], violations: Sequence[Violation]) -> Relaxation | None:
    """Return the file with the fewest violations that another limit can remove; among those the fastest."""
    options = []
    for candidate in good:
        own = [violation for violation in violations if violation.file == candidate.file]
        if all(violation.needs is not None for violation in own):
            needed = tuple((v.constraint, v.needs) for v in own if v.needs is not None)
            options.append((len(needed), -_speed(candidate), candidate.file, needed))
    if not options:
        return None
    _, _, file, needed = min(options)
    return Relaxation(file, needed)


def _why_none(good: Sequence[Candidate], relax: Relaxation | None) -> str:
    if not good:
        return "No file passed the fidelity gate."
    if relax is None:
        return "No file satisfies all constraints, and the missing metrics were not measured."
    return f"No file satisfies all constraints. The nearest is {relax.file}, with {relax.text}."


def _notes(good: Sequence[Candidate], front: ParetoFront) -> tuple[str, ...]:
    notes = [f"{c.file}: {note}" for c in good for note in c.notes]
    if front.left_out and len(front.left_out) < len(good):
        notes.append(f"Not on the Pareto front because a metric is missing: {', '.join(front.left_out)}")
    if any(metric and metric.predicted for c in good for metric in (c.decode, c.ram, c.answer_s)):
        notes.append("~ is predicted, not measured; `arte-edge bench` on the device measures it.")
    return tuple(notes)


def _speed(c: Candidate) -> float:
    return c.decode.value if c.decode else 0.0


def _speed_text(c: Candidate) -> str:
    if c.decode is None:
        return ""
    return f", at {c.decode.value:.1f} tokens/s{' (predicted)' if c.decode.predicted else ''}"


def _with_unit(constraint: str, value: float) -> str:
    if constraint in ("max_ram", "max_size"):
        return size_text(value)
    return f"{value:.1f} tokens/s" if constraint == "min_decode" else f"{value:.1f} s"


def _as_option(constraint: str, value: float) -> str:
    """Return a value as an option takes it, rounded to the side that lets the file in."""
    if constraint in ("max_ram", "max_size"):
        return f"{math.ceil(value / 1e6)}MB"
    return f"{(math.floor if constraint == 'min_decode' else math.ceil)(value * 10) / 10:g}"
