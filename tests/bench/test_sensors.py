"""Sensors of a fake machine: temperature, clock, throttling; and the memory that a process and its files take."""

import mmap
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Make, machine

from arte_edge.bench.sensors import Sensors
from arte_edge.bench.timing import judge
from arte_edge.bench.worker import mapped_bytes, peak_rss_bytes
from arte_edge.results.rows import Reading

# A stand-in for the firmware's command: a real process, whose answers a test can change while it runs.
VCGENCMD = """#!/bin/sh
case "$1" in
  get_throttled) cat "{folder}/throttled" ;;
  measure_clock) echo "frequency(0)=1500345728" ;;
  measure_temp) echo "temp=61.5'C" ;;
  *) echo "error=1 error_msg=\\"Command not registered\\"" ;;
esac
"""


@pytest.fixture
def write(tmp_path: Path) -> Make:
    """Make files of a made-up machine: ``write({"sys/class/…": "48000"})``."""
    return partial(machine, tmp_path)


@pytest.fixture
def vcgencmd(tmp_path: Path) -> Path:
    folder = tmp_path / "firmware"
    folder.mkdir()
    (folder / "throttled").write_text("throttled=0x0\n")
    script = folder / "vcgencmd"
    script.write_text(VCGENCMD.format(folder=folder))
    script.chmod(0o755)
    return script


def wait_for(sensors: Sensors, n: int) -> None:
    deadline = time.monotonic() + 20
    while len(sensors.readings()) < n and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(sensors.readings()) >= n


PI = {
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "48312",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2400000",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "600000",
}


def test_a_machine_without_sensors_gives_empty_readings_and_no_error(tmp_path: Path) -> None:
    with Sensors(period_s=0.02, root=tmp_path) as sensors:
        wait_for(sensors, 3)
    assert (sensors.bits_before, sensors.bits_after, sensors.limit_c) == (None, None, None)
    times = [reading.t_s for reading in sensors.readings()]
    assert times == sorted(times) and 0 <= times[0] < times[-1]
    for reading in sensors.readings():
        assert set(reading.model_dump(exclude={"t_s"}).values()) == {None}


def test_temperature_and_the_fastest_clock_come_from_the_kernel(tmp_path: Path, write: Make) -> None:
    write(PI)
    with Sensors(period_s=0.02, root=tmp_path) as sensors:
        wait_for(sensors, 1)
        write({"sys/class/thermal/thermal_zone0/temp": "83000"})
        wait_for(sensors, len(sensors.readings()) + 2)
    first, last = sensors.readings()[0], sensors.readings()[-1]
    assert (first.temperature_c, first.clock_mhz, first.throttle_bits) == (48.312, 2400.0, None)
    assert last.temperature_c == 83.0


def test_on_a_pi_the_firmware_says_clock_and_throttling(tmp_path: Path, write: Make, vcgencmd: Path) -> None:
    write(PI)
    with Sensors(period_s=0.02, root=tmp_path, vcgencmd=str(vcgencmd)) as sensors:
        wait_for(sensors, 1)
        (vcgencmd.parent / "throttled").write_text("throttled=0x50005\n")
        wait_for(sensors, len(sensors.readings()) + 2)
        (vcgencmd.parent / "throttled").write_text("throttled=0x50000\n")
    readings = sensors.readings()
    assert readings[0].clock_mhz == pytest.approx(1500.35, abs=0.01)  # not the 2400 that were asked for
    assert readings[0].temperature_c == 48.312
    assert readings[0].throttle_bits == 0 and 0x50005 in [reading.throttle_bits for reading in readings]
    assert (sensors.bits_before, sensors.bits_after) == (0, 0x50000)
    throttled, reason = judge(sensors.bits_before, readings, sensors.bits_after)
    assert throttled is True and "official power supply" in reason and "too hot" in reason
    with Sensors(root=tmp_path / "no thermal zone", vcgencmd=str(vcgencmd)) as sensors:
        pass
    assert sensors.readings()[0].temperature_c == 61.5


@pytest.mark.parametrize("answer", ["VCHI initialization failed", "throttled=", ""])
def test_firmware_without_an_answer_is_ignored(tmp_path: Path, write: Make, vcgencmd: Path, answer: str) -> None:
    write(PI)
    (vcgencmd.parent / "throttled").write_text(answer)
    with Sensors(period_s=0.02, root=tmp_path, vcgencmd=str(vcgencmd)) as sensors:
        wait_for(sensors, 1)
    assert sensors.readings()[0].clock_mhz == 2400.0 and sensors.bits_after is None


def test_the_processors_zone_is_read_and_no_other(tmp_path: Path, write: Make) -> None:
    zones = {"acpitz": 27800, "iwlwifi_1": 90000, "gpu-thermal": 91000, "soc-thermal": 70000}
    for n, (kind, value) in enumerate(zones.items()):
        folder = f"sys/class/thermal/thermal_zone{n}"
        write({f"{folder}/type": kind, f"{folder}/temp": str(value)})
    with Sensors(root=tmp_path) as sensors:
        pass
    assert sensors.readings()[0].temperature_c == 70.0
    for n, (kind, value) in enumerate({"bigcore0-thermal": 76000, "bigcore1-thermal": 79000}.items(), 4):
        folder = f"sys/class/thermal/thermal_zone{n}"
        write({f"{folder}/type": kind, f"{folder}/temp": str(value)})
    folder = "sys/class/thermal/thermal_zone5"
    write({f"{folder}/trip_point_0_type": "passive", f"{folder}/trip_point_0_temp": "85000"})
    write({f"{folder}/trip_point_1_type": "critical", f"{folder}/trip_point_1_temp": "115000"})
    with Sensors(root=tmp_path) as sensors:
        pass
    assert sensors.readings()[0].temperature_c == 79.0  # the hottest of the cores
    assert sensors.limit_c == 85.0


def test_on_x86_the_package_is_read_and_its_counters_tell_throttling(tmp_path: Path, write: Make) -> None:
    chip, cpu = "sys/class/hwmon/hwmon3", "sys/devices/system/cpu/cpu0/thermal_throttle"
    write({"sys/class/hwmon/hwmon0/name": "nvme", "sys/class/hwmon/hwmon0/temp1_input": "99000"})
    write({f"{chip}/name": "coretemp", f"{chip}/temp1_label": "Package id 0", f"{chip}/temp1_input": "62000"})
    write({f"{chip}/temp1_crit": "100000", f"{chip}/temp2_label": "Core 0", f"{chip}/temp2_input": "64000"})
    write({f"{cpu}/package_throttle_count": "7", f"{cpu}/core_throttle_count": "5"})
    with Sensors(period_s=0.02, root=tmp_path) as sensors:
        wait_for(sensors, 2)
        assert judge(sensors.bits_before, sensors.readings(), sensors.bits_after) == (False, "")
        write({f"{cpu}/core_throttle_count": "6"})
    assert sensors.readings()[0].temperature_c == 62.0
    assert sensors.limit_c == 100.0
    throttled, reason = judge(sensors.bits_before, sensors.readings(), sensors.bits_after)
    assert throttled is True and "too hot" in reason


def test_a_sensor_that_vanishes_or_writes_nonsense_is_none_from_there(tmp_path: Path, write: Make) -> None:
    write(PI)
    with Sensors(period_s=0.02, root=tmp_path) as sensors:
        wait_for(sensors, 1)
        (tmp_path / "sys/class/thermal/thermal_zone0/temp").unlink()
        write({"sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "<unknown>"})
        wait_for(sensors, len(sensors.readings()) + 2)
    last = sensors.readings()[-1]
    assert (last.temperature_c, last.clock_mhz) == (None, 600.0)


def test_the_block_ends_at_once_however_long_the_period(tmp_path: Path) -> None:
    begin = time.monotonic()
    with Sensors(period_s=60, root=tmp_path, power_watts=6.5) as sensors:
        pass
    assert sensors.readings()[0].power_w == 6.5  # the user's meter
    assert time.monotonic() - begin < 5 and len(sensors.readings()) == 1


def readings(*values: tuple[float | None, float | None, int | None]) -> list[Reading]:
    """(temperature, clock, bits) a second each."""
    names = ("temperature_c", "clock_mhz", "throttle_bits")
    return [Reading(t_s=t, **dict(zip(names, row, strict=True))) for t, row in enumerate(values)]


COOL = readings(*[(50.0, 2400.0, 0)] * 8)


def test_nothing_is_said_of_a_machine_that_tells_nothing_and_old_events() -> None:
    assert judge(None, [], None) == (None, "")
    assert judge(None, readings(*[(None, None, None)] * 8), None) == (None, "")
    assert judge(None, readings(*[(60.0, None, None)] * 8), None) == (None, "")  # it takes a clock
    assert judge(0, COOL, 0) == (False, "")
    assert judge(0x50000, COOL, 0x50000) == (False, "")
    assert judge(0x50000, COOL, 0xD0000)[0] is True
    reason = judge(0, readings((85.0, 1500.0, 0x5)), 0x50000)[1]
    assert "under-voltage" in reason and "too hot" in reason


BITS = {0x1: "under-voltage: use the official power supply", 0x2: "clock capped", 0x4: "too hot"}


@pytest.mark.parametrize(("bit", "words"), [*BITS.items(), (0x8, "soft temperature limit")])
def test_each_bit_is_explained(bit: int, words: str) -> None:
    during = readings((50.0, 2400.0, 0), (50.0, 2400.0, bit), (50.0, 2400.0, 0))
    throttled, reason = judge(0, during, 0)
    assert throttled is True and words in reason
    throttled, reason = judge(0, COOL, bit << 16)  # between two readings: only the sticky bit saw it
    assert throttled is True and words in reason


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


BIT_FIELDS = st.none() | st.integers(0, 2**20)
VALUES = st.tuples(st.none() | st.floats(-20, 120), st.none() | st.floats(0, 6000), BIT_FIELDS)


@given(BIT_FIELDS, st.lists(VALUES, max_size=20), BIT_FIELDS)
def test_only_throttling_has_a_reason(before: Any, values: Any, after: Any) -> None:
    throttled, reason = judge(before, readings(*values), after)
    assert bool(reason) == (throttled is True)


linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
MB = 1 << 20


def test_the_peak_stays_after_the_memory_is_given_back() -> None:
    before = peak_rss_bytes()
    assert before > 5 * MB
    block = bytearray(before + 32 * MB)  # more than ever was there: a peak that does not move tells nothing
    block[::4096] = b"x" * len(block[::4096])
    peak = peak_rss_bytes()
    assert peak >= len(block)
    del block
    assert peak_rss_bytes() >= peak - MB


def test_other_systems_answer_about_the_same_or_nothing(tmp_path: Path) -> None:
    assert 0.5 < peak_rss_bytes(tmp_path) / peak_rss_bytes() < 2


@linux
def test_a_child_does_not_inherit_the_peak_of_its_parent() -> None:
    code = "from arte_edge.bench.worker import peak_rss_bytes; print(peak_rss_bytes())"
    block = bytearray(200 * MB)
    block[::4096] = b"x" * len(block[::4096])
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(child.stdout) < 150 * MB < peak_rss_bytes()


@linux
def test_only_the_pages_of_the_models_files_that_were_read_count(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    model, other = folder / "model file.gguf", tmp_path / "other.bin"
    for path in (model, other):
        path.write_bytes(b"w" * 8 * MB)
    assert mapped_bytes([model]) == 0
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) > 0
        assert mapped_bytes([model]) == 8 * MB
        assert mapped_bytes([folder]) == 8 * MB  # a folder stands for its files
        assert mapped_bytes([other]) == 0
        (tmp_path / "link.gguf").symlink_to(model)
        assert mapped_bytes([tmp_path / "link.gguf"]) == 8 * MB
