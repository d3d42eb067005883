"""Which file to use on a device, and why: constraints, Pareto front, choice.

Of the files that satisfy all constraints and are on the front, the choice is the fastest of those
whose accuracy is statistically indistinguishable from the best: their 95 % interval reaches the best
file's accuracy. With few examples that is most of them, and speed decides. A file whose speed is only
predicted is never preferred to one that was measured, however fast the prediction.

``max_drop`` is compared with the measured paired difference from the 16-bit student, significant or not; the message
says which. A constraint that cannot be checked, because nothing was measured or predicted, counts as not satisfied.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from arte_edge.cache import megabytes
from arte_edge.device.profiles import Profile
from arte_edge.device.roofline import Predictor
from arte_edge.errors import InputError
from arte_edge.publish.recommend.candidates import Candidate, Constraints, Metric, ParetoFront, candidates, pareto_front
from arte_edge.publish.recommend.recommendation import Recommendation, Relaxation, Violation, drop_text
from arte_edge.results.rows import Row
from arte_edge.results.student_json import StudentFile, find_export, read_bench, read_export

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(?:([KMGT])(?:(I)?B)?|B)?\s*", re.IGNORECASE)


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

    Raises InputError: no export there, an unknown device, or not a size.
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
    speeds = (speed for artifact in student.artifacts for speed in artifact.speeds)
    measured = set[str]().union(*(speed.names for speed in speeds), *(row.device.names for row in rows))
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
        names = frozenset(facts.names)
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
    violations += [violation for c in good for violation in _violations(c, constraints)]
    excluded = {violation.file for violation in violations}
    feasible = [c for c in good if c.file not in excluded]
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
        if not good:
            return replace(result, why="No file passed the fidelity gate.")
        if (relax := _relaxation(good, violations)) is None:
            why = "No file satisfies all constraints, and the missing metrics were not measured."
        else:
            why = f"No file satisfies all constraints. The nearest is {relax.file}, with {relax.text}."
        return replace(result, why=why, relax=relax)
    sure = [c for c in feasible if c.decode and not c.decode.predicted] or feasible
    pick, why = _pick(sure, pareto_front(sure), len(feasible), constraints.any)
    faster = tuple(
        f"{c.file} may be faster: {c.decode.value:.1f} tokens/s predicted; measure it."
        for c in feasible
        if c not in sure and c.decode and c.decode.value > pick.speed
    )
    return replace(result, pick=pick.file, why=why, notes=result.notes + faster)


def _violations(c: Candidate, constraints: Constraints) -> list[Violation]:
    """Return the constraints that a file does not satisfy."""
    size = Metric(float(c.artifact.size_bytes), "measured")
    limits = (
        ("max_size", constraints.max_size_bytes, size, "size", 1, megabytes),
        ("max_ram", constraints.max_ram_bytes, c.ram, "memory", 1, megabytes),
        ("max_answer_seconds", constraints.max_answer_seconds, c.answer_s, "answer time", 1, "{:.1f} s".format),
        ("min_decode", constraints.min_decode, c.decode, "decode rate", -1, "{:.1f} tokens/s".format),
    )
    found = []
    for name, limit, metric, what, sign, text in limits:
        if limit is None:
            continue
        if metric is None:
            found.append(Violation(c.file, name, f"{what} was neither measured nor predicted"))
        elif sign * metric.value > sign * limit:
            predicted = "predicted " if metric.predicted else ""
            reason = f"{what} {predicted}{text(metric.value)}, limit {text(limit)}"
            found.append(Violation(c.file, name, reason, metric.value))
    if (most_points := constraints.max_drop) is not None:
        if (change := c.change) is None or change.difference is None:
            found.append(Violation(c.file, "max_drop", "accuracy was not measured against the student's"))
        elif (points := -100 * change.difference) > most_points + 1e-9:
            reason = f"{drop_text(change)}, limit {most_points:g}"
            found.append(Violation(c.file, "max_drop", reason, points))
    return found


def _pick(
    feasible: Sequence[Candidate], front: ParetoFront, n_feasible: int, constrained: bool
) -> tuple[Candidate, str]:
    """Return the pick among `feasible`, all measured or none, and why."""
    one = " that satisfies all constraints" if constrained else ""
    all_of = " that satisfy all constraints" if constrained else ""
    best_first = sorted(
        [c for c in feasible if c.file in front.files] or feasible,  # too little may be known for any front
        key=lambda c: (-(c.accuracy.accuracy if c.accuracy else 0.0), -c.speed, c.artifact.size_bytes),
    )
    top, equal = best_first[0], best_first
    if top.accuracy is not None:
        best = top.accuracy.accuracy
        equal = [c for c in best_first if c.accuracy is not None and c.accuracy.high >= best]
    pick = min(equal, key=lambda c: (-c.speed, c.artifact.size_bytes, c.file))
    rate = ""
    if pick.decode is not None:
        rate = f", at {pick.decode.value:.1f} tokens/s{' (predicted)' if pick.decode.predicted else ''}"
    if n_feasible == 1:
        return pick, f"It is the only file{one}{rate}."
    if pick.accuracy is None or top.accuracy is None:
        return pick, f"It is the fastest file{one}{rate}; accuracy was not measured."
    if pick is top:
        rest = " and the fastest of those equally accurate" if len(equal) > 1 else ""
        return pick, f"Of {n_feasible} files{all_of} it is the most accurate{rest}{rate}."
    gap = 100 * (top.accuracy.accuracy - pick.accuracy.accuracy)
    return pick, (
        f"It is the fastest of the files whose accuracy is statistically indistinguishable from the best"
        f"{rate}; {top.file} scored {gap:.1f} points higher on {top.accuracy.n} examples, "
        "which is within the 95 % interval."
    )


def _relaxation(good: Sequence[Candidate], violations: Sequence[Violation]) -> Relaxation | None:
    """Return the file with the fewest violations that another limit can remove; among those the fastest."""
    options = []
    for candidate in good:
        own = [violation for violation in violations if violation.file == candidate.file]
        if all(violation.needs is not None for violation in own):
            needed = tuple((v.constraint, v.needs) for v in own if v.needs is not None)
            options.append((len(needed), -candidate.speed, candidate.file, needed))
    if not options:
        return None
    _, _, file, needed = min(options)
    return Relaxation(file, needed)


def _notes(good: Sequence[Candidate], front: ParetoFront) -> tuple[str, ...]:
    notes = [f"{c.file}: {note}" for c in good for note in c.notes]
    if front.left_out and len(front.left_out) < len(good):
        notes.append(f"Not on the Pareto front because a metric is missing: {', '.join(front.left_out)}")
    if any(metric and metric.predicted for c in good for metric in (c.decode, c.ram, c.answer_s)):
        notes.append("~ is predicted, not measured; `arte-edge bench` on the device measures it.")
    return tuple(notes)


def parse_size(text: str, what: str) -> int:
    """Return bytes (``1GB`` and ``1G`` are decimal, ``1GiB`` is binary); InputError names `what`."""
    found = _SIZE.fullmatch(text)
    power = " KMGT".index((found[2] or " ").upper()) if found else 0
    size_bytes = round(float(found[1]) * (1024 if found[3] else 1000) ** power) if found else 0
    if size_bytes < 1:
        raise InputError(f"{what} {text}: not a size", "Write it as 1GB, 512MiB or 800000000.")
    return size_bytes
