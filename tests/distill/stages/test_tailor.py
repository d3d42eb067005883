"""What the student is trained on: of more examples than wanted, those that spread the labels."""

from collections import Counter
from typing import Any

import pytest

from arte_edge.distill.generation.inputs import Focus
from arte_edge.distill.stages.tailor import tailor

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
