"""Was the machine held back while it was measured? Judged from the firmware's bits, the clock and the heat.

The bits are those of ``vcgencmd get_throttled`` on a Raspberry Pi; where other systems tell the same
(Intel's throttle counters, macOS' speed limit) `arte_edge.bench.sensors` says it with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from arte_edge.results.rows import Reading

__all__ = ["FREQUENCY_CAPPED", "SOFT_LIMIT", "STICKY_SHIFT", "THROTTLED", "UNDER_VOLTAGE", "judge"]

# https://www.raspberrypi.com/documentation/computers/os.html#get_throttled
UNDER_VOLTAGE, FREQUENCY_CAPPED, THROTTLED, SOFT_LIMIT = 1 << 0, 1 << 1, 1 << 2, 1 << 3
STICKY_SHIFT = 16  # the same four, since the boot

_WORDS = (
    (UNDER_VOLTAGE, "under-voltage: use the official power supply and a short cable"),
    (THROTTLED, "too hot, throttled: cool it, or let it rest between tests"),
    (SOFT_LIMIT, "soft temperature limit reached: cool it, or let it rest between tests"),
    (FREQUENCY_CAPPED, "clock capped by the firmware: check supply and cooling"),
)
_LIMIT_C = 80.0  # where nothing better is known: a Raspberry Pi's first limit
_NEAR_C = 5.0
_FALL = 0.9  # below this share of its best clock a machine was held back
_ENOUGH = 6  # readings: two in the last third


def judge(
    before: int | None, readings: Sequence[Reading], after: int | None, limit_c: float | None = None
) -> tuple[bool | None, str]:
    """Return whether the machine was throttled, and why in words.

    Three things count: a bit that held at one of the readings, a bit "since the boot"
    that was not set before the test and is set after it (it catches what fell between
    two readings), and a clock whose best in the last third of the test is a tenth below
    its best in the first half, while the temperature was within 5 °C of its limit. The
    best counts, not the mean: a core that waits for the disk clocks down as well.

    Args:
        before: throttle bits before the test, None if this machine has none.
        readings: the sensors during it, in order.
        after: the bits after it.
        limit_c: temperature from which this machine lowers its clock; None takes 80 °C.

    Returns:
        True with the reasons, False with an empty reason, or (None, "") where nothing tells.
    """
    live = [reading.throttle_bits for reading in readings if reading.throttle_bits is not None]
    bits = 0
    for value in live:
        bits |= value & 0xF
    if before is not None and after is not None:
        bits |= (after & ~before) >> STICKY_SHIFT & 0xF
    reasons = [words for bit, words in _WORDS if bits & bit]
    heat = _hot_and_slower(readings, _LIMIT_C if limit_c is None else limit_c)
    if heat and not reasons:
        reasons.append(heat)
    if reasons:
        return True, "; ".join(reasons)
    told = bool(live) or (before is not None and after is not None) or heat is not None
    return (False, "") if told else (None, "")


def _hot_and_slower(readings: Sequence[Reading], limit_c: float) -> str | None:
    """Return what happened in words, empty if nothing did, None if clock or temperature are not known."""
    known = [(r.clock_mhz, r.temperature_c) for r in readings]
    clocks = [clock for clock, heat in known if clock is not None and heat is not None]
    heats = [heat for clock, heat in known if clock is not None and heat is not None]
    if len(clocks) < _ENOUGH:
        return None
    best, last = max(clocks[: -(-len(clocks) // 2)]), max(clocks[-(-2 * len(clocks) // 3) :])
    if last >= _FALL * best or max(heats) < limit_c - _NEAR_C:
        return ""
    return (
        f"clock fell from {best:.0f} to {last:.0f} MHz at {max(heats):.0f} °C: "
        "cool it, or let it rest between tests"
    )
