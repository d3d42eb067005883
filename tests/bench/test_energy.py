import time
from pathlib import Path

import pytest
from tiny import machine

from arte_edge.bench.sensors import EnergyMeter, find_probe

# What a Raspberry Pi 5 prints, shortened: rails with volts and amperes, one of volts alone.
PMIC = """#!/bin/sh
case "$1" in
  get_throttled) echo throttled=0x0 ;;
  pmic_read_adc)
    echo "     VDD_CORE_A current(7)=2.50000000A"
    echo "   3V3_SYS_A current(1)=0.10000000A"
    echo "   3V3_SYS_V volt(9)=3.30000000V"
    echo "     VDD_CORE_V volt(15)=0.80000000V"
    echo "      EXT5V_V volt(24)=5.10000000V" ;;
esac
"""


def program(tmp_path: Path, text: str) -> str:
    script = tmp_path / "vcgencmd"
    script.write_text(text)
    script.chmod(0o755)
    return str(script)


def measure(meter: EnergyMeter, seconds: float = 0.3) -> tuple[float | None, str, float]:
    begin = time.monotonic()
    meter.start()
    time.sleep(seconds)
    joules, source = meter.stop()
    return joules, source, time.monotonic() - begin


def rapl(root: Path, domain: str, name: str, energy_uj: int, range_uj: int = 262_143_328_850) -> Path:
    folder = f"sys/class/powercap/{domain}"
    machine(root, {f"{folder}/name": name, f"{folder}/max_energy_range_uj": str(range_uj)})
    machine(root, {f"{folder}/energy_uj": str(energy_uj)})
    return root / folder / "energy_uj"


def test_a_machine_that_measures_nothing_gives_no_energy(tmp_path: Path) -> None:
    meter = EnergyMeter(root=tmp_path)
    assert measure(meter, 0)[:2] == (None, "")
    assert meter.source == ""
    script = program(tmp_path, '#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled=0x0 || echo error=1\n')
    assert find_probe(root=tmp_path, vcgencmd=script) is None  # a firmware without the rails
    assert EnergyMeter(root=tmp_path).stop() == (None, "")  # never started


def test_a_steady_meter_is_its_reading_times_the_time(tmp_path: Path) -> None:
    joules, source, seconds = measure(EnergyMeter(root=tmp_path, power_watts=10, period_s=0.05))
    assert source == "meter"
    assert joules == pytest.approx(10 * seconds, rel=0.2)


def test_rapl_counts_the_packages_and_nothing_twice(tmp_path: Path) -> None:
    first = rapl(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    second = rapl(tmp_path, "intel-rapl:1", "package-1", 5_000_000)
    for domain, name in (("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram"), ("intel-rapl:2", "psys")):
        rapl(tmp_path, domain, name, 0)
    meter = EnergyMeter(root=tmp_path, period_s=60)
    meter.start()
    first.write_text("4000000\n")
    second.write_text("5500000\n")
    (tmp_path / "sys/class/powercap/intel-rapl:0:0/energy_uj").write_text("2000000\n")
    assert meter.stop() == (3.5, "rapl")


def test_a_counter_that_begins_again_twice_is_followed_by_the_samples(tmp_path: Path) -> None:
    counter = rapl(tmp_path, "intel-rapl:0", "package-0", 0, range_uj=10_000_000)
    meter = EnergyMeter(root=tmp_path, period_s=0.01)
    meter.start()
    for energy_uj in (6_000_000, 2_000_000, 8_000_000, 4_000_000):  # 24 J in all
        # renamed into place, as the kernel's own file is never half written
        fresh = counter.with_name("fresh")
        fresh.write_text(f"{energy_uj}\n")
        fresh.replace(counter)
        time.sleep(0.2)
    assert meter.stop() == (24.0, "rapl")
    meter.start()  # and again, from zero
    counter.write_text("4200000\n")
    assert meter.stop() == (pytest.approx(0.2), "rapl")


def test_a_counter_for_root_alone_is_not_replaced_by_a_guess(tmp_path: Path) -> None:
    counter = rapl(tmp_path, "intel-rapl:0", "package-0", 1)
    counter.unlink()
    counter.mkdir()  # unreadable for root as well, who runs tests in containers
    assert measure(EnergyMeter(root=tmp_path), 0)[:2] == (None, "")


def test_an_ina219_is_integrated_over_time(tmp_path: Path) -> None:
    chip = "sys/class/hwmon/hwmon2"
    machine(tmp_path, {"sys/class/hwmon/hwmon1/name": "rpi_volt"})
    machine(tmp_path, {f"{chip}/name": "ina219", f"{chip}/power1_input": "5200000"})
    joules, source, seconds = measure(EnergyMeter(root=tmp_path, period_s=0.05))
    assert source == "ina219"
    assert joules == pytest.approx(5.2 * seconds, rel=0.2)


def test_a_jetson_is_read_at_its_input(tmp_path: Path) -> None:
    chip = "sys/class/hwmon/hwmon1"
    machine(tmp_path, {f"{chip}/name": "ina3221", f"{chip}/in1_label": "VDD_IN", f"{chip}/in1_input": "5000"})
    machine(tmp_path, {f"{chip}/curr1_input": "1500", f"{chip}/in2_label": "VDD_CPU_GPU_CV"})
    machine(tmp_path, {f"{chip}/in2_input": "5000", f"{chip}/curr2_input": "900"})
    probe = find_probe(root=tmp_path)
    assert probe is not None and (probe.source, probe.watts()) == ("ina3221", 7.5)


def test_a_pi_5_adds_up_the_rails_that_it_measures_whole(tmp_path: Path) -> None:
    script = program(tmp_path, PMIC)
    probe = find_probe(root=tmp_path, vcgencmd=script)
    assert probe is not None and probe.source == "pmic"
    assert probe.watts() == pytest.approx(2.5 * 0.8 + 0.1 * 3.3)
    joules, source, seconds = measure(EnergyMeter(root=tmp_path, vcgencmd=script, period_s=0.1))
    assert source == "pmic" and joules == pytest.approx(2.33 * seconds, rel=0.3)


def test_a_reading_that_fails_makes_the_sum_unknown_not_small(tmp_path: Path) -> None:
    chip = "sys/class/hwmon/hwmon2"
    machine(tmp_path, {f"{chip}/name": "ina219", f"{chip}/power1_input": "5200000"})
    meter = EnergyMeter(root=tmp_path, period_s=0.02)
    meter.start()
    (tmp_path / chip / "power1_input").replace(tmp_path / "gone")
    time.sleep(0.2)
    (tmp_path / "gone").replace(tmp_path / chip / "power1_input")
    assert meter.stop() == (None, "")


def test_the_users_meter_comes_first_then_the_board_then_the_package(tmp_path: Path) -> None:
    rapl(tmp_path, "intel-rapl:0", "package-0", 1)
    assert EnergyMeter(root=tmp_path).source == "rapl"
    machine(tmp_path, {"sys/class/hwmon/hwmon2/name": "ina219", "sys/class/hwmon/hwmon2/power1_input": "1"})
    assert EnergyMeter(root=tmp_path).source == "ina219"
    assert EnergyMeter(root=tmp_path, power_watts=3).source == "meter"
