"""A real run, killed five times with SIGKILL: no call is made twice, and its data is that of a run left alone."""

import json
import random
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from small_run import finish, start

_KILLS = 5
# What was drafted, chosen, scored, paired, written, trained on and answered, to the byte.
_DATA = (
    "elicit/questions.jsonl",
    "elicit/rationales.jsonl",
    "calibrate/preference_set.jsonl",
    "prefer/scores.jsonl",
    "align/pairs.jsonl",
    "tailor/train.jsonl",
    "tune/rows.jsonl",
    "evaluate/answers.jsonl",
)


def calls(run: Path) -> Counter[str]:
    return Counter(json.loads(line)["key"] for line in (run / "calls.jsonl").read_text().splitlines())


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_killed_five_times_makes_no_call_twice_and_ends_with_the_same_data(
    small_run: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    events = (small_run / "events.jsonl").read_text("utf-8").splitlines()
    whole_s = sum(float(json.loads(line).get("seconds", 0)) for line in events if '"stage"' in line)

    moments = random.Random(2406)
    done_early = 0
    for _ in range(_KILLS):
        process = start(killed)
        try:
            process.wait(timeout=moments.uniform(0.05, 0.25) * whole_s)
            done_early += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert done_early < _KILLS, "no kill hit a run that was still at work"
    finish(killed)

    keys = calls(killed / "run")
    assert keys and max(keys.values()) == 1
    for name in _DATA:
        assert (killed / "run" / name).read_bytes() == (small_run / name).read_bytes(), name
    assert keys == calls(small_run)
