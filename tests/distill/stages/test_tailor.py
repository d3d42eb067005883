"""What the student is trained on: of more examples than wanted, those that spread the labels."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import Patch

from arte_edge.distill.generation.inputs import Focus
from arte_edge.distill.stages.calibrate import calibrate
from arte_edge.distill.stages.check import check
from arte_edge.distill.stages.elicit import elicit
from arte_edge.distill.stages.prefer import prefer
from arte_edge.distill.stages.tailor import tailor
from arte_edge.distill.stages.tune import tune
from arte_edge.runtimes.completion import Request, Sampling

WANTED = 8


def asked_for(words: str) -> str:
    """Return the label of a made-up question: those that begin with a to d are odd."""
    return "odd" if words.split()[0] < "e" else "even"


def written(house: Any, **settings: Any) -> list[dict[str, Any]]:
    """Return the training data of a teacher that asks more often for one label than for the other."""
    draft = house.teacher.drafts

    def drafts(sample: int) -> str:
        text: str = draft(sample)
        for words in {line.rpartition("<input>")[2].partition("</input>")[0] for line in text.splitlines()}:
            text = text.replace(f"{words}</input><target>even", f"{words}</input><target>{asked_for(words)}")
        return text

    house.teacher.drafts = drafts
    house.teacher.answer = lambda prompt: asked_for(prompt.rpartition("Question:")[2])
    run = house.run(tailor={"questions": WANTED} | settings)
    tailor(run, None, Focus())
    rows: list[dict[str, Any]] = run.read("tailor", "train.jsonl")
    run.close()
    return rows


@pytest.mark.parametrize("even", [True, False])
def test_labels_are_spread_as_evenly_as_what_there_is_allows_unless_they_are_taken_as_they_come(
    house: Any, even: bool
) -> None:
    rows = written(house, even_labels=even)
    counts = Counter(row["label"] for row in rows)
    assert len(rows) == WANTED and len({row["id"] for row in rows}) == WANTED
    assert (counts["odd"] == counts["even"]) is even
    assert even or counts["odd"] < counts["even"]


def valued(prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
    """Answer after one example as a student that learns more the larger the last number of the example is."""
    rows = []
    for prompt, own in zip(prompts, choices, strict=True):
        shown, asked = prompt.rpartition("Question:")[::2]
        numbers = re.findall(r"\d+", shown.rpartition("Question:")[2])
        worth = float(numbers[-1][-2:]) / 100 if numbers else 0.0
        right = "odd" if int(asked.split("Is ")[1].split()[0]) % 2 else "even"
        rows.append(np.array([worth if choice.startswith(right) else -worth for choice in own]))
    return rows


Rows = list[dict[str, Any]]


def selected(house: Any, **tables: Any) -> tuple[Rows, dict[str, Any], Rows]:
    """Tailor with a teacher whose rationales differ by technique and sample; return examples, summary and scores."""

    def say(request: Request, text: str, sampling: Sampling) -> str:
        technique = next((i for i, t in enumerate(house.task.techniques, 1) if t in request.prompt), 0)
        reason, tag, answer = text.partition("<ans>")
        return f"{reason} By way {7 * technique + request.sample}. {tag}{answer}"

    house.teacher.say, house.student.choose_each = say, valued
    prefer_by_length = {"prefer": {"race": "off", "length_free": False}}
    run = house.run(**{"tailor": {"questions": WANTED}, "calibrate": {"k": 6}} | prefer_by_length | tables)
    if run.config.aligned:
        elicit(run)
    calibrate(run)
    if run.config.aligned:
        prefer(run)
    run.form = "answer" if house.by_label else "reasoning-first"
    summary = tailor(run, None, Focus())
    scores = run.read("tailor", "scores.jsonl") if "selection" in summary else []
    run.close()
    return run.read("tailor", "train.jsonl"), summary, scores


@pytest.mark.parametrize(("n", "server"), [(2, False), (5, True)])
def test_the_best_of_n_rationales_of_each_question_is_kept(
    house: Any, n: int, server: bool, monkeypatch: Patch
) -> None:
    tables: dict[str, Any] = {"data": "best-of-n", "tailor": {"questions": WANTED, "best_of": n}}
    if server:  # which has no weights, and gives no probabilities
        monkeypatch.setattr("arte_edge.distill.run_context.open_engine", lambda *_, **__: house.teacher)
        tables["teacher"] = {"model": "openai:m@http://127.0.0.1:1/v1"}
    rows, summary, _ = selected(house, **tables)
    assert [re.findall(r"way (\d+)", row["rationale"]) for row in rows] == [[str(n - 1)]] * WANTED
    found = summary["selection"]
    assert found["written"] == found["scored"] == n * summary["questions"]
    assert found["student_answers"] == 6 * found["scored"] and found["kept"] > found["mean"]


def test_without_rationales_the_best_of_n_inputs_are_kept_evenly_by_label(house: Any) -> None:
    house.by_label = True
    rows, summary, scores = selected(house, data="best-of-n")
    assert summary["selection"]["scored"] == len(scores) == summary["questions"] >= 4 * WANTED
    chosen = {row["id"] for row in rows}
    assert Counter(row["label"] for row in rows) == {"even": WANTED // 2, "odd": WANTED // 2}
    for label in ("even", "odd"):
        of_label = [row for row in scores if label in row["text"]]
        kept = [row["score"] for row in of_label if row["question"] in chosen]
        left = [row["score"] for row in of_label if row["question"] not in chosen]
        assert len(kept) == WANTED // 2 and min(kept) >= max(left) > min(left)


@pytest.mark.parametrize(
    ("data", "ways"), [("random-technique", {7, 14, 21, 28}), ("one-technique", {28}), ("preferred-rationale", {28})]
)
def test_a_technique_arm_keeps_one_of_the_techniques_rationales(house: Any, data: str, ways: set[int]) -> None:
    rows, *_ = selected(house, data=data, tune={"target": "reasoning-first"})
    assert {int(re.findall(r"way (\d+)", row["rationale"])[0]) for row in rows} == ways


@pytest.mark.parametrize("role", ["labels", "inputs"])
def test_soft_labels_hold_the_teachers_distribution_beside_the_label(house: Any, role: str) -> None:
    house.by_label = True
    for share in (0.0, 0.5):
        run = house.run(
            teacher={"model": "scripted-teacher", "role": role},
            tailor={"questions": WANTED},
            tune={"soft_labels": share, "target": "answer"},
        )
        check(run, force=True)
        assert run.role == role
        made = house.calls
        tailor(run, None, Focus())
        summary, _ = tune(run)
        data, rows = (run.read(*file) for file in (("tailor", "train.jsonl"), ("tune", "rows.jsonl")))
        run.close()
        others = [row.get("others") for row in rows]
        if not share:
            assert not any(others) and not any("choices" in row for row in data)
            continue
        assert house.calls == made  # the distribution is that of the labels' own calls
        assert data[0]["choices"] == {data[0]["label"]: -0.1, other(data[0]["label"]): -2.4}
        p = 1 / (1 + math.exp(2.3))
        assert [list(one) for one in others[:WANTED]] == [[other(row["label"])] for row in data]
        assert [p for one in others[:WANTED] for p in one.values()] == pytest.approx([p / 2] * WANTED)
        assert not any(others[WANTED:])  # own labels are certain
        assert summary["soft_labels"] == WANTED and len(rows) > WANTED


def test_a_teacher_that_dropped_half_of_its_questions_drafts_twice_as_many_at_once(house: Any) -> None:
    house.by_label = True
    drafted = []
    for dropped in (0.0, 0.5):
        run = house.run(tailor={"questions": WANTED}, tune={"target": "answer"})
        run.summaries["elicit"] = {"labels": {"questions_dropped": dropped}}
        run.role = "inputs" if dropped else "labels"  # another stage
        drafted.append(tailor(run, None, Focus())["questions"])
        run.close()
    assert drafted == [math.ceil(1.25 * WANTED), 2 * WANTED]


def other(label: str) -> str:
    return {"even": "odd", "odd": "even"}[label]
