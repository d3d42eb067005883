"""The measured speed of one file on one device, from ``student.json`` and the raw rows of ``bench.jsonl``.

Rows are matched by the hash of the tensor data. Measurements of a throttled device, beside other work, or under an
emulator are left out. Of several measurements of a file (threads, runtimes) the one with the highest decode rate
counts, with its own prefill rate and memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from arte_edge.results.merge import belongs_to
from arte_edge.results.rows import Row, SpeedRow, disturbance, left_out_notes
from arte_edge.results.student_json import Artifact


@dataclass(frozen=True)
class Measured:
    """One measurement of one file: rates in tokens/s, memory in bytes, and what ran it."""

    decode: float | None
    prefill: float | None
    ram_bytes: int | None
    source: str


Found = tuple[Measured | None, tuple[str, ...]]


def measured(artifact: Artifact, names: frozenset[str], rows: Sequence[Row] = ()) -> Found:
    """Return the measurement that counts, None if there is none; and a sentence for those that were left out."""
    speeds = [speed for speed in artifact.speeds if names & speed.names]
    found = [
        Measured(s.decode_tokens_per_s, s.prefill_tokens_per_s, s.peak_rss_bytes, _source(s.runtime, s.threads))
        for s in speeds
        if not disturbance(s)
    ]
    mine = [row for row in _speed_rows(rows, names) if belongs_to(row, artifact)]
    best, left_out = _best(mine, found)
    # A row of bench.jsonl is merged into student.json too: it must not count twice.
    kinds = left_out if mine else [kind for speed in speeds for kind in speed.disturbances]
    return best, left_out_notes(kinds)


def best_of_rows(rows: Sequence[Row], file: str, names: frozenset[str]) -> Found:
    """Return the same of a file by its name or quantization type, where its hash is unknown."""
    mine = [row for row in _speed_rows(rows, names) if file in (row.quantization, row.model_filename)]
    best, left_out = _best(mine, [])
    return best, left_out_notes(left_out)


def _best(rows: Sequence[SpeedRow], found: Sequence[Measured]) -> tuple[Measured | None, list[str]]:
    """Return the fastest of `found` and the valid rows; and what disturbed others, but for a rate measured again."""

    def test(row: SpeedRow) -> tuple[str | int, ...]:
        return row.model_filename, row.runtime, row.n_threads, row.n_prompt, row.n_gen, row.n_depth

    valid = [row for row in rows if not disturbance(row)]
    again = set(map(test, valid))
    kinds = [disturbance(row) for row in rows if not (row.contended and test(row) in again)]
    best = max([*found, *_from_rows(valid)], key=lambda one: one.decode or 0.0, default=None)
    return best, [kind for kind in kinds if kind]


def _from_rows(rows: Sequence[SpeedRow]) -> list[Measured]:
    """Return one measurement for each runtime and number of threads; an empty cache first (``n_depth`` least)."""
    groups: dict[tuple[str, int], list[SpeedRow]] = defaultdict(list)
    for row in rows:
        groups[row.runtime, row.n_threads].append(row)
    found = []
    for (runtime, threads), group in groups.items():
        depth = min(row.n_depth for row in group)
        writes = [row.median_ts or row.avg_ts for row in group if row.n_gen and row.n_depth == depth]
        reads = [row.median_ts or row.avg_ts for row in group if not row.n_gen and row.n_depth == depth]
        ram = [row.peak_rss_bytes for row in group if row.peak_rss_bytes is not None]
        decode, prefill = median(writes) if writes else None, median(reads) if reads else None
        found.append(Measured(decode, prefill, max(ram, default=None), _source(runtime, threads)))
    return found


def _speed_rows(rows: Sequence[Row], names: frozenset[str]) -> list[SpeedRow]:
    """Return the valid tests on the device, none under an emulator."""
    tests = (row for row in rows if isinstance(row, SpeedRow) and row.ok)
    return [row for row in tests if "qemu" not in row.device.virtual and names & row.device.names]


def _source(runtime: str, threads: int) -> str:
    return f"{runtime}, {threads} thread{'s' * (threads != 1)}"
