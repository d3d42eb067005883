"""Home commands: natural in length, new phrasings in the test split, slots that were said."""

import re

from shipped_tasks.home import _phrases, generate_calls, generate_intents

from arte_edge.tasks.loaders import load_task

ROOMS = {"kitchen", "bedroom", "living_room", "bathroom", "office", "hallway"}
DOORS = {"front_door", "back_door", "garage_door", "balcony_door"}


def frame_of(text: str) -> str:
    """Return the frame that `text` was made of."""
    intents, fillers, _ = _phrases()
    for intent in intents.values():
        for frame in (*intent.asked, *intent.hinted):
            pattern = re.escape(frame)
            for slot, spoken in fillers.items():
                pattern = pattern.replace(re.escape(f"{{{slot}}}"), f"({'|'.join(map(re.escape, spoken))})")
            if re.search(rf"(^|, ){pattern}(, |$)", text):
                return frame
    raise AssertionError(f"no frame gives: {text}")


def test_no_phrasing_occurs_in_two_splits() -> None:
    for splits in (generate_intents(), generate_calls()):
        frames = {split: {frame_of(row.input) for row in rows} for split, rows in splits.items()}
        assert not frames["test"] & (frames["seed"] | frames["validation"])
        assert not frames["seed"] & frames["validation"]


def test_no_frame_says_two_things() -> None:
    frames = [frame for intent in _phrases()[0].values() for frame in (*intent.asked, *intent.hinted)]
    assert len(frames) == len(set(frames))


def test_intents_are_short_and_never_name_their_label() -> None:
    for rows in generate_intents().values():
        for row in rows:
            assert 6 <= len(row.input.split()) <= 18
            assert "_" not in row.input


def test_a_call_names_the_slots_that_were_said() -> None:
    fillers = _phrases()[1]
    for rows in generate_calls().values():
        for row in rows:
            call = re.fullmatch(r"(\w+)\(([a-z_]+)?(?:, )?(\d+)?\)", row.target)
            assert call, row
            assert (call[2] or "kitchen") in ROOMS | DOORS
            for slot, value in (("room", call[2]), ("door", call[2])):
                said = [spoken for spoken in fillers[slot] if f" {spoken}" in row.input]
                if value in fillers[slot].values():
                    assert value in {fillers[slot][spoken] for spoken in said}, row
            if call[3]:
                slot = {"dim": "percent", "set_heat": "degrees", "set_timer": "minutes"}[call[1]]
                said = [spoken for spoken, value in fillers[slot].items() if value == call[3]]
                assert any(spoken in row.input for spoken in said), row


def test_the_descriptions_name_every_label_call_and_slot_value() -> None:
    intents, fillers, _ = _phrases()
    labels = {intent.label for intent in intents.values() if intent.label}
    assert set(load_task("home_intents").answer.choices) == labels
    description = load_task("home_commands").description
    for intent in intents.values():
        assert re.sub(r"[{}]", "", intent.call) in description
    assert all(value in description for slot in ("room", "door") for value in fillers[slot].values())
