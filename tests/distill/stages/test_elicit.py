"""Drafting with a scripted teacher: what is kept, and that what is kept is not asked again."""

import json
from typing import Any

import pytest

from arte_edge.distill.stages.elicit import elicit
from arte_edge.errors import StoppedEarly
from arte_edge.tasks.task import content_key


def files(house: Any) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((house.folder / "elicit").glob("*.json*"))}


def test_every_question_gets_one_rationale_a_technique(house: Any) -> None:
    good, bad = house.teacher.drafts, "<Question_9><input>Is 0 even or ODD?</input><target>even</target>"
    house.teacher.drafts = lambda sample: f"{good(sample)}\n{bad}"
    run = house.run()
    summary = elicit(run)
    assert (summary["questions"], summary["rationales"]) == (8, 32)
    assert set(summary["rejected"]) == {"repeats a seed"}
    assert {row["reason"] for row in run.read("elicit", "rejected.jsonl")} == {"repeats a seed"}
    questions = run.read("elicit", "questions.jsonl")
    rationales = run.read("elicit", "rationales.jsonl")
    asked = {(row["question"], row["technique"]) for row in rationales}
    assert asked == {(row["id"], t) for row in questions for t in range(4)}
    assert all(row["answer"] == "even" and row["usable"] for row in rationales)
    assert all(row["id"] == content_key(row["input"])[:16] for row in questions)
    assert summary["labels"]["agree_with_target"] == 1.0


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


def test_other_confusions_in_the_check_make_other_drafts(house: Any) -> None:
    house.by_label, answers = True, house.folder / "check" / "answers.jsonl"
    answers.parent.mkdir(parents=True)
    manifest, made = house.folder / "elicit" / "manifest.json", []
    for given in ("odd", "odd", "even"):
        answers.write_text(json.dumps({"target": "odd", "own_labels": given}) + "\n")
        run = house.run()
        elicit(run)
        run.close()
        made.append((manifest.read_text(), house.calls))
    assert made[0] == made[1] and made[2][0] != made[1][0]


def test_parroted_rationales_are_counted_and_others_stay_usable_but_one_text_for_all_stops_the_run(house: Any) -> None:
    own = house.teacher.word
    house.teacher.word = lambda prompt: "plain" if "Halve" in prompt else own(prompt)
    run = house.run()
    summary = elicit(run)
    assert (summary["parroted"], summary["usable_rationales"]) == (8, 24)
    refused = {row["technique"] for row in run.read("elicit", "rationales.jsonl") if not row["usable"]}
    assert refused == {1}
    house.teacher.word, house.folder = lambda prompt: "plain", house.folder.with_name("other")
    with pytest.raises(StoppedEarly, match="32 repeat one text"):
        elicit(house.run())
