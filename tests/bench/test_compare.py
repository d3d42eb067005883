from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import facts, quality_row, speed_row

from arte_edge.bench.compare import Comparison, compare, rows_of
from arte_edge.bench.report import as_json
from arte_edge.errors import InputError
from arte_edge.results.rows import QualityRow, SpeedRow, append_rows

PI = facts(profile="", fingerprint="a" * 16)
LAPTOP = facts(profile="", fingerprint="b" * 16, cpu="Laptop", arch="x86_64")


def speed(name: str = "student-Q8_0.gguf", rates: Sequence[float] = (20.0, 20.2, 19.8), **more: Any) -> SpeedRow:
    values = {
        "model_filename": name,
        "quantization": name.partition("-")[2].partition(".")[0],
        "tensor_sha256": f"sum of {name}",
        "samples_ts": rates,
        "samples_ns": tuple(int(128e9 / rate) for rate in rates),
        "device": PI,
    }
    rate = float(np.median(rates)) if rates else 0.001
    return speed_row(more.pop("test", "tg128"), rate, **values | more)


def quality(rights: str, name: str = "student-Q8_0.gguf", **more: Any) -> QualityRow:
    answers = tuple((f"{i:016x}", "x", right == "1") for i, right in enumerate(rights))
    known = {"model_filename": name, "task_sha256": "t" * 64, "device": PI, "answers": answers}
    return quality_row(rights.count("1"), **known | {"n": len(rights), "low": 0.0, "high": 1.0} | more)


def only(found: Comparison) -> Any:
    assert len(found.speeds) == 1
    return found.speeds[0]


def test_small_differences_and_single_samples_give_no_verdict() -> None:
    one = only(compare([speed()], [speed(rates=(20.1, 19.9, 20.3))]))
    assert one.verdict == "same" and one.rate.low < 1 < one.rate.high
    one = only(compare([speed(rates=(20.0,))], [speed(rates=(30.0,))]))
    assert one.verdict == "?" and one.rate.low is None


def test_a_difference_beyond_the_spread_is_marked() -> None:
    one = only(compare([speed()], [speed(rates=(30.0, 30.3, 29.7))]))
    assert (one.verdict, one.rate.value) == ("faster", pytest.approx(1.5, rel=0.01))
    assert 1 < one.rate.low < 1.5 < one.rate.high
    assert only(compare([speed(rates=(30.0, 30.3, 29.7))], [speed()])).verdict == "slower"
    noisy = only(compare([speed(rates=(20.0, 10.0, 30.0))], [speed(rates=(30.0, 15.0, 45.0))]))
    assert noisy.verdict == "same"  # the same factor, lost in the spread


def test_two_files_of_one_export_are_paired_test_by_test() -> None:
    a = [speed(), speed(test="pp512", rates=(90.0, 91.0))]
    b = [speed("student-Q4_K_M.gguf", test="pp512", rates=(70.0, 71.0))]
    found = compare(a, [*b, speed("student-Q4_K_M.gguf", rates=(33.0, 33.5))])
    assert [(one.a.test, one.b.test) for one in found.speeds] == [("tg128", "tg128"), ("pp512", "pp512")]
    assert found.only_a == found.only_b == ()


def test_many_files_are_paired_by_their_tensors_and_the_newest_counts() -> None:
    names = ("student-Q8_0.gguf", "student-Q4_K_M.gguf")
    a = [speed(names[0], (20.0, 20.1)), speed(names[1], (30.0, 30.1))]
    renamed = speed("renamed.gguf", (21.0, 21.1), tensor_sha256=f"sum of {names[0]}")
    found = compare(a, [speed(names[1], (11.0, 11.1)), renamed, speed(names[1], (33.0, 33.1))])
    pairs = {one.a.model_filename: (one.b.model_filename, one.b.median_ts) for one in found.speeds}
    assert pairs == {names[0]: ("renamed.gguf", 21.05), names[1]: (names[1], 33.05)}


def test_a_sound_result_is_not_hidden_by_a_later_one_that_is_not() -> None:
    bad = [speed(rates=(9.0, 9.1), **{kind: True}) for kind in ("throttled", "contended")]
    a = [speed(), *bad, speed(rates=(), status="crashed")]
    assert only(compare(a, [speed()])).a is a[0]
    answered = [quality("1" * 40), quality("0" * 5, partial=True)]
    assert compare(answered, [quality("1" * 40)]).qualities[0].paired.n == 40


def test_another_runtime_is_paired_only_if_the_same_is_not_there_and_it_is_said() -> None:
    other = speed(runtime="xllamacpp 2026.1", rates=(10.0, 10.1))
    same = only(compare([speed()], [other, speed()]))
    assert same.b.runtime == "llama_cpp 0.3.36"
    found = compare([speed()], [other])
    assert only(found).b is other
    assert "runtime llama_cpp 0.3.36 against xllamacpp 2026.1" in found.differs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_threads": 2}, "n_threads 4 against 2"),
        ({"test": "tg64"}, "n_gen 128 against 64"),
        ({"test": "tg128@d512"}, "n_depth 0 against 512"),
        ({"type_k": "q8_0"}, "type_k"),
        ({"device": LAPTOP}, "device Cortex-A76 (aaaaaaaaaaaaaaaa) against Laptop (bbbbbbbbbbbbbbbb)"),
    ],
)
def test_different_protocols_are_refused_and_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        compare([speed()], [speed(**change)])
    assert said in refused.value.message and "--force" in refused.value.hint
    forced = compare([speed()], [speed(**change)], force=True)
    assert only(forced).rate is not None and any(said in text for text in forced.differs)


def test_a_sweep_is_compared_where_the_two_meet_and_the_rest_is_listed() -> None:
    a = [speed(n_threads=threads) for threads in (1, 2, 4)]
    found = compare(a, [speed(n_threads=4)])
    assert only(found).a.n_threads == 4
    assert found.only_a == ("student-Q8_0.gguf tg128, 1 threads", "student-Q8_0.gguf tg128, 2 threads")


@pytest.mark.parametrize("kind", ["throttled", "contended"])
def test_a_disturbed_or_failed_side_gives_no_verdict(kind: str) -> None:
    found = compare([speed()], [speed(rates=(10.0, 10.1), **{kind: True})])
    assert only(found).verdict == "?" and f"tg128: B {kind}" in found.differs
    failed = speed(rates=(), status="out-of-memory", reason="killed")
    assert only(compare([speed()], [failed])).rate is None


def test_answers_are_compared_in_pairs_across_machines() -> None:
    a = quality("1111111100" * 4)
    b = quality("1111111000" * 4, "student-Q4_K_M.gguf", device=LAPTOP)
    found = compare([a], [b]).qualities[0]
    assert (found.paired.n, found.paired.difference) == (40, pytest.approx(-0.1))
    assert found.verdict == "same" and found.paired.p_value == pytest.approx(0.125)
    worse = quality("1111000000" * 4, "student-Q4_K_M.gguf")
    assert compare([a], [worse]).qualities[0].verdict == "worse"


def test_partial_answers_are_paired_on_what_both_answered() -> None:
    found = compare([quality("1" * 40)], [quality("1" * 10, "b.gguf", partial=True)])
    assert found.qualities[0].paired.n == 10
    assert any("10 examples that both answered" in text for text in found.differs)


@pytest.mark.parametrize(
    ("change", "said"), [({"split": "validation"}, "split"), ({"task_sha256": "u"}, "task_sha256")]
)
def test_other_questions_are_refused_even_by_force(change: dict[str, Any], said: str) -> None:
    for force in (False, True):
        with pytest.raises(InputError) as refused:
            compare([quality("10")], [quality("10", **change)], force=force)
        assert said in str(refused.value)


def test_an_empty_side_is_refused() -> None:
    with pytest.raises(InputError, match="no result"):
        compare([], [speed()])


def test_results_are_found_wherever_they_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "export"
    folder.mkdir(parents=True)
    rows = [speed(), speed("student-Q4_K_M.gguf"), quality("10")]
    append_rows(folder / "bench.jsonl", rows)
    (folder / "student-Q4_K_M.gguf").write_bytes(b"GGUF")
    (tmp_path / "printed.json").write_text(as_json(rows))
    everything = [folder, folder.parent, folder / "bench.jsonl", tmp_path / "printed.json"]
    assert all(rows_of(path) == rows for path in everything)
    assert rows_of(folder / "student-Q4_K_M.gguf") == [rows[1]]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("empty.jsonl", "", "no results"),
        ("torn.json", "[{", "not readable as JSON"),
        ("object.json", "{}", "not a list"),
        ("old.json", '[{"schema_version": 9, "task": "x"}]', "row 1: schema_version"),
        ("model.gguf", "GGUF", "arte-edge bench"),
    ],
)
def test_what_holds_no_results_is_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as refused:
        rows_of(tmp_path / name)
    assert said in str(refused.value)
    with pytest.raises(InputError, match="no such file"):
        rows_of(tmp_path / "nothing")
