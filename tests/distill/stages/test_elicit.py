"""Drafting with a scripted teacher: what is kept, and that what is kept is not asked again."""

from typing import Any

import pytest

from arte_edge.distill.stages.elicit import elicit
from arte_edge.errors import StoppedEarly
from arte_edge.tasks.task import content_key


def files(house: Any) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((house.folder / "elicit").glob("*.json*"))}


def test_every_question_gets_one_rationale_a_technique(house: Any) -> None:
    run = house.run()
    summary = elicit(run)
    assert (summary["questions"], summary["rationales"]) == (8, 32)
    questions = run.read("elicit", "questions.jsonl")
    rationales = run.read("elicit", "rationales.jsonl")
    asked = {(row["question"], row["technique"]) for row in rationales}
    assert asked == {(row["id"], t) for row in questions for t in range(4)}
    assert all(row["answer"] == "even" and row["usable"] for row in rationales)
    assert all(row["id"] == content_key(row["input"])[:16] for row in questions)
    assert summary["labels"]["agree_with_target"] == 1.0


def test_what_stands_in_a_split_is_refused_with_the_reason(house: Any) -> None:
    from_splits = [house.task.seed[0], house.task.validation[0], house.task.load_test()[0]]
    good = house.teacher.drafts

    def drafts(sample: int) -> str:
        bad = "\n".join(
            f"<Question_{9 + i}><input>{e.input.upper()}</input><target>even</target></Question_{9 + i}>"
            for i, e in enumerate(from_splits)
        )
        return f"{good(sample)}\n{bad}"

    house.teacher.drafts = drafts
    run = house.run()
    reasons = elicit(run)["rejected"]
    assert set(reasons) == {"repeats a seed", "overlaps validation", "overlaps test"}
    inputs = {content_key(row["input"]) for row in run.read("elicit", "questions.jsonl")}
    assert not inputs & {example.key for example in from_splits}
    rejected = run.read("elicit", "rejected.jsonl")
    assert {row["reason"] for row in rejected} == set(reasons)


def test_a_stage_that_is_done_makes_no_call_and_opens_no_engine(house: Any) -> None:
    first = elicit(house.run())
    before, spent = files(house), house.calls
    run = house.run()
    assert elicit(run) == first
    assert (run.calls.made, run.calls.cached, house.calls) == (0, 0, spent)
    assert files(house) == before


def test_a_run_killed_before_its_manifest_takes_every_call_from_the_store(house: Any) -> None:
    elicit(house.run())
    before, spent = files(house), house.calls
    for path in (house.folder / "elicit").iterdir():
        path.unlink()
    run = house.run()
    elicit(run)
    assert house.calls == spent
    assert run.calls.made == 0 and run.calls.cached > 0
    assert files(house) == before


def test_a_torn_store_ends_in_the_same_data(house: Any) -> None:
    elicit(house.run())
    before = files(house)
    for path in (house.folder / "elicit").iterdir():
        path.unlink()
    log = house.folder / "calls.jsonl"
    log.write_bytes(log.read_bytes()[: log.stat().st_size * 2 // 3])
    run = house.run()
    elicit(run)
    assert run.calls.made > 0 and run.calls.cached > 0
    assert files(house) == before


def test_another_setting_makes_the_stage_again_from_the_calls_it_shares(house: Any) -> None:
    elicit(house.run())
    spent = house.calls
    run = house.run(elicit={"questions": 8, "label": "vote"})
    assert elicit(run)["labels"]["policy"] == "vote"
    assert house.calls == spent


def test_a_teacher_that_gives_one_text_to_every_question_is_stopped_with_the_reason(house: Any) -> None:
    house.teacher.word = lambda prompt: "plain"
    with pytest.raises(StoppedEarly, match="32 repeat one text"):
        elicit(house.run())


def test_parroted_rationales_are_counted_and_the_others_stay_usable(house: Any) -> None:
    own = house.teacher.word
    house.teacher.word = lambda prompt: "plain" if "Halve" in prompt else own(prompt)
    run = house.run()
    summary = elicit(run)
    assert (summary["parroted"], summary["usable_rationales"]) == (8, 24)
    refused = {row["technique"] for row in run.read("elicit", "rationales.jsonl") if not row["usable"]}
    assert refused == {1}
