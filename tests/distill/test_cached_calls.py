"""Groups of calls: their fixed make-up, and what a kill between and inside them leaves."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from arte_edge.console import Reporter
from arte_edge.distill.cached_calls import Calls
from arte_edge.errors import EngineError
from arte_edge.runtimes.completion import Completion, EngineIdentity, Request, Sampling
from arte_edge.store import CallLog


class Batching:
    """An engine whose answers depend on who shares the call, as a real one's do by rounding."""

    def __init__(self, kind: str = "llamacpp", dies_at: int = -1) -> None:
        self.identity = EngineIdentity(kind, "m")
        self.sizes: list[int] = []
        self._dies_at = dies_at

    def _called(self, n: int) -> None:
        if len(self.sizes) == self._dies_at:
            raise KeyboardInterrupt
        self.sizes.append(n)

    def choose_each(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        self._called(len(prompts))
        mates = sum(map(len, prompts))
        return [np.array([-len(p + c) - mates / 1000 for c in own]) for p, own in zip(prompts, choices, strict=True)]

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self._called(len(requests))
        return [Completion(f"{r.prompt} beside {len(requests)}", "stop", 1, 1) for r in requests]


def open_calls(folder: Path, **sizes: int) -> Calls:
    return Calls(CallLog(folder / "calls.jsonl"), Reporter(quiet=True), **sizes)


def asks(n: int, k: int) -> list[tuple[list[str], list[list[str]]]]:
    return [([f"{'d' * d} {q}" for q in range(k)], [["yes", "no"][: 1 + q % 2] for q in range(k)]) for d in range(n)]


def choose(folder: Path, engine: Any, todo: Any) -> list[list[list[float]]]:
    return open_calls(folder, together=20).choose_each(engine, todo, "scores")


def test_asks_travel_together_until_their_prompts_fill_a_call(tmp_path: Path) -> None:
    engine = Batching()
    rows = choose(tmp_path, engine, asks(5, 8))
    assert engine.sizes == [24, 16]
    assert [len(values) for values in rows[0]] == [1, 2] * 4
    again = Batching()
    assert choose(tmp_path, again, asks(5, 8)) == rows and again.sizes == []


@pytest.mark.parametrize("dies_at", [0, 1, 2])
def test_a_kill_between_calls_changes_no_score(tmp_path: Path, dies_at: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = choose(whole, Batching(), asks(9, 8))
    with pytest.raises(KeyboardInterrupt):
        choose(killed, Batching(dies_at=dies_at), asks(9, 8))
    assert choose(killed, Batching(), asks(9, 8)) == expected
    assert (killed / "calls.jsonl").read_bytes() == (whole / "calls.jsonl").read_bytes()


def test_a_group_that_was_torn_in_the_middle_is_scored_again_as_a_whole(tmp_path: Path) -> None:
    expected = choose(tmp_path, Batching(), asks(9, 8))
    log = tmp_path / "calls.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:4]))  # one row of the second call
    engine = Batching()
    assert choose(tmp_path, engine, asks(9, 8)) == expected
    assert engine.sizes == [24, 24]


def test_the_students_texts_go_in_large_groups_but_never_to_a_server(tmp_path: Path) -> None:
    requests = [Request(f"p{i}") for i in range(90)]
    for kind, together, sizes in (
        ("llamacpp", True, [60, 30]),
        ("llamacpp", False, [32, 32, 26]),
        ("openai", True, [32, 32, 26]),
    ):
        engine: Any = Batching(kind)
        calls = open_calls(tmp_path / f"{kind}{together}", together=60)
        done = calls.complete(engine, requests, Sampling(), "scores", together=together)
        assert engine.sizes == sizes
        assert [c.text.split()[0] for c in done] == [r.prompt for r in requests]


def test_equal_calls_of_a_group_are_made_once(tmp_path: Path) -> None:
    engine: Any = Batching()
    done = open_calls(tmp_path).complete(engine, [Request("a"), Request("b"), Request("a")], Sampling(), "x")
    assert engine.sizes == [2] and done[0] == done[2]
    rows = choose(tmp_path, engine, [*asks(1, 4), *asks(1, 4)])
    assert engine.sizes == [2, 4] and rows[0] == rows[1]


class Backwards(Batching):
    """A cluster whose last group arrives first."""

    def each(self, method: str, groups: Any) -> Any:
        yield from reversed([(n, getattr(self, method)(*group)) for n, group in enumerate(groups)])


@pytest.mark.parametrize("n_new", [0, 3])
def test_a_group_may_arrive_before_the_one_that_makes_its_call(tmp_path: Path, n_new: int) -> None:
    prompts = [*range(32), 0, *range(32, 32 + n_new)]
    engine: Any = Backwards()
    done = open_calls(tmp_path).complete(engine, [Request(f"q{i}") for i in prompts], Sampling(), "x")
    assert [c.text.split()[0] for c in done] == [f"q{i}" for i in prompts]
    assert engine.sizes == [n for n in (32, n_new) if n]


class Server:
    """A server whose answers are what `says` makes of a prompt: a text, or a completion; counts its calls."""

    def __init__(self, says: Callable[[str], Any], address: str = "http://one/v1") -> None:
        self.identity = EngineIdentity("openai", "teacher", address=address)
        self.notes = ["one thing"]
        self.says, self.calls = says, 0

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls += len(requests)
        said = [self.says(r.prompt) for r in requests]
        return [Completion(one, "stop", 2, 8) if isinstance(one, str) else one for one in said]


def ask(folder: Path, engine: Any, n: int = 100, **options: Any) -> tuple[list[Completion], Calls]:
    calls = open_calls(folder)
    return calls.complete(engine, [Request(f"q{i}") for i in range(n)], Sampling(), "rows", **options), calls


@pytest.mark.parametrize(("fault", "asked_again"), [("answer", 0), ("row", 1), ("", 1)])
def test_a_row_that_is_always_refused_ends_no_start(tmp_path: Path, fault: Any, asked_again: int) -> None:
    engine = Server(lambda prompt: Completion("", "error", error="filtered", fault=fault) if prompt == "q7" else "fine")
    for n_call in (100, asked_again, asked_again):
        engine.calls = 0
        done, calls = ask(tmp_path, engine)
        assert engine.notes == [], "taken and said once"
        assert [(i, c.error) for i, c in enumerate(done) if c.error] == [(7, "filtered")]
        assert engine.calls == n_call
        assert calls.take_counts() == {"failed": 1, "reasons": "filtered"}
        assert calls.take_counts() == {}


TWICE, LATER = "another teacher.model", "when the server responds"


@pytest.mark.parametrize(
    ("lost", "fault", "hint", "most_calls"),
    [(21, "answer", TWICE, 100), (100, "answer", TWICE, 32), (100, "row", TWICE, 32), (1, "server", LATER, 32)],
)
def test_too_many_failures_and_a_dead_server_stop_the_run(
    tmp_path: Path, lost: int, fault: Any, hint: str, most_calls: int
) -> None:
    engine = Server(
        lambda prompt: Completion("", "error", error="no", fault=fault) if int(prompt[1:]) % 100 < lost else "fine"
    )
    with pytest.raises(EngineError, match=r"rows: \d+ of 100 calls failed.*: no") as caught:
        ask(tmp_path, engine)
    assert hint in caught.value.hint and engine.calls <= most_calls
    kept = len(CallLog(tmp_path / "calls.jsonl"))
    assert kept == engine.calls - (0 if fault == "answer" else min(lost, engine.calls))
    assert ask(tmp_path, engine, spare=True)[0][99].text == ("" if lost == 100 else "fine")


def test_reasoning_is_left_out_of_what_is_stored_and_counted(tmp_path: Path) -> None:
    texts = {"q0": "<think>abc</think>a", "q1": "b"}
    engine = Server(lambda prompt: texts.get(prompt) or Completion("<think>a", "length", 2, 8))
    with pytest.raises(EngineError, match="budget ran out") as caught:
        ask(tmp_path, engine, 8, budget="elicit.rationale_tokens")
    assert "Raise elicit.rationale_tokens (now 256)" in caught.value.hint
    done, calls = ask(tmp_path, engine, 3, budget="elicit.rationale_tokens")
    assert [c.text for c in done] == ["a", "b", ""] and engine.calls == 8, "what was paid for is stored"
    counts = {"failed": 1, "reasons": done[2].error, "with_reasoning": 2, "reasoning_tokens": 16}
    assert calls.take_counts() == counts
    # A student's own text is judged as its device would write it.
    assert ask(tmp_path, engine, 1)[0][0].text == "<think>abc</think>a"


def test_servers_of_one_model_name_share_no_answers(tmp_path: Path) -> None:
    one, other = Server(lambda _: "one"), Server(lambda _: "other", "http://other/v1")
    assert [ask(tmp_path, engine, 2)[0][0].text for engine in (one, other, one)] == ["one", "other", "one"]
    assert (one.calls, other.calls) == (2, 2)
