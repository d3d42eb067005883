"""Counting: the numbers in the list add up to the target."""

import re

from shipped_tasks.object_counting import _KINDS, generate

from arte_edge.tasks.normalize import WORDS


def test_the_things_of_the_kind_add_up_to_the_target() -> None:
    for rows in generate().values():
        for row in rows:
            listed, question = row.input.split(". ")
            kind = next(kind for kind in _KINDS if question.startswith(f"How many {kind} "))
            total = 0
            for thing in _KINDS[kind]:
                one, many = thing.split("/")
                for word, name in re.findall(rf"\b(\w+) ({many}|{one})(?=,|$)", listed):
                    assert (name == one) == (word in ("a", "an")), row
                    total += 1 if name == one else WORDS.index(word)
            assert str(total) == row.target, row


def test_no_thing_is_of_two_kinds() -> None:
    things = [thing for kind in _KINDS.values() for thing in kind]
    assert len(things) == len(set(things))
