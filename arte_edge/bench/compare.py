"""Compare two benchmark results: ratios of rates with intervals, paired answers, and differences in the protocol."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from arte_edge.errors import InputError
from arte_edge.files import json_loads
from arte_edge.results.accuracy import PairedAccuracy, paired_on_common
from arte_edge.results.rows import BENCH_NAME, QualityRow, Row, SpeedRow, disturbance, parse_row, read_rows
from arte_edge.stats import Ratio, ratio

_MEASURE = "Measure it first: arte-edge bench {path}"


def rows_of(path: Path) -> list[Row]:
    """Return the rows of `path`, at least one.

    Args:
        path: a .jsonl file of rows, a .json list of them, a folder with bench.jsonl in it or in
            its export folder, or one measured model beside its bench.jsonl.

    Raises InputError: no such file, no results, or a damaged file.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix in (".jsonl", ".json"):
        rows = read_rows(path) if path.suffix == ".jsonl" else _json_rows(path)
        if not rows:
            raise InputError(f"{path}: contains no results", _MEASURE.format(path="MODEL"))
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
        document = json_loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON", "Give what `bench -o json` printed.") from error
    if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
        raise InputError(f"{path}: not a list of results", "Give what `bench -o json` printed.")
    again = "Measure it again."
    return [parse_row(row, f"{path}: row {number}", again) for number, row in enumerate(document, 1)]


# Must be equal for two speeds to be comparable.
_PROTOCOL = ("n_prompt", "n_gen", "n_depth", "n_threads", "type_k", "type_v")
# The keys of each side of a comparison in JSON.
_MODEL_KEYS = ("model_filename", "tensor_sha256", "runtime", "test_time")
_SPEED_KEYS = (
    *_MODEL_KEYS,
    *("status", "reason", "median_ts", "ttft_ms", "itl_p50_ms", "itl_p95_ms", "load_ms"),
    *("peak_rss_bytes", "energy_j", "energy_source", "throttled", "contended"),
)
_QUALITY_KEYS = (
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
        """The ratio of the rates; None if a side failed."""
        return ratio(self.a.samples_ts, self.b.samples_ts) if self.a.ok and self.b.ok else None

    @property
    def verdict(self) -> str:
        """``faster``, ``slower``, ``same`` (no significant difference), or ``?`` (unknown)."""
        if self.rate is None or self.rate.beyond_chance is None or self.disturbed:
            return "?"
        return "same" if not self.rate.beyond_chance else "faster" if self.rate.value > 1 else "slower"

    @property
    def disturbed(self) -> str:
        """What disturbed a side, so that the ratio is one of the cooling or of other work; empty: nothing."""
        return disturbance(self.a) or disturbance(self.b)

    def as_dict(self) -> dict[str, Any]:
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
        """The accuracy of b, with a as its reference, on the examples that both answered."""
        a, b = self.a, self.b
        return paired_on_common(a.model_filename, a.answers, b.model_filename, b.answers, task=b.task, split=b.split)

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``same`` (exact McNemar test, p < 0.05)."""
        if not self.paired.significant:
            return "same"
        return "better" if (self.paired.difference or 0.0) > 0 else "worse"

    def as_dict(self) -> dict[str, Any]:
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
    """The paired results, the names of unpaired ones, and the differences in the protocol."""

    speeds: tuple[SpeedPair, ...]
    qualities: tuple[QualityPair, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        speeds = [one.as_dict() for one in self.speeds]
        return vars(self) | {"speeds": speeds, "qualities": [one.as_dict() for one in self.qualities]}


def compare(a: Sequence[Row], b: Sequence[Row], *, force: bool = False) -> Comparison:
    """Pair the rows of `a` and `b`.

    Of several results of one test, a valid one is preferred to a disturbed one and that to a failure, a whole
    split to a part of it, and then the newest. Speeds are paired by test, depth, threads, cache types and device;
    answers by task and split, on any device. Rows of the same tensors are paired first, then those of the same
    file name, of the same type, and the rest if each side has one model; the same runtime before another one.

    Args:
        force: pair by the kind of test alone where nothing else is equal, and list the differences.

    Raises InputError: nothing is comparable; lists the differences.
    """
    speeds = [_best(row for row in side if isinstance(row, SpeedRow)) for side in (a, b)]
    answers = [
        _best(row for row in side if isinstance(row, QualityRow) and row.status == "ok" and row.answers)
        for side in (a, b)
    ]
    sides: list[list[Row]] = [[*speeds[i], *answers[i]] for i in range(2)]
    if not all(sides):
        raise InputError("One side contains no result", "Measure it first: arte-edge bench MODEL.")
    speed_pairs = [SpeedPair(x, y) for x, y in _pairs(speeds[0], speeds[1], _speed_protocol)]
    quality_pairs = [QualityPair(x, y) for x, y in _pairs(answers[0], answers[1], _quality_protocol)]
    differs: list[str] = []
    if not speed_pairs and not quality_pairs:
        differs = _differences(speeds, answers)
        if not force:
            raise InputError(
                "The two were measured differently: " + "; ".join(differs),
                "Measure both with the same settings, or compare their speeds anyway with --force.",
            )
        speed_pairs = [SpeedPair(x, y) for x, y in _pairs(speeds[0], speeds[1], lambda row: bool(row.n_prompt))]
        if not speed_pairs:
            raise InputError("No kind of test is on both sides", "; ".join(differs))
    differs += [note for note in _notes(speed_pairs, quality_pairs) if note not in differs]
    pairs: list[SpeedPair | QualityPair] = [*speed_pairs, *quality_pairs]
    paired = {id(row) for one in pairs for row in (one.a, one.b)}
    only_a, only_b = (tuple(_name(row) for row in side if id(row) not in paired) for side in sides)
    return Comparison(tuple(speed_pairs), tuple(quality_pairs), only_a, only_b, tuple(differs))


R = TypeVar("R", SpeedRow, QualityRow)


def _best(rows: Iterable[R]) -> list[R]:
    """Return the best, then last row of each test of each model on each device, in order of first appearance."""
    found: dict[Hashable, R] = {}
    for row in rows:
        what = _speed_protocol(row) if isinstance(row, SpeedRow) else _quality_protocol(row)
        model = row.tensor_sha256 or row.sha256 or row.model_filename
        key = model, _runtime_kind(row), row.n_threads, row.device.fingerprint, what
        if key not in found or _validity(row) >= _validity(found[key]):
            found[key] = row
    return list(found.values())


def _validity(row: Row) -> int:
    """Return the rank of a row: valid, disturbed, failed; a whole split, a part of it."""
    if isinstance(row, QualityRow):
        return 0 if row.partial else 1
    return 0 if not row.ok else 1 if disturbance(row) else 2


def _speed_protocol(row: SpeedRow) -> Hashable:
    return (row.device.fingerprint, *(getattr(row, key) for key in _PROTOCOL))


def _quality_protocol(row: QualityRow) -> Hashable:
    return (row.task_sha256, row.split)


def _runtime_kind(row: Row) -> str:
    return row.runtime.partition(" ")[0]


def _pairs(a: Sequence[R], b: Sequence[R], protocol: Callable[[R], Hashable]) -> list[tuple[R, R]]:
    """Return pairs of one protocol, each row in at most one pair, the closest matches first, in the order of `a`."""
    single = all(len({row.model_filename for row in side}) == 1 for side in (a, b))
    matches: tuple[Callable[[R, R], bool], ...] = (
        lambda x, y: bool(x.tensor_sha256) and x.tensor_sha256 == y.tensor_sha256,
        lambda x, y: x.model_filename == y.model_filename,
        lambda x, y: (x.format, x.quantization) == (y.format, y.quantization),
        lambda x, y: single,
    )
    partner: dict[int, int] = {}
    for same_model, same_runtime in product(matches, (True, False)):
        for (i, x), (j, y) in product(enumerate(a), enumerate(b)):
            if i in partner or j in partner.values():
                continue
            if same_runtime and _runtime_kind(x) != _runtime_kind(y):
                continue
            if protocol(x) == protocol(y) and same_model(x, y):
                partner[i] = j
    return [(a[i], b[partner[i]]) for i in sorted(partner)]


def _differences(speeds: Sequence[Sequence[SpeedRow]], answers: Sequence[Sequence[QualityRow]]) -> list[str]:
    """Return the differences that prevent pairing the two sides."""
    found: list[str] = []

    def compare_key(key: str, sides: Sequence[Sequence[Row]]) -> None:
        first, second = ({getattr(row, key) for row in side} for side in sides)
        if not first & second:
            texts = [",".join(str(value)[:16] for value in sorted(values)) for values in (first, second)]
            found.append(f"{key} {texts[0]} against {texts[1]}")

    if all(speeds):
        for key in _PROTOCOL:
            compare_key(key, speeds)
        if not {row.device.fingerprint for row in speeds[0]} & {row.device.fingerprint for row in speeds[1]}:
            devices = [side[0].device for side in speeds]
            names = [f"{one.profile or one.cpu or '?'} ({one.fingerprint})" for one in devices]
            found.append(f"device {names[0]} against {names[1]}")
    if all(answers):
        for key in ("task", "task_sha256", "split"):
            compare_key(key, answers)
    if not found and not (all(speeds) or all(answers)):
        found.append("one side contains only speeds, the other only answers")
    return found or ["other tests, or other models"]


def _notes(speeds: Sequence[SpeedPair], answers: Sequence[QualityPair]) -> list[str]:
    """Return the differences within the pairs, each once."""
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
        for name, row in (("A", one.a), ("B", one.b)):
            if why := disturbance(row):
                found[f"{one.a.test}: {name} {why}"] = None
    for answered in answers:
        if answered.paired.n < max(answered.a.n, answered.b.n):
            found[f"{answered.a.task}: compared on the {answered.paired.n} examples that both answered"] = None
    return list(found)


def _name(row: Row) -> str:
    if isinstance(row, SpeedRow):
        return f"{row.model_filename} {row.test}, {row.n_threads} threads"
    return f"{row.model_filename} {row.task} ({row.split})"
