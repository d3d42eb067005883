"""Compare two benchmark results: ratios of rates with intervals, paired answers, and what forbids it."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from arte_edge.errors import InputError
from arte_edge.results.accuracy import PairedAccuracy, paired_on_common
from arte_edge.results.rows import BENCH_NAME, QualityRow, Row, SpeedRow, parse_row, read_rows
from arte_edge.stats import Ratio, ratio

__all__ = ["Comparison", "QualityPair", "SpeedPair", "compare", "rows_of"]

_MEASURE = "Measure it first: arte-edge bench {path}"


def rows_of(path: Path) -> list[Row]:
    """Return the rows that `path` stands for, never none.

    Args:
        path: a .jsonl file of rows, a .json list of them, a folder with bench.jsonl in it or in
            its export folder, or one measured model, whose bench.jsonl lies beside it.

    Raises:
        InputError: nothing there, no results, or a damaged file.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix in (".jsonl", ".json"):
        rows = read_rows(path) if path.suffix == ".jsonl" else _json_rows(path)
        if not rows:
            raise InputError(f"{path}: holds no results", _MEASURE.format(path="MODEL"))
        return rows
    if path.is_dir():
        for place in (path, path / "export"):
            if rows := read_rows(place / BENCH_NAME):
                return rows
    beside = path.resolve()
    rows = [row for row in read_rows(beside.parent / BENCH_NAME) if row.model_filename == beside.name]
    if not rows:
        raise InputError(f"{path}: no results in {BENCH_NAME} here or beside it", _MEASURE.format(path=path))
    return rows


def _json_rows(path: Path) -> list[Row]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON", "Give what `bench -o json` printed.") from error
    if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
        raise InputError(f"{path}: not a list of results", "Give what `bench -o json` printed.")
    again = "Measure it again."
    return [parse_row(row, f"{path}: row {number}", again) for number, row in enumerate(document, 1)]


# What must be the same for two speeds to be about the same work, in the words of the flags.
_PROTOCOL: tuple[str, ...] = ("n_prompt", "n_gen", "n_depth", "n_threads", "type_k", "type_v")
# What a comparison in JSON says of each side.
_MODEL_KEYS: tuple[str, ...] = ("model_filename", "tensor_sha256", "runtime", "test_time")
_SPEED_KEYS: tuple[str, ...] = (
    *_MODEL_KEYS,
    *("status", "reason", "median_ts", "ttft_ms", "itl_p50_ms", "itl_p95_ms", "load_ms"),
    *("peak_rss_bytes", "energy_j", "energy_source", "throttled"),
)
_QUALITY_KEYS: tuple[str, ...] = (
    *_MODEL_KEYS,
    *("n", "right", "low", "high", "partial"),
    *("answer_seconds_p50", "answer_seconds_p95", "answer_tokens_mean"),
)


@dataclass(frozen=True)
class SpeedPair:
    """One test, measured twice."""

    a: SpeedRow
    b: SpeedRow

    @cached_property
    def rate(self) -> Ratio | None:
        """Return the ratio of the rates; None if a side did not end well."""
        return ratio(self.a.samples_ts, self.b.samples_ts) if self.a.ok and self.b.ok else None

    @property
    def verdict(self) -> str:
        """``faster``, ``slower`` or ``same`` (no difference beyond chance), ``?`` where nothing can be said."""
        if self.rate is None or self.rate.beyond_chance is None or self.throttled:
            return "?"
        return "same" if not self.rate.beyond_chance else "faster" if self.rate.value > 1 else "slower"

    @property
    def throttled(self) -> bool:
        """Some side was held back, so that the ratio says more of the cooling than of the files."""
        return bool(self.a.throttled or self.b.throttled)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            **{key: getattr(self.a, key) for key in ("test", *_PROTOCOL)},
            "a": {key: getattr(self.a, key) for key in _SPEED_KEYS},
            "b": {key: getattr(self.b, key) for key in _SPEED_KEYS},
            "ratio": None if self.rate is None else asdict(self.rate),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class QualityPair:
    """One task, answered twice."""

    a: QualityRow
    b: QualityRow

    @cached_property
    def paired(self) -> PairedAccuracy:
        """Return the accuracy of b, with a as its reference, on the examples that both answered."""
        a, b = self.a, self.b
        return paired_on_common(
            a.model_filename, a.answers, b.model_filename, b.answers, task=b.task, split=b.split
        )

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``same`` (exact McNemar test, p < 0.05)."""
        if not self.paired.significant:
            return "same"
        return "better" if (self.paired.difference or 0.0) > 0 else "worse"

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "task": self.a.task,
            "split": self.a.split,
            "a": {key: getattr(self.a, key) for key in _QUALITY_KEYS},
            "b": {key: getattr(self.b, key) for key in _QUALITY_KEYS},
            "paired": self.paired.model_dump(mode="json"),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Comparison:
    """What could be paired, what could not, and what is not the same on both sides."""

    speeds: tuple[SpeedPair, ...]
    qualities: tuple[QualityPair, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "speeds": [one.as_dict() for one in self.speeds],
            "qualities": [one.as_dict() for one in self.qualities],
            "only_a": self.only_a,
            "only_b": self.only_b,
            "differs": self.differs,
        }


def compare(a: Sequence[Row], b: Sequence[Row], *, force: bool = False) -> Comparison:
    """Pair the rows of `a` and `b`.

    Of several results of one test a sound one stands before one of a throttled machine and
    that before a failure, the whole of a split before a part, and then the newest. Speeds are paired by test, depth,
    threads, cache types and device; answers by task and split, on whatever machine. Rows
    of the same tensors go together, else of the same file name, else of the same type, else
    what is left if each side has one model; the same runtime before another one.

    Args:
        force: pair by the test's name alone where nothing else is the same, and say what differs.

    Raises:
        InputError: nothing on the two sides is comparable; says what differs.
    """
    speeds = [_newest(row for row in side if isinstance(row, SpeedRow)) for side in (a, b)]
    answers = [
        _newest(row for row in side if isinstance(row, QualityRow) and row.status == "ok" and row.answers)
        for side in (a, b)
    ]
    sides: list[list[Row]] = [[*speeds[i], *answers[i]] for i in range(2)]
    if not all(sides):
        raise InputError("One side holds no result", "Measure it first: arte-edge bench MODEL.")
    speed_pairs = [SpeedPair(x, y) for x, y in _pairs(speeds[0], speeds[1], _speed_protocol)]
    quality_pairs = [QualityPair(x, y) for x, y in _pairs(answers[0], answers[1], _quality_protocol)]
    differs: list[str] = []
    if not speed_pairs and not quality_pairs:
        differs = _differences(speeds, answers)
        if not force:
            raise InputError(
                "The two were not measured in the same way: " + "; ".join(differs),
                "Measure both alike, or give --force to see their speeds side by side all the same.",
            )
        speed_pairs = [SpeedPair(x, y) for x, y in _pairs(speeds[0], speeds[1], _forced_protocol)]
        if not speed_pairs:
            raise InputError("There is no test of one kind on both sides", "; ".join(differs))
    differs += [note for note in _notes(speed_pairs, quality_pairs) if note not in differs]
    paired = {id(one.a) for one in speed_pairs} | {id(one.b) for one in speed_pairs}
    paired |= {id(one.a) for one in quality_pairs} | {id(one.b) for one in quality_pairs}
    only_a, only_b = (tuple(_name(row) for row in side if id(row) not in paired) for side in sides)
    return Comparison(tuple(speed_pairs), tuple(quality_pairs), only_a, only_b, tuple(differs))


R = TypeVar("R", SpeedRow, QualityRow)


def _newest(rows: Iterable[R]) -> list[R]:
    """Return the soundest, then last row of each test of each model on each device, in the order of their first."""
    found: dict[Hashable, R] = {}
    for row in rows:
        what = _speed_protocol(row) if isinstance(row, SpeedRow) else _quality_protocol(row)
        model = row.tensor_sha256 or row.sha256 or row.model_filename
        key = model, _runtime_kind(row), row.n_threads, row.device.fingerprint, what
        if key not in found or _soundness(row) >= _soundness(found[key]):
            found[key] = row
    return list(found.values())


def _soundness(row: Row) -> int:
    """Return what goes before what: sound, throttled, failed; all of a split, a part of it."""
    if isinstance(row, QualityRow):
        return 0 if row.partial else 1
    return 0 if not row.ok else 1 if row.throttled else 2


def _speed_protocol(row: SpeedRow) -> Hashable:
    return (row.device.fingerprint, *(getattr(row, key) for key in _PROTOCOL))


def _forced_protocol(row: SpeedRow) -> Hashable:
    return ("pp" if row.n_prompt else "") + ("tg" if row.n_gen else "")


def _quality_protocol(row: QualityRow) -> Hashable:
    return (row.task_sha256, row.split)


def _runtime_kind(row: Row) -> str:
    return row.runtime.partition(" ")[0]


def _pairs(a: Sequence[R], b: Sequence[R], protocol: Callable[[R], Hashable]) -> list[tuple[R, R]]:
    """Return pairs of one protocol, each row in one pair at most, the surest matches first, in the order of `a`."""
    single = all(len({row.model_filename for row in side}) == 1 for side in (a, b))
    ways: tuple[Callable[[R, R], bool], ...] = (
        lambda x, y: bool(x.tensor_sha256) and x.tensor_sha256 == y.tensor_sha256,
        lambda x, y: x.model_filename == y.model_filename,
        lambda x, y: (x.format, x.quantization) == (y.format, y.quantization),
        lambda x, y: single,
    )
    partner: dict[int, int] = {}
    for same_model in ways:
        for same_runtime in (True, False):
            for i, x in enumerate(a):
                for j, y in enumerate(b):
                    if i in partner or j in partner.values():
                        continue
                    if same_runtime and _runtime_kind(x) != _runtime_kind(y):
                        continue
                    if protocol(x) == protocol(y) and same_model(x, y):
                        partner[i] = j
    return [(a[i], b[partner[i]]) for i in sorted(partner)]


def _differences(speeds: Sequence[Sequence[SpeedRow]], answers: Sequence[Sequence[QualityRow]]) -> list[str]:
    """Return in words what is not the same on the two sides and keeps them from being paired."""
    found: list[str] = []
    if all(speeds):
        for key in _PROTOCOL:
            first, second = (sorted({getattr(row, key) for row in side}) for side in speeds)
            if not set(first) & set(second):
                found.append(f"{key} {_listed(first)} against {_listed(second)}")
        if not {row.device.fingerprint for row in speeds[0]} & {row.device.fingerprint for row in speeds[1]}:
            names = [speeds[i][0].device for i in range(2)]
            shown = [name.profile or name.cpu or "?" for name in names]
            found.append(
                f"device {shown[0]} ({names[0].fingerprint}) against {shown[1]} ({names[1].fingerprint})"
            )
    if all(answers):
        for what in ("task", "task_sha256", "split"):
            first, second = (sorted({str(getattr(row, what)) for row in side}) for side in answers)
            if not set(first) & set(second):
                found.append(
                    f"{what} {_listed(t[:16] for t in first)} against {_listed(t[:16] for t in second)}"
                )
    if not found and not (all(speeds) or all(answers)):
        found.append("one side holds speeds alone, the other answers alone")
    return found or ["other tests, or other models"]


def _notes(speeds: Sequence[SpeedPair], answers: Sequence[QualityPair]) -> list[str]:
    """Return what is not the same within the pairs, each once."""
    found: dict[str, None] = {}
    for one in speeds:
        for key in ("runtime", "build_commit", "n_batch", "n_ubatch", "flash_attn", *_PROTOCOL):
            first, second = getattr(one.a, key), getattr(one.b, key)
            if first != second:
                found[f"{key} {first} against {second}"] = None
        for key in ("governor", "power", "os"):
            first, second = getattr(one.a.device, key), getattr(one.b.device, key)
            if first != second and first and second:
                found[f"{key} {first} against {second}"] = None
        if one.throttled:
            sides = [name for name, row in (("A", one.a), ("B", one.b)) if row.throttled]
            found[f"{one.a.test}: {' and '.join(sides)} throttled"] = None
    for pair_ in answers:
        if pair_.paired.n < max(pair_.a.n, pair_.b.n):
            found[f"{pair_.a.task}: compared on the {pair_.paired.n} examples that both answered"] = None
    return list(found)


def _listed(values: Iterable[Any]) -> str:
    return ",".join(map(str, values))


def _name(row: Row) -> str:
    if isinstance(row, SpeedRow):
        return f"{row.model_filename} {row.test}, {row.n_threads} threads"
    return f"{row.model_filename} {row.task} ({row.split})"
