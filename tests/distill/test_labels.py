"""Who is believed when a teacher contradicts itself."""

from __future__ import annotations

import pytest

from arte_edge.distill.labels import Policy, agrees, decide


@pytest.mark.parametrize(
    ("policy", "answers", "label"),
    [
        ("teacher", ["no", "no", "no"], "yes"),
        ("teacher", [None, None], "yes"),
        ("teacher", [], "yes"),
        ("vote", ["no", "no"], "no"),  # two against the target's one
        ("vote", ["no"], "yes"),  # a tie that the target is part of
        ("vote", ["no", "no", "yes"], "yes"),  # two each
        ("vote", ["no", "no", "maybe", "maybe"], None),  # a tie without the target
        ("vote", ["no", None, None], "yes"),  # what cannot be read has no vote
        ("vote", [None, None], None),
        ("vote", [], None),
        ("drop-disagreement", ["yes", "yes"], "yes"),
        ("drop-disagreement", ["yes", None], "yes"),
        ("drop-disagreement", ["yes", "no"], None),
        ("drop-disagreement", ["no", "no"], None),
        ("drop-disagreement", [None], None),
    ],
)
def test_the_policy_decides_the_label(policy: Policy, answers: list[str | None], label: str | None) -> None:
    assert decide(policy, "yes", answers) == label


def test_the_order_of_the_votes_does_not_matter() -> None:
    answers = ["no", "yes", "no", "maybe"]
    assert {decide("vote", "maybe", answers), decide("vote", "maybe", answers[::-1])} == {"maybe"}


@pytest.mark.parametrize(
    ("policy", "label", "answer", "usable"),
    [
        ("vote", "yes", "yes", True),
        ("vote", "yes", "no", False),
        ("vote", None, "yes", False),
        ("vote", "yes", None, False),
        ("drop-disagreement", None, "yes", False),
        ("teacher", "yes", "no", True),  # the paper's: a rationale is taken at its word
        ("teacher", "yes", None, False),
    ],
)
def test_a_rationale_is_usable_if_it_ends_at_the_label(
    policy: Policy, label: str | None, answer: str | None, usable: bool
) -> None:
    assert agrees(policy, label, answer) is usable
