import json
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import Patch

from arte_edge.cache import cache_subdir
from arte_edge.errors import ArteError
from arte_edge.runtimes.autotune import Candidate, candidates_here, fastest_engine, sample_seconds

LLAMA, HALF, FULL = (Candidate("llamacpp"), Candidate("transformers", "bfloat16"), Candidate("transformers", "float32"))
WAYS = [LLAMA, HALF, FULL]


class Sleeper:
    """An engine that takes so many seconds for anything."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.closed, self.prompts = seconds, False, 0

    def complete(self, requests: list[Any], _: Any) -> list[Any]:
        self.prompts += len(requests)
        time.sleep(self.seconds)
        return []

    choose_each = complete

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("ARTE_EDGE_HOME", str(tmp_path))


def opening(seconds: dict[Candidate, float], opened: list[Sleeper]) -> Any:
    def open_way(way: Candidate) -> Any:
        opened.append(Sleeper(seconds[way]))
        return opened[-1]

    return open_way


@pytest.mark.parametrize("work", ["write", "choose"])
def test_the_fastest_is_taken_measured_once_and_all_are_closed(work: Any) -> None:
    opened: list[Sleeper] = []
    seconds = {LLAMA: 0.03, HALF: 0.002, FULL: 0.02}
    assert fastest_engine(WAYS, opening(seconds, opened), work, ["model"]) == HALF
    assert len(opened) == 3 and all(one.closed and one.prompts for one in opened)
    other = {LLAMA: 0.0, HALF: 0.02, FULL: 0.02}
    assert fastest_engine(WAYS, opening(other, opened), work, ["model"]) == HALF
    assert len(opened) == 3
    assert fastest_engine(WAYS, opening(other, opened), work, ["another model"]) == LLAMA


def test_a_little_faster_is_not_worth_leaving_the_default() -> None:
    assert fastest_engine(WAYS, opening({LLAMA: 0.03, HALF: 0.028, FULL: 0.03}, []), "choose", []) == LLAMA


@pytest.mark.parametrize("error", [ArteError("no torch"), RuntimeError("out of memory"), MemoryError()])
def test_a_way_that_cannot_be_gone_is_left_out_and_the_default_must_work(error: Exception) -> None:
    fine = opening({LLAMA: 0.02, FULL: 0.001}, [])

    def failing(broken: Candidate) -> Any:
        def open_way(way: Candidate) -> Any:
            if way == broken:
                raise error
            return fine(way)

        return open_way

    assert fastest_engine(WAYS, failing(HALF), "choose", ["a"]) == FULL
    with pytest.raises(type(error)):
        fastest_engine([LLAMA, FULL], failing(LLAMA), "choose", ["b"])


def test_without_a_choice_nothing_is_opened() -> None:
    opened: list[Sleeper] = []
    assert fastest_engine([HALF], opening({HALF: 1.0}, opened), "choose", []) == HALF
    assert not opened


def test_a_kept_answer_that_cannot_be_read_is_measured_again() -> None:
    opened: list[Sleeper] = []
    quick = opening({LLAMA: 0.02, HALF: 0.001, FULL: 0.02}, opened)
    fastest_engine(WAYS, quick, "choose", [])
    (file,) = cache_subdir("engines").glob("*.json")
    for text in ("{", json.dumps({"engine": "abacus"}), json.dumps([1])):
        file.write_text(text)
        assert fastest_engine(WAYS, quick, "choose", []) == HALF
    assert len(opened) == 12 and json.loads(file.read_text())["engine"] == "transformers bfloat16"


@pytest.mark.parametrize("work", ["write", "choose"])
def test_a_real_engine_does_the_sample(llama: Any, work: Any) -> None:
    assert 0 < sample_seconds(llama, work) < 60


def test_what_is_tried_fits_the_memory_the_model_and_what_somebody_asks_for(monkeypatch: Patch) -> None:
    from arte_edge.runtimes import autotune as room_of

    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(room_of.onednn_prepack, "supported", lambda: True)
    monkeypatch.setattr(room_of, "available_bytes", lambda: 10_000)
    assert candidates_here(1_000, has_file=True) == WAYS
    assert candidates_here(3_000, has_file=True) == [LLAMA, HALF]
    assert candidates_here(6_000, has_file=True) == [LLAMA]
    assert candidates_here(1_000, has_file=False) == [Candidate("transformers"), HALF]
    for asked, way in (("float32", FULL), ("bfloat16", HALF)):
        monkeypatch.setenv("ARTE_EDGE_DTYPE", asked)
        assert candidates_here(1_000, has_file=True) == [LLAMA, way]
        assert candidates_here(1_000, has_file=False) == [Candidate("transformers")]
    monkeypatch.delenv("ARTE_EDGE_DTYPE")
    monkeypatch.setattr(room_of.onednn_prepack, "supported", lambda: False)
    assert candidates_here(1_000, has_file=True) == [LLAMA, FULL]
