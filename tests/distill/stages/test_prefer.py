"""The prefer stage with adaptive scoring: fewer calls, the ends of the full grid, off: as before."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from arte_edge.distill.config import Prefer
from arte_edge.distill.preference.scoring import is_adaptive
from arte_edge.runtimes.completion import Request, Sampling

K = 24


def number(text: str) -> float:
    """Return a number from 0 to 1 that only `text` decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


@pytest.fixture
def uneven(house: Any) -> Any:
    """A house whose rationales differ, and whose student learns more from some than from others."""

    def say(request: Request, text: str, sampling: Sampling) -> str:
        return f"Reason {number(request.prompt):.6f}. {text[text.index('<ans>') :]}"

    def choose_each(prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        house.student.calls += len(prompts)
        rows = []
        for prompt, own in zip(prompts, choices, strict=True):
            shown, asked = prompt.rpartition("Question:")[::2]
            quality = number(shown) - 0.5 + 0.2 * (number(asked) - 0.5)
            right = "odd" if int(asked.split("Is ")[1].split()[0]) % 2 else "even"
            rows.append(np.array([quality if choice.startswith(right) else -quality for choice in own]))
        return rows

    house.teacher.say, house.student.choose_each = say, choose_each
    return house


def ends(rows: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["question"]].append((row["score"], row["text"]))
    return {key: (max(group)[1], min(group)[1]) for key, group in groups.items()}


SIZE = {"calibrate": {"k": K, "items": 40}, "elicit": {"questions": 12}}


def test_a_race_asks_a_quarter_and_finds_the_same_pairs(uneven: Any, scored: Any) -> None:
    _, full, all_rows = scored(prefer={"race": "off"}, **SIZE)
    all_calls = uneven.calls - uneven.scoring_from
    uneven.folder = uneven.folder.with_name("raced")
    _, raced, rows = scored(prefer={"race": "on"}, **SIZE)
    assert all_calls == full["drafts"] * K and "race" not in full
    assert uneven.calls - uneven.scoring_from == raced["race"]["measured"] <= 0.3 * all_calls
    assert {row["items"] for row in rows} <= set(range(2, K + 1))
    true, found = ends(all_rows), ends(rows)
    same = [a == b for key in true for a, b in zip(true[key], found[key], strict=True)]
    assert np.mean(same) >= 0.9
    by_text = {row["text"]: row["score"] for row in all_rows}
    errors = [abs(row["score"] - by_text[row["text"]]) / max(row["standard_error"], 1e-3) for row in rows]
    assert np.mean(np.array(errors) < 3) >= 0.9  # the stated error is the true one


def test_a_race_stopped_in_the_middle_ends_with_the_same_scores(uneven: Any, scored: Any) -> None:
    _, _, whole = scored(prefer={"race": "on"}, **SIZE)
    calls, choose_each = uneven.calls - uneven.scoring_from, uneven.student.choose_each

    def dies(prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        # One group of calls is finished by then.
        if uneven.scoring_from > before and uneven.calls + len(prompts) - uneven.scoring_from > calls * 3 // 4:
            raise KeyboardInterrupt
        return list(choose_each(prompts, choices))

    uneven.folder, before = uneven.folder.with_name("stopped"), uneven.scoring_from
    uneven.student.choose_each = dies
    with pytest.raises(KeyboardInterrupt):
        scored(prefer={"race": "on"}, **SIZE)
    uneven.run_open.close()
    uneven.student.choose_each = choose_each
    assert scored(prefer={"race": "on"}, **SIZE)[2] == whole
    assert 0 < uneven.calls - uneven.scoring_from < calls


def test_where_nothing_is_adaptive_the_stage_is_that_of_older_runs(house: Any, scored: Any) -> None:
    scored()
    manifest, before = (house.folder / "prefer" / "manifest.json").read_text(), house.calls
    scored(prefer={"race": "off", "race_share": 0.5})
    assert house.calls == before
    assert (house.folder / "prefer" / "manifest.json").read_text() == manifest


@pytest.mark.parametrize(
    ("race", "n_draft", "n_item", "adaptive"),
    [
        ("auto", 160, 40, True),
        ("auto", 24, 12, False),
        ("auto", 160, 12, False),
        ("on", 4, 4, True),
        ("off", 160, 40, False),
    ],
)
def test_small_grids_are_raced_only_when_asked_to(race: Any, n_draft: int, n_item: int, adaptive: bool) -> None:
    assert is_adaptive(Prefer(race=race), n_draft, n_item) is adaptive
