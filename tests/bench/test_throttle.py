from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.bench.throttle import judge
from arte_edge.results.rows import Reading


def readings(*values: tuple[float | None, float | None, int | None]) -> list[Reading]:
    """(temperature, clock, bits) a second each."""
    return [
        Reading(t_s=t, temperature_c=heat, clock_mhz=clock, throttle_bits=bits)
        for t, (heat, clock, bits) in enumerate(values)
    ]


COOL = readings(*[(50.0, 2400.0, 0)] * 8)


def test_a_cool_machine_with_clean_bits_was_not_throttled() -> None:
    assert judge(0, COOL, 0) == (False, "")


def test_a_machine_that_tells_nothing_is_not_judged() -> None:
    assert judge(None, [], None) == (None, "")
    assert judge(None, readings(*[(None, None, None)] * 8), None) == (None, "")
    assert judge(None, readings(*[(60.0, None, None)] * 8), None) == (
        None,
        "",
    )  # hot or not, it takes a clock


@pytest.mark.parametrize(
    ("bit", "words"),
    [
        (0x1, "under-voltage: use the official power supply"),
        (0x2, "clock capped"),
        (0x4, "too hot"),
        (0x8, "soft temperature limit"),
    ],
)
def test_each_bit_is_said_in_words(bit: int, words: str) -> None:
    during = readings((50.0, 2400.0, 0), (50.0, 2400.0, bit), (50.0, 2400.0, 0))
    throttled, reason = judge(0, during, 0)
    assert throttled is True and words in reason
    throttled, reason = judge(0, COOL, bit << 16)  # between two readings: only the sticky bit saw it
    assert throttled is True and words in reason


def test_what_happened_before_the_test_does_not_count_against_it() -> None:
    assert judge(0x50000, COOL, 0x50000) == (False, "")
    assert judge(0x50000, COOL, 0xD0000)[0] is True


def test_several_reasons_are_all_named() -> None:
    reason = judge(0, readings((85.0, 1500.0, 0x5)), 0x50000)[1]
    assert "under-voltage" in reason and "too hot" in reason


def test_a_clock_that_falls_in_the_heat_is_throttling_even_without_bits() -> None:
    falling = readings(*[(70.0, 2400.0, None)] * 5, *[(84.0, 1500.0, None)] * 5)
    throttled, reason = judge(None, falling, None)
    assert throttled is True and "2400 to 1500 MHz at 84 °C" in reason
    assert judge(None, falling, None, limit_c=100.0) == (False, "")  # this one may be hotter than that


def test_a_core_that_waits_is_not_throttled() -> None:
    idle_now_and_then = readings(*[(78.0, clock, None) for clock in (600.0, 2400.0, 600.0, 2400.0) * 4])
    assert judge(None, idle_now_and_then, None) == (False, "")
    cool = readings(*[(45.0, 2400.0, None)] * 5, *[(45.0, 600.0, None)] * 5)
    assert judge(None, cool, None) == (False, "")


@given(
    st.none() | st.integers(0, 2**20),
    st.lists(
        st.tuples(
            st.none() | st.floats(-20, 120), st.none() | st.floats(0, 6000), st.none() | st.integers(0, 2**20)
        ),
        max_size=20,
    ),
    st.none() | st.integers(0, 2**20),
)
def test_any_readings_are_judged_and_only_throttling_has_a_reason(
    before: int | None, values: list[tuple[float | None, float | None, int | None]], after: int | None
) -> None:
    throttled, reason = judge(before, readings(*values), after)
    assert bool(reason) == (throttled is True)
