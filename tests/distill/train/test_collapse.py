import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.distill.train.collapse import ProbeResult, chosen_drop_nats, collapse_reason
from arte_edge.distill.train.common import CollapseLimits

LIMITS = CollapseLimits(min_valid=0.5, length_factor=2.0, max_chosen_drop_nats=10.0)
START = ProbeResult(valid_rate=0.8, mean_tokens=60.0)


@pytest.mark.parametrize(
    ("now", "drop_nats", "named"),
    [
        (ProbeResult(0.39, 60), 0.0, "valid drafts fell from 80% to 39%"),
        (ProbeResult(0.8, 121), 0.0, "mean length went from 60 to 121"),
        (ProbeResult(0.8, 29), 0.0, "mean length went from 60 to 29"),
        (ProbeResult(0.8, 60), 10.1, "lost 10.1 nats"),
    ],
)
def test_each_sign_of_collapse_is_named_with_its_limit(now: ProbeResult, drop_nats: float, named: str) -> None:
    reason = collapse_reason(LIMITS, START, now, drop_nats)
    assert named in reason and "limit" in reason


@given(st.floats(0.4, 1.0), st.floats(30, 120), st.floats(-50, 10))
def test_within_the_limits_nothing_is_said(valid: float, tokens: float, drop_nats: float) -> None:
    assert collapse_reason(LIMITS, START, ProbeResult(valid, tokens), drop_nats) == ""


@pytest.mark.parametrize(
    ("start", "now"),
    [
        (None, ProbeResult(0.0, 0.0)),  # the first look
        (START, None),  # a training without a probe
        (ProbeResult(0.0, 0.0), ProbeResult(0.0, 300.0)),  # nothing valid at the start cannot fall further
    ],
)
def test_without_anything_to_compare_nothing_is_said(start: ProbeResult | None, now: ProbeResult | None) -> None:
    assert collapse_reason(LIMITS, start, now, 0.0) == ""


def test_the_drop_is_the_mean_of_recent_steps_in_nats() -> None:
    assert chosen_drop_nats([], 0.1) == 0.0
    assert chosen_drop_nats([-9.0, -1.0, -1.0, -1.0, -1.0], 0.1) == pytest.approx(10.0)
    assert chosen_drop_nats([0.5, 0.5], 0.1) == pytest.approx(-5.0)
