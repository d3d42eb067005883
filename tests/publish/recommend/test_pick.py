"""The recommended file: what each constraint excludes, what chance may do, what is predicted, and what to relax."""

from typing import Any

import pytest
from tiny import accuracy, artifact, facts, quality_row, speed_row, student_file

from arte_edge.device.profiles import Profile
from arte_edge.device.roofline import Prediction
from arte_edge.errors import InputError
from arte_edge.publish.recommend.candidates import Candidate, Constraints, Metric, pareto_front
from arte_edge.publish.recommend.pick import choose, parse_size
from arte_edge.publish.recommend.recommendation import drop_text
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.rows import QualityRow, SpeedRow
from arte_edge.results.student_json import Artifact, Speed

PI = Profile(name="raspberry-pi-5", title="Raspberry Pi 5", cores=4, memory_bytes=(8_000_000_000,))


def measured(right: int, n: int = 100, *, difference: float = 0.0, p: float = 1.0) -> PairedAccuracy:
    ends = {"difference_low": difference - 0.05, "difference_high": difference + 0.05}
    return accuracy(right, n, task="t", difference=difference, p_value=p, **ends)


def file(name: str, size_mb: int, *, right: PairedAccuracy | None = None, decode: float = 0.0) -> Artifact:
    rates = {"decode_tokens_per_s": decode, "prefill_tokens_per_s": decode * 5}
    run = {"device": "raspberry-pi-5", "runtime": "llama_cpp 1", "threads": 4}
    speed = Speed(**run | rates, peak_rss_bytes=(size_mb + 80) * 10**6)
    speeds = (speed,) if decode else ()
    return artifact(name, size_bytes=size_mb * 10**6, accuracy=right, speeds=speeds)


F16 = file("F16", 270, right=measured(50), decode=10)
Q8 = file("Q8_0", 145, right=measured(50), decode=20)
Q4 = file("Q4_K_M", 105, right=measured(45, difference=-0.05, p=0.2), decode=30)


def test_the_fastest_of_those_that_cannot_be_told_from_the_best_is_picked() -> None:
    found = choose(student_file(F16, Q8, Q4), PI, Constraints())
    assert found.pick == "m-Q4_K_M.gguf"
    assert "fastest" in found.why and "5.0 points higher on 100 examples" in found.why
    worse = Q4.model_copy(update={"accuracy": measured(30, difference=-0.2, p=0.001)})
    found = choose(student_file(F16, Q8, worse), PI, Constraints())
    assert found.pick == "m-Q8_0.gguf"  # its interval ends at 40 %, the best has 50 %


@pytest.mark.parametrize(
    ("constraints", "out", "constraint"),
    [
        (Constraints(max_size_bytes=120_000_000), {"m-F16.gguf", "m-Q8_0.gguf"}, "max_size"),
        (Constraints(max_ram_bytes=300_000_000), {"m-F16.gguf"}, "max_ram"),
        (Constraints(min_decode=15), {"m-F16.gguf"}, "min_decode"),
        (Constraints(max_drop=2), {"m-Q4_K_M.gguf"}, "max_drop"),
        # 256 tokens at 50, 100, 150 a second and 64 at 10, 20, 30: 11.5 s, 5.8 s, 3.8 s
        (Constraints(max_answer_seconds=6), {"m-F16.gguf"}, "max_answer_seconds"),
    ],
)
def test_each_constraint_excludes_files(constraints: Constraints, out: set[str], constraint: str) -> None:
    found = choose(student_file(F16, Q8, Q4), PI, constraints)
    assert {one.file for one in found.violations} == out
    assert {one.constraint for one in found.violations} == {constraint}
    assert all("limit" in one.reason for one in found.violations)
    assert found.pick not in out and found.pick is not None


def test_a_drop_is_told_with_its_interval_and_whether_it_may_be_chance() -> None:
    assert drop_text(measured(45, difference=-0.05, p=0.2)) == (
        "5.0 points lost (-10.0 to +0.0, p = 0.2, n = 100), not significant"
    )
    assert drop_text(measured(45, difference=-0.05, p=0.01)).endswith(", significant")
    assert drop_text(measured(52, difference=0.02, p=0.5)).startswith("+2.0 points")


def test_when_no_file_keeps_every_wish_the_nearest_and_its_price_are_named() -> None:
    found = choose(student_file(F16, Q8, Q4), PI, Constraints(min_decode=25, max_drop=2))
    assert found.pick is None
    assert found.relax is not None
    # Q8_0 misses the speed alone, Q4_K_M the accuracy alone: the faster of the two is nearest.
    assert (found.relax.file, found.relax.text) == ("m-Q4_K_M.gguf", "--max-drop 5")
    found = choose(student_file(F16, Q8), PI, Constraints(min_decode=25, max_size_bytes=120_000_000))
    assert found.relax is not None and found.relax.text == "--max-size 145MB and --min-decode 20"
    # What is asked for then is kept.
    relaxed = Constraints(min_decode=20, max_size_bytes=145_000_000)
    assert choose(student_file(F16, Q8), PI, relaxed).pick == "m-Q8_0.gguf"


def test_a_file_that_the_gate_rejected_is_never_picked() -> None:
    bad = Q4.model_copy(update={"status": "rejected", "reason": "KL"})
    found = choose(student_file(Q8, bad), PI, Constraints())
    assert found.pick == "m-Q8_0.gguf"
    assert [(one.file, one.constraint) for one in found.violations] == [("m-Q4_K_M.gguf", "gate")]
    assert choose(student_file(bad), PI, Constraints()).why == "No file passed the fidelity gate."


def test_what_was_not_measured_there_is_predicted_and_says_so() -> None:
    elsewhere = Profile(name="orange-pi-5", title="o", cores=4, memory_bytes=(1,))
    fast_enough = Constraints(min_decode=10)
    predict = lambda a: Prediction(12.0, 10**8, "sums")  # noqa: E731
    found = choose(student_file(Q8, Q4), elsewhere, fast_enough, predict=predict)
    pick = found.candidate(found.pick or "")
    assert pick.decode == Metric(12.0, "predicted", "sums") and pick.ram is not None and pick.ram.predicted
    assert "(predicted)" in found.why and any("~ is predicted" in note for note in found.notes)
    nothing = choose(student_file(Q8), elsewhere, fast_enough)
    assert nothing.pick is None and nothing.relax is None
    assert "neither measured nor predicted" in nothing.violations[0].reason


def test_a_predicted_file_is_not_picked_before_a_measured_one() -> None:
    bare = file("Q4_0", 100, right=measured(50))
    found = choose(student_file(Q8, bare), PI, Constraints(), predict=lambda a: Prediction(99.0, 10**8, "sums"))
    assert found.pick == "m-Q8_0.gguf"
    assert "m-Q4_0.gguf may be faster: 99.0 tokens/s predicted; measure it." in found.notes


def test_where_little_is_known_of_any_file_one_is_still_named() -> None:
    fast, right = file("Q8_0", 145, decode=20), file("Q4_0", 100, right=measured(50))
    found = choose(student_file(fast, right), PI, Constraints())
    assert found.pick == "m-Q8_0.gguf" and found.front.files == ()


def row(a: Artifact, rate: float, **more: Any) -> SpeedRow:
    known = {"model_filename": a.file, "tensor_sha256": a.tensor_sha256, "runtime": "", "peak_rss_bytes": None}
    return speed_row("tg128", rate, **known | {"device": facts(**more.pop("device", {}))} | more)


def test_raw_rows_count_but_not_throttled_failed_emulated_or_foreign_ones() -> None:
    bare = file("Q8_0", 145, right=measured(50))
    rows = [
        row(bare, 21, peak_rss_bytes=200_000_000),
        row(bare, 18, n_threads=2),
        row(bare, 99, throttled=True, n_threads=1),
        row(bare, 98, device=dict(virtual="qemu-user")),
        row(bare, 97, device=dict(profile="orange-pi-5")),
        row(bare, 96, status="crashed"),
        row(file("Q4_0", 1), 94),
    ]
    found = choose(student_file(bare), PI, Constraints(), rows=rows)
    c = found.candidates[0]
    assert c.decode is not None and (c.decode.value, c.decode.source) == (21, ", 4 threads")
    assert c.ram is not None and c.ram.value == 200_000_000
    assert any("throttled" in note for note in found.notes)
    busy = row(bare, 50, contended=True)
    (c,) = choose(student_file(bare), PI, Constraints(), rows=[busy]).candidates
    assert c.decode is None and "run the same `arte-edge bench` again" in c.notes[0]
    (c,) = choose(student_file(bare), PI, Constraints(), rows=[busy, row(bare, 21)]).candidates
    assert c.decode is not None and c.decode.value == 21 and c.notes == (), "it was measured again"
    by_print = choose(student_file(bare), PI, Constraints(), rows=rows[:1], names=frozenset({facts().fingerprint}))
    assert by_print.candidates[0].decode is not None


def quality(a: Artifact, **more: Any) -> QualityRow:
    known = {"task": "t", "n": 200, "right": 90, "low": 0.4, "high": 0.5, "answer_seconds_p95": 2.5}
    return quality_row(**known | {"model_filename": a.file, "tensor_sha256": a.tensor_sha256} | more)


def test_answers_on_the_device_stand_before_the_gates_but_never_beside_other_examples() -> None:
    both = [quality(Q8, difference=-0.01), quality(Q4, difference=-0.03)]
    found = choose(student_file(Q8, Q4), PI, Constraints(max_drop=2), rows=both)
    assert [c.accuracy.n for c in found.candidates if c.accuracy] == [200, 200]
    assert [one.file for one in found.violations] == ["m-Q4_K_M.gguf"]
    assert found.candidates[0].answer_s == Metric(2.5, "measured", "95 % of 200 answers")
    busy = [quality(Q8, contended=True), quality(Q4)]
    times = [c.answer_s for c in choose(student_file(Q8, Q4), PI, Constraints(), rows=busy).candidates]
    assert [time and time.evidence for time in times] == ["predicted", "measured"]
    for rows in (both[:1], [both[0], quality(Q4, partial=True)], [both[0], quality(Q4, n=150)]):
        found = choose(student_file(Q8, Q4), PI, Constraints(), rows=rows)
        assert [c.accuracy.n for c in found.candidates if c.accuracy] == [100, 100]


def test_answers_on_a_device_without_a_16_bit_file_leave_the_gates_difference() -> None:
    rows = [quality(Q8), quality(Q4, right=80)]  # more examples, and none of them paired
    found = choose(student_file(Q8, Q4), PI, Constraints(max_drop=2), rows=rows)
    assert [c.accuracy.n for c in found.candidates if c.accuracy] == [200, 200]
    assert found.pick == "m-Q8_0.gguf" and "n = 100" in found.choice[1]
    assert [(one.file, one.needs) for one in found.violations] == [("m-Q4_K_M.gguf", 5)]
    assert [text for text in found.table.columns[6].cells] == ["+0.0", "-5.0"]


def test_the_front_holds_what_no_other_file_beats() -> None:
    found = choose(student_file(F16, Q8, Q4), PI, Constraints())
    assert found.front.files == ("m-Q4_K_M.gguf", "m-Q8_0.gguf")  # F16 is slower, larger and no better
    assert found.front.axes == ("accuracy", "decode", "size")
    without = [Candidate(a, None, Metric(1.0 + i, "measured")) for i, a in enumerate((F16, Q8, Q4))]
    front = pareto_front(without)
    assert (front.files, front.axes) == (("m-Q4_K_M.gguf",), ("decode", "size"))
    slow, fast = Metric(1.0, "measured"), Metric(9.0, "measured")
    mixed = [Candidate(F16, F16.accuracy, slow), Candidate(Q4, None, fast)]
    assert pareto_front(mixed).left_out == ("m-Q4_K_M.gguf",)


def test_sizes_are_read() -> None:
    texts = ["1GB", "1g", "512MiB", " 1.5 GB ", "800", "2KB"]
    sizes = [10**9, 10**9, 512 * 2**20, 1_500_000_000, 800, 2000]
    assert [parse_size(text, "--max-ram") for text in texts] == sizes


@pytest.mark.parametrize("text", ["", "much", "1XB", "-1GB", "0", "1.2.3GB", "GB", "1iB", "1Ki"])
def test_no_size_is_an_error_that_names_the_option(text: str) -> None:
    with pytest.raises(InputError, match="--max-ram"):
        parse_size(text, "--max-ram")
