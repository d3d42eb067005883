"""The prefer stage with adaptive scoring: fewer calls, the ends of the full grid, off: as before."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from arte_edge.distill.config import Prefer
from arte_edge.distill.preference.scoring import is_adaptive
from arte_edge.distill.stages.calibrate import calibrate
from arte_edge.distill.stages.elicit import elicit
from arte_edge.distill.stages.prefer import prefer
from arte_edge.runtimes.completion import Completion, Request, Sampling

K = 24


def number(text: str) -> float:
    """Return a number from 0 to 1 that only `text` decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


@pytest.fixture
def uneven(house: Any) -> Any:
    """A house whose rationales differ, and whose student learns more from some than from others."""

    def complete(requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        house.teacher.calls += len(requests)
        return [
            Completion(
                house.teacher.drafts(r.sample)
                if r.prompt.endswith("<input>")
                else f"Reason {number(r.prompt):.6f}. <ans>{house.teacher.answer(r.prompt)}</ans>",
                "stop",
                9,
                7,
            )
            for r in requests
        ]

    def choose_each(prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        house.student.calls += len(prompts)
        rows = []
        for prompt, own in zip(prompts, choices, strict=True):
            shown, asked = prompt.rpartition("Question:")[::2]
            quality = number(shown) - 0.5 + 0.2 * (number(asked) - 0.5)
            right = "odd" if int(asked.split("Is ")[1].split()[0]) % 2 else "even"
            rows.append(np.array([quality if choice.startswith(right) else -quality for choice in own]))
        return rows

    house.teacher.complete, house.student.choose_each = complete, choose_each
    return house


def scored(house: Any, name: str, **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Return summary and rows of a prefer stage in a run of its own, and the student's calls in it."""
    house.folder = house.folder.with_name(name)
    tables = {"prefer": settings, "calibrate": {"k": K, "items": 40}, "elicit": {"questions": 12}}
    run = house.run(**tables)
    elicit(run)
    calibrate(run)
    before = house.student.calls
    summary = prefer(run)
    rows = run.read("prefer", "scores.jsonl")
    run.close()
    return summary, rows, house.student.calls - before


def ends(rows: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["question"]].append((row["score"], row["text"]))
    return {key: (max(group)[1], min(group)[1]) for key, group in groups.items()}


def test_a_race_asks_a_quarter_and_finds_the_same_pairs(uneven: Any) -> None:
    full, all_rows, all_calls = scored(uneven, "full", race="off")
    raced, rows, calls = scored(uneven, "raced", race="on")
    assert all_calls == full["drafts"] * K and "race" not in full
    assert calls == raced["race"]["measured"] <= 0.3 * all_calls
    assert {row["items"] for row in rows} <= set(range(2, K + 1))
    true, found = ends(all_rows), ends(rows)
    same = [a == b for key in true for a, b in zip(true[key], found[key], strict=True)]
    assert np.mean(same) >= 0.9
    by_text = {row["text"]: row["score"] for row in all_rows}
    errors = [abs(row["score"] - by_text[row["text"]]) / max(row["standard_error"], 1e-3) for row in rows]
    assert np.mean(np.array(errors) < 3) >= 0.9  # the stated error is the true one


def test_a_race_stopped_in_the_middle_ends_with_the_same_scores(uneven: Any) -> None:
    _, whole, calls = scored(uneven, "whole", race="on")
    choose_each, left = uneven.student.choose_each, calls

    def dies(prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        nonlocal left
        left -= len(prompts)
        if left < 0:
            raise KeyboardInterrupt
        return list(choose_each(prompts, choices))

    uneven.student.choose_each = dies
    uneven.folder = uneven.folder.with_name("stopped")
    run = uneven.run(prefer={"race": "on"}, calibrate={"k": K, "items": 40}, elicit={"questions": 12})
    left += 10**6
    elicit(run)
    calibrate(run)
    left = calls * 3 // 4  # one group of calls is finished by then
    with pytest.raises(KeyboardInterrupt):
        prefer(run)
    run.close()
    uneven.student.choose_each = choose_each
    _, rows, again = scored(uneven, "stopped", race="on")
    assert rows == whole
    assert 0 < again < calls


def test_where_nothing_is_adaptive_the_stage_is_that_of_older_runs(house: Any) -> None:
    run = house.run()
    elicit(run)
    calibrate(run)
    prefer(run)
    manifest = json.loads((run.folder / "prefer" / "manifest.json").read_text())
    run.close()
    again = house.run(prefer={"race": "off", "race_share": 0.5})
    elicit(again)
    calibrate(again)
    before = house.calls
    prefer(again)
    assert house.calls == before
    assert json.loads((again.folder / "prefer" / "manifest.json").read_text()) == manifest


def test_small_grids_are_raced_only_when_asked_to() -> None:
    assert (
        is_adaptive(Prefer(), 160, 40)
        and not is_adaptive(Prefer(), 24, 12)
        and not is_adaptive(Prefer(), 160, 12)
    )
    assert is_adaptive(Prefer(race="on"), 4, 4) and not is_adaptive(Prefer(race="off"), 160, 40)
