"""What a machine is, read from made-up ``/proc`` and ``/sys`` folders, and from this one."""

import getpass
import platform
import socket
import time
from pathlib import Path

import pytest
from tiny import machine

from arte_edge.device.detect import detect, parse_cpuinfo, parse_sysctl, usable_cores
from arte_edge.machine import available_bytes, total_bytes
from arte_edge.results.rows import DeviceFacts

A76_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
VENDOR = "sys/class/dmi/id/sys_vendor"
A55_FEATURES = "fp asimd fphp asimdhp asimddp"


def arm_core(number: int, part: str, features: str = A76_FEATURES, maker: str = "0x41") -> str:
    return (
        f"processor\t: {number}\nBogoMIPS\t: 108.00\nFeatures\t: {features}\n"
        f"CPU implementer\t: {maker}\nCPU architecture: 8\nCPU part\t: {part}\n\n"
    )


def x86_core(number: int, flags: str, name: str = "Intel(R) Core(TM) i3-1315U CPU @ 3.00GHz") -> str:
    return f"processor\t: {number}\nvendor_id\t: GenuineIntel\nmodel name\t: {name}\nflags\t\t: {flags}\n\n"


@pytest.fixture
def pi5(tmp_path: Path) -> Path:
    cores = "".join(arm_core(i, "0xd0b") for i in range(4)) + "Revision\t: d04171\nSerial\t: 10000000\n"
    meminfo = "MemTotal:        8245696 kB\nMemAvailable:    7000000 kB\n"
    files = {"proc/cpuinfo": cores, "proc/meminfo": meminfo}
    files |= {"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"}
    return machine(tmp_path, files | {"sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "ondemand"})


def test_a_raspberry_pi_5_is_recognised_with_all_its_facts(pi5: Path) -> None:
    facts = detect(root=pi5, arch="aarch64", system="Linux")
    assert facts.profile == "raspberry-pi-5"
    assert facts.cpu == "Cortex-A76"
    assert facts.features == ("asimd", "fphp", "asimdhp", "asimddp")
    assert facts.memory_bytes == 8245696 * 1024
    assert (facts.governor, facts.virtual, facts.power) == ("ondemand", "", "")


def test_this_machine_is_known_in_a_tenth_of_a_second_and_nothing_personal_is_told() -> None:
    detect()
    best_s = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        facts = detect()
        best_s = min(best_s, time.perf_counter() - start)
    assert best_s < 0.1
    assert facts.arch == {"AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    assert facts.cores >= 1 and facts.memory_bytes > 0 and len(facts.fingerprint) == 16
    told = facts.model_dump_json()
    assert f'"{socket.gethostname()}"' not in told
    assert f'"{getpass.getuser()}"' not in told


def test_the_fingerprint_keeps_still_but_tells_machines_apart(pi5: Path) -> None:
    def mark() -> str:
        return detect(root=pi5, arch="aarch64", system="Linux").fingerprint

    first = mark()
    meminfo = pi5 / "proc/meminfo"
    meminfo.write_text("MemTotal:        8245000 kB\nMemAvailable:    100 kB\n")  # another kernel, less free
    (pi5 / "sys/devices/system/cpu/cpufreq/policy0/scaling_governor").write_text("performance\n")
    assert mark() == first
    meminfo.write_text("MemTotal:        4050000 kB\n")
    assert mark() != first


def test_a_big_little_names_both_kinds_and_only_what_every_core_can() -> None:
    text = arm_core(0, "0xd05", A55_FEATURES) + arm_core(1, "0xd0b", A76_FEATURES + " i8mm")
    cpu = parse_cpuinfo(text, "aarch64")
    assert cpu.name == "1x Cortex-A76 + 1x Cortex-A55"
    assert "asimddp" in cpu.features and "i8mm" not in cpu.features


def test_a_core_that_is_not_in_the_table_is_named_by_its_numbers() -> None:
    assert parse_cpuinfo(arm_core(0, "0xfff", maker="0x77"), "aarch64").name == "ARM 0x77:0xfff"


def test_x86_names_lose_their_trade_marks_and_flags_their_noise() -> None:
    cpu = parse_cpuinfo(x86_core(0, "fpu pni ssse3 avx2 fma f16c avx_vnni hypervisor smep"), "x86_64")
    assert cpu.name == "Intel Core i3-1315U"
    assert cpu.features == ("sse3", "ssse3", "f16c", "fma", "avx2", "avx_vnni")
    assert cpu.hypervisor


def test_user_mode_emulation_is_told_and_matches_no_device(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/cpuinfo": x86_core(0, "avx2"), "proc/meminfo": "MemTotal: 8000000 kB"})
    facts = detect(root=root, arch="aarch64", system="Linux")
    assert facts.virtual == "qemu-user" and facts.features == () and facts.profile == ""
    assert facts.cpu == "emulated aarch64 on Intel Core i3-1315U"
    assert parse_cpuinfo(arm_core(0, "0x051", maker="0x00"), "aarch64").emulated  # newer QEMU hides the host


def test_apple_silicon_speaks_through_sysctl() -> None:
    text = (
        "machdep.cpu.brand_string: Apple M1\nhw.logicalcpu: 8\nkern.hv_vmm_present: 0\n"
        "hw.optional.AdvSIMD: 1\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\n"
    )
    cpu = parse_sysctl(text, "arm64")
    assert (cpu.name, cpu.count, cpu.features, cpu.hypervisor) == ("Apple M1", 8, ("asimd", "asimddp"), False)


@pytest.mark.parametrize(
    ("files", "virtual"),
    [
        ({VENDOR: "QEMU"}, "kvm"),
        ({VENDOR: "VMware, Inc.", ".dockerenv": ""}, "vmware+container"),
        ({"proc/1/cgroup": "0::/kubepods/pod1"}, "container"),
        ({"proc/sys/kernel/osrelease": "5.15.90.1-microsoft-standard-WSL2"}, "wsl"),
        ({VENDOR: "Dell Inc."}, ""),
    ],
)
def test_virtual_machines_are_found(tmp_path: Path, files: dict[str, str], virtual: str) -> None:
    root = machine(tmp_path, {"proc/cpuinfo": x86_core(0, "avx2")} | files)
    assert detect(root=root, arch="x86_64", system="Linux").virtual == virtual


@pytest.mark.parametrize(("online", "status", "power"), [("1", "Full", "mains"), ("0", "Discharging", "battery")])
def test_a_laptop_says_if_it_is_plugged_in(tmp_path: Path, online: str, status: str, power: str) -> None:
    files = {"AC/type": "Mains", "AC/online": online, "BAT0/type": "Battery", "BAT0/status": status}
    root = machine(tmp_path, {f"sys/class/power_supply/{name}": text for name, text in files.items()})
    assert detect(root=root, arch="x86_64", system="Linux").power == power


def test_a_containers_limit_counts_in_both_versions_of_control_groups(tmp_path: Path) -> None:
    meminfo = {"proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 6000000 kB"}
    two = machine(tmp_path / "v2", meminfo | {"proc/self/cgroup": "0::/a/b"})
    limits = {"memory.max": "1000000000", "memory.current": "1000"}
    limits |= {"b/memory.max": "max", "b/cpu.max": "100000 100000"}
    machine(two, {f"sys/fs/cgroup/a/{name}": text for name, text in limits.items()})
    assert total_bytes(two) == 1_000_000_000
    assert available_bytes(two) == 1_000_000_000 - 1000
    stat = two / "sys/fs/cgroup/a/memory.stat"
    stat.write_text("anon 500\ninactive_file 300\nactive_file 100\n")
    assert available_bytes(two) == 1_000_000_000 - 600, "cached files are given up on demand"
    assert usable_cores(two) == 1
    one = machine(tmp_path / "v1", meminfo | {"proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/"})
    limit = "sys/fs/cgroup/memory/memory.limit_in_bytes"  # the host's path is not mounted in here
    machine(one, {limit: "500000000"})
    assert total_bytes(one) == 500_000_000
    machine(one, {limit: "9223372036854771712"})
    assert total_bytes(one) == 8_000_000 * 1024


def test_a_machine_that_tells_nothing_is_still_described(tmp_path: Path) -> None:
    facts = detect(root=tmp_path, arch="riscv64", system="Linux")
    assert isinstance(facts, DeviceFacts)
    assert (facts.memory_bytes, facts.features, facts.profile) == (0, (), "")
