"""SNIPS: what was drawn is what its sentences say, and a damaged or ambiguous row is not drawn."""

import json
from pathlib import Path

from shipped_tasks import snips
from shipped_tasks.__main__ import main
from tiny import Capture, Patch

from arte_edge.asking.grammar import gbnf
from arte_edge.tasks.loaders import load_task


def test_every_slot_is_in_its_sentence_and_every_split_has_every_intent() -> None:
    task = load_task("snips_slots")
    for rows in (task.seed, task.validation, task.load_test()):
        answers = [json.loads(row.target) for row in rows]
        assert len({answer["intent"] for answer in answers}) == 7
        for row, answer in zip(rows, answers, strict=True):
            assert all(value in row.input for value in answer["slots"].values()), row


def test_the_instruction_names_every_intent_with_its_slots() -> None:
    task = load_task("snips_slots")
    for call in json.loads(task.answer.json_schema)["anyOf"]:
        intent, slots = (call["properties"][key] for key in ("intent", "slots"))
        assert f"{intent['const']} ({', '.join(slots['properties'])})" in task.description
    assert len(gbnf(task.answer, "answer") or "") < 20_000


def test_a_row_that_is_damaged_or_names_a_slot_twice_is_left_out(tmp_path: Path) -> None:
    rows = [
        [{"text": "play "}, {"text": " one  song", "entity": "track"}],
        [{"text": "a", "entity": "x"}, {"text": "b", "entity": "x"}],
        [{"text": "caf\xe9"}],
    ]
    path = tmp_path / "train.json"
    path.write_bytes(json.dumps({"P": [{"data": row} for row in rows]}, ensure_ascii=False).encode("latin-1"))
    assert snips.read(path, "P") == [("play one song", {"track": "one song"})]


def test_without_its_source_the_generator_says_what_is_missing(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.delenv("ARTE_EDGE_SNIPS", raising=False)
    assert main(["snips_slots"]) == 2
    assert "sonos/nlu-benchmark" in capsys.readouterr().out
