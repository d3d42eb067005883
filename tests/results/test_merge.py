import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import facts, quality_row, speed_row

from arte_edge.errors import InputError
from arte_edge.results.merge import measured, merge_into, merge_rows
from arte_edge.results.rows import Row
from arte_edge.results.student_json import FILE_NAME, Speed, StudentFile, carry_results, read_student


def read(folder: Path) -> StudentFile:
    return read_student(folder) or pytest.fail(f"no student.json in {folder}")


def speeds(student: StudentFile) -> tuple[Speed, ...]:
    return student.artifacts[0].speeds


def test_one_entry_a_device_holds_both_rates_and_every_test(export_folder: Path) -> None:
    rows = [speed_row("tg128", 20.5), speed_row("pp512", 150.0), speed_row("pp64", 120.0)]
    (speed,) = speeds(merge_rows(export_folder, rows))
    assert (speed.device, speed.threads, speed.fingerprint) == ("raspberry-pi-5", 4, "0123456789abcdef")
    assert (speed.decode_tokens_per_s, speed.prefill_tokens_per_s, speed.ttft_ms) == (20.5, 150.0, 900.0)
    assert [test.test for test in speed.tests] == ["pp512", "pp64", "tg128"]
    assert read(export_folder) == merge_rows(export_folder, [])  # it is on the disk


def test_a_rerun_replaces_its_own_entry_and_no_other(export_folder: Path) -> None:
    other = facts(profile="", fingerprint="f" * 16)
    merge_rows(export_folder, [speed_row("tg128", 20.0), speed_row("tg128", 5.0, device=other)])
    found = speeds(merge_rows(export_folder, [speed_row("tg128", 22.0, test_time="2026-11-25T08:00:00Z")]))
    assert [(s.device, s.decode_tokens_per_s) for s in found] == [("raspberry-pi-5", 22.0), ("f" * 16, 5.0)]


def test_the_newest_rate_of_a_test_is_the_speed_of_both_documents(export_folder: Path) -> None:
    old, short = speed_row("tg128", 15.0), speed_row("tg16", 30.0)
    new = speed_row("tg128", 10.0, type_k="q8_0", test_time="2026-11-25T08:00:00Z")
    before = read(export_folder).artifacts[0]
    merged = merge_rows(export_folder, [old]).artifacts[0]
    for artifact, rows in ((before, [old, short, new]), (merged, [short, new]), (merged, [new])):
        found, notes = measured(artifact, frozenset({"raspberry-pi-5"}), rows)
        assert found is not None and (found.decode, found.source, notes) == (10.0, "llama_cpp 0.3.36, 4 threads", ())


def test_threads_runtimes_and_depths_have_their_own_entries(export_folder: Path) -> None:
    others = [speed_row(n_threads=2), speed_row(runtime="xllamacpp 1"), speed_row("tg128@d512", 15.0)]
    found = speeds(merge_rows(export_folder, [speed_row(), *others]))
    assert len(found) == 4
    assert {(s.n_depth, s.decode_tokens_per_s) for s in found} == {(0, 20.0), (512, 15.0)}


@pytest.mark.parametrize("kind", ["throttled", "contended"])
def test_a_disturbed_rate_is_kept_and_marked_and_never_displaces_a_valid_one(export_folder: Path, kind: str) -> None:
    bad = speed_row("tg128", 9.0, **{kind: True}, test_time="2026-11-26T10:00:00Z")
    good = speed_row("tg128", 20.0, contended=False)
    for rows, is_bad, rate in (([bad], True, 9.0), ([good], False, 20.0), ([bad], False, 20.0)):
        (speed,) = speeds(merge_rows(export_folder, rows))
        assert (getattr(speed, kind), speed.decode_tokens_per_s) == (is_bad, rate)
    (speed,) = speeds(merge_rows(export_folder, [speed_row("pp512", 90.0, contended=True)]))
    assert (speed.prefill_tokens_per_s, speed.decode_tokens_per_s) == (None, 20.0)
    assert speed.disturbances == ["contended"], "a test beside a valid one is not forgotten"


def test_of_equal_evaluations_the_one_with_valid_times_counts(export_folder: Path) -> None:
    late = quality_row(80, contended=True, answer_seconds_p95=9.0, test_time="2026-11-26T10:00:00Z")
    (found,) = merge_rows(export_folder, [late, quality_row(80, answer_seconds_p95=2.0)]).artifacts[0].evaluations
    assert found.answer_seconds_p95 == 2.0 and not found.contended


def test_a_failed_test_is_kept_with_its_reason_and_gives_no_figure(export_folder: Path) -> None:
    row = speed_row("tg128", 0.5, status="out-of-memory", reason="needs 900 MB")
    (speed,) = speeds(merge_rows(export_folder, [row]))
    assert not speed.measured
    assert (speed.tests[0].status, speed.tests[0].reason) == ("out-of-memory", "needs 900 MB")


def test_rows_of_unknown_tensors_emulators_and_no_runtime_are_told_and_left_out(export_folder: Path) -> None:
    emulated = facts(virtual="qemu-user")
    rows = [speed_row(tensor_sha256="00" * 32), speed_row(device=emulated), speed_row(format="null")]
    notes: list[str] = []
    before = (export_folder / FILE_NAME).read_bytes()
    merge_rows(export_folder, rows, note=notes.append)
    assert all(any(word in note for note in notes) for word in ("has these tensors", "emulator", "null runtime"))
    assert len(notes) == 3
    assert (export_folder / FILE_NAME).read_bytes() == before


def test_an_accuracy_of_part_of_the_split_never_stands_before_one_of_all_of_it(export_folder: Path) -> None:
    part = quality_row(10, n=10, partial=True, test_time="2026-11-25T10:00:00Z")
    (found,) = merge_rows(export_folder, [part]).artifacts[0].evaluations
    assert found.partial
    (found,) = merge_rows(export_folder, [quality_row(80)]).artifacts[0].evaluations
    assert (found.partial, found.right, found.accuracy) == (False, 80, 0.8)
    (found,) = merge_rows(export_folder, [part]).artifacts[0].evaluations
    assert not found.partial


def test_the_students_own_accuracy_is_its_own_and_no_files(export_folder: Path) -> None:
    own = quality_row(90, format="safetensors", tensor_sha256="", sha256=read(export_folder).student.sha256)
    merged = merge_rows(export_folder, [own])
    assert [one.right for one in merged.student_evaluations] == [90]
    assert all(not artifact.evaluations for artifact in merged.artifacts)


def test_a_corrupt_document_is_an_input_error_and_stays_as_it_is(export_folder: Path) -> None:
    path = export_folder / FILE_NAME
    path.write_bytes(path.read_bytes()[:500])
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"student\.json.*\n.*bench\.jsonl"):
        merge_rows(export_folder, [speed_row()])
    assert path.read_bytes() == before


def test_what_stands_there_without_tests_is_somebody_elses_and_stays(export_folder: Path) -> None:
    path = export_folder / FILE_NAME
    document = json.loads(path.read_bytes())
    document["artifacts"][0]["speeds"] = [{"device": "hand", "runtime": "r", "threads": 1, "decode_tokens_per_s": 3.0}]
    path.write_text(json.dumps(document))  # as an older arte-edge wrote it
    merged = merge_rows(export_folder, [speed_row()])
    assert [speed.device for speed in speeds(merged)] == ["hand", "raspberry-pi-5"]


def test_a_file_that_is_made_again_keeps_what_was_measured(export_folder: Path) -> None:
    fresh = read(export_folder)
    merged = merge_rows(export_folder, [speed_row()])
    assert carry_results(export_folder, fresh) == merged


TIMES = ("", "2026-11-24T10:00:00Z", "2026-11-25T10:00:00Z")
CHOICES = (("pp512", "tg128", "tg64", "tg128@d512", "quality"), TIMES, ("ok", "timeout"), (None, False, True))
ROWS = st.lists(
    st.tuples(*map(st.sampled_from, CHOICES), st.integers(1, 3), st.integers(1, 2), st.booleans()), max_size=8
)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(rows=ROWS, seed=st.integers(0, 99), cut=st.integers(0, 8))
def test_rows_give_the_same_document_in_any_order_and_however_often(
    export_folder: Path, rows: list[tuple], seed: int, cut: int
) -> None:
    def row(test: str, time: str, status: str, hot: bool | None, value: int, threads: int, part: bool) -> Row:
        if test == "quality":
            return quality_row(value, partial=part, n=10 * value, test_time=time, status=status)
        return speed_row(test, float(value), test_time=time, status=status, throttled=hot, n_threads=threads)

    made = [row(*values) for values in rows]
    start = read(export_folder)
    at_once = merge_into(start, made).student
    shuffled = random.Random(seed).sample(made, len(made))
    in_parts = merge_into(merge_into(start, shuffled[:cut]).student, shuffled[cut:]).student
    assert in_parts == at_once
    assert merge_into(at_once, made).student == at_once
    assert StudentFile.model_validate_json(at_once.model_dump_json()) == at_once
