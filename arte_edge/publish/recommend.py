"""Which file to take on a device, and why: the wishes, the front, the pick.

Of the files that keep every wish and are on the front, the pick is the fastest of those that
are as accurate as the best, as far as anyone can tell: their 95 % interval reaches up to the best
file's accuracy. With few examples that is most of them, and speed decides. A file whose speed is
only predicted is not picked before one that was measured, however fast it should be.

``max_drop`` is judged on the paired difference from the 16-bit student as it was measured, whether
or not it is beyond chance; what chance alone may do is said beside it. A wish that cannot be
judged, because nothing was measured or predicted, counts as not kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from arte_edge.device.profile import Profile
from arte_edge.publish.front import Candidate, Figure, Front, front_of
from arte_edge.publish.rates import Predictor, candidates
from arte_edge.publish.wants import Wants, size_text
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.rows import Row
from arte_edge.results.student_json import StudentFile

__all__ = ["Drop", "Recommendation", "Relax", "device_names", "drop_text", "recommend"]


@dataclass(frozen=True)
class Drop:
    """A file that is out: by which wish, and why in words. `needs`: the value that would let it in."""

    file: str
    wish: str  # max_ram, min_decode, max_drop, max_size, max_answer_seconds, gate
    reason: str
    needs: float | None = None


@dataclass(frozen=True)
class Relax:
    """The least change of one wish, or of several, that lets one file in."""

    file: str
    wishes: tuple[tuple[str, float], ...]  # wish and the value it would need

    @property
    def text(self) -> str:
        return " and ".join(
            f"--{wish.replace('_', '-')} {_given(wish, value)}" for wish, value in self.wishes
        )


@dataclass(frozen=True)
class Recommendation:
    """The answer. `pick` None: no file keeps every wish, and `relax` says what would help."""

    device: str
    candidates: tuple[Candidate, ...]
    front: Front  # of the files that passed the gate
    drops: tuple[Drop, ...]
    pick: str | None
    why: str
    relax: Relax | None = None
    notes: tuple[str, ...] = ()
    model: str = ""  # which every file's name begins with

    def candidate(self, file: str) -> Candidate:
        return next(c for c in self.candidates if c.file == file)


def device_names(device: Profile) -> frozenset[str]:
    """Return the names under which results of `device` may stand: its own, and the profile it is based on."""
    return frozenset(name for name in (device.name, device.base) if name)


def recommend(
    student: StudentFile,
    device: Profile,
    wants: Wants,
    *,
    rows: Sequence[Row] = (),
    predict: Predictor | None = None,
    names: frozenset[str] | None = None,
) -> Recommendation:
    """Return the file of `student` to take on `device`.

    Args:
        rows: of ``bench.jsonl``; the merged figures of `student` count without them.
        predict: what to say of a file that was not measured there; None: nothing.
        names: under which results of the device stand, fingerprints included; its own unless given.
    """
    found = candidates(student, names or device_names(device), wants, rows, predict)
    good = [c for c in found if c.artifact.status == "ok"]
    drops = [
        Drop(c.file, "gate", "rejected by the fidelity gate") for c in found if c.artifact.status != "ok"
    ]
    for candidate in good:
        drops += _drops(candidate, wants)
    out = {drop.file for drop in drops}
    kept = [c for c in good if c.file not in out]
    front = front_of(good)
    name, model = device.name or device.title, student.student.name
    notes = _notes(good, front)
    if not kept:
        relax = _relax(good, drops)
        return Recommendation(
            name, tuple(found), front, tuple(drops), None, _none(good, relax), relax, notes, model
        )
    sure = [c for c in kept if c.decode and not c.decode.predicted] or kept
    pick, why = _pick(sure, front_of(sure), len(kept))
    notes += tuple(
        f"{c.file} may be faster: {c.decode.value:.1f} tokens/s predicted; measure it."
        for c in kept
        if c not in sure and c.decode and c.decode.value > _speed(pick)
    )
    return Recommendation(name, tuple(found), front, tuple(drops), pick.file, why, None, notes, model)


def _drops(c: Candidate, wants: Wants) -> list[Drop]:
    """Return the wishes that a file does not keep."""
    size = Figure(float(c.artifact.size_bytes), "measured")
    limits = (
        ("max_size", wants.max_size_bytes, size, "size", 1),
        ("max_ram", wants.max_ram_bytes, c.ram, "memory", 1),
        ("max_answer_seconds", wants.max_answer_seconds, c.answer_s, "an answer", 1),
        ("min_decode", wants.min_decode, c.decode, "decode", -1),
    )
    found = []
    for wish, limit, figure, what, sign in limits:
        if limit is None:
            continue
        if figure is None:
            found.append(Drop(c.file, wish, f"{what}: neither measured nor predicted here"))
        elif sign * figure.value > sign * limit:
            word = "predicted " if figure.predicted else ""
            text = f"{what} {word}{_shown(wish, figure.value)}, wanted {_shown(wish, limit)}"
            found.append(Drop(c.file, wish, text, figure.value))
    if wants.max_drop is not None:
        found += _accuracy_drop(c, wants.max_drop)
    return found


def _accuracy_drop(c: Candidate, most_points: float) -> list[Drop]:
    if c.accuracy is None or c.accuracy.difference is None:
        return [Drop(c.file, "max_drop", "accuracy beside the student's was not measured")]
    points = -100 * c.accuracy.difference
    if points <= most_points + 1e-9:
        return []
    reason = f"{drop_text(c.accuracy)}, wanted at most {most_points:g}"
    return [Drop(c.file, "max_drop", reason, points)]


def drop_text(accuracy: PairedAccuracy) -> str:
    """Return the paired difference from the 16-bit student in points, and whether it is beyond chance."""
    if accuracy.difference is None:
        return "difference from the student not measured"
    points = 100 * accuracy.difference
    text = f"{-points:.1f} points lost" if points < 0 else f"{points:+.1f} points"
    if accuracy.difference_low is not None and accuracy.difference_high is not None:
        text += f" ({100 * accuracy.difference_low:+.1f} to {100 * accuracy.difference_high:+.1f}"
        text += "" if accuracy.p_value is None else f", p = {accuracy.p_value:.2g}"
        text += f", n = {accuracy.n})"
    if accuracy.p_value is not None and points:
        text += ", beyond chance" if accuracy.p_value < 0.05 else ", may be chance"
    return text


def _pick(kept: Sequence[Candidate], front: Front, n_kept: int) -> tuple[Candidate, str]:
    """Return the pick among `kept`, all measured or none, and why."""
    best_first = sorted(
        [c for c in kept if c.file in front.files] or kept,  # too little may be known for any front
        key=lambda c: (-(c.accuracy.accuracy if c.accuracy else 0.0), -_speed(c), c.artifact.size_bytes),
    )
    top = best_first[0]
    if top.accuracy is None:
        equal = best_first
    else:
        reach = top.accuracy.accuracy
        equal = [c for c in best_first if c.accuracy is not None and c.accuracy.high >= reach]
    pick = min(equal, key=lambda c: (-_speed(c), c.artifact.size_bytes, c.file))
    if n_kept == 1:
        return pick, f"It is the only file that keeps every wish{_speed_text(pick)}."
    if pick.accuracy is None or top.accuracy is None:
        return pick, f"It is the fastest that keeps every wish{_speed_text(pick)}; accuracy was not measured."
    if pick is top:
        others = "it is the most accurate" + (" and the fastest of its equals" if len(equal) > 1 else "")
        return pick, f"Of {n_kept} files that keep every wish {others}{_speed_text(pick)}."
    gap = 100 * (top.accuracy.accuracy - pick.accuracy.accuracy)
    return pick, (
        f"It is the fastest of those whose accuracy cannot be told from the best{_speed_text(pick)}; "
        f"{top.file} had {gap:.1f} points more of {top.accuracy.n} examples, which its interval allows for."
    )


def _relax(good: Sequence[Candidate], drops: Sequence[Drop]) -> Relax | None:
    """Return the file with the fewest unkept wishes that numbers can mend; among those the fastest."""
    options = []
    for candidate in good:
        mine = [drop for drop in drops if drop.file == candidate.file]
        if all(drop.needs is not None for drop in mine):
            wishes = tuple((drop.wish, drop.needs) for drop in mine if drop.needs is not None)
            options.append((len(wishes), -_speed(candidate), candidate.file, wishes))
    if not options:
        return None
    _, _, file, wishes = min(options)
    return Relax(file, wishes)


def _none(good: Sequence[Candidate], relax: Relax | None) -> str:
    if not good:
        return "No file passed the fidelity gate."
    if relax is None:
        return "No file keeps every wish, and what is missing of each was not measured."
    return f"No file keeps every wish. The nearest is {relax.file}, with {relax.text}."


def _notes(good: Sequence[Candidate], front: Front) -> tuple[str, ...]:
    notes = [f"{c.file}: {note}" for c in good for note in c.notes]
    if front.left_out and len(front.left_out) < len(good):
        notes.append(
            f"Not compared on the front, because not everything is known: {', '.join(front.left_out)}"
        )
    if any(figure and figure.predicted for c in good for figure in (c.decode, c.ram, c.answer_s)):
        notes.append("~ is predicted, not measured; `arte-edge bench` on the device measures it.")
    return tuple(notes)


def _speed(c: Candidate) -> float:
    return c.decode.value if c.decode else 0.0


def _speed_text(c: Candidate) -> str:
    if c.decode is None:
        return ""
    return f", at {c.decode.value:.1f} tokens/s{' (predicted)' if c.decode.predicted else ''}"


def _shown(wish: str, value: float) -> str:
    if wish in ("max_ram", "max_size"):
        return size_text(value)
    return f"{value:.1f} tokens/s" if wish == "min_decode" else f"{value:.1f} s"


def _given(wish: str, value: float) -> str:
    """Return a value as an option takes it, rounded to the side that lets the file in."""
    if wish in ("max_ram", "max_size"):
        return f"{math.ceil(value / 1e6)}MB"
    return f"{(math.floor if wish == 'min_decode' else math.ceil)(value * 10) / 10:g}"
