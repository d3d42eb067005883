"""What machine this is, as far as it matters to speed: read from files, in milliseconds, without a model.

Nothing personal is read: no host name, user, address or serial number.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path

from arte_edge import memory
from arte_edge.device.cpuinfo import Cpu, read_cpu
from arte_edge.results.rows import DeviceFacts

__all__ = ["board", "detect", "fingerprint", "machine_arch", "usable_cores"]

_ROOT = Path("/")

# start of the firmware's vendor and product name -> what runs this machine
_HYPERVISORS = (
    ("qemu", "kvm"),
    ("amazon ec2", "kvm"),
    ("google", "kvm"),
    ("kvm", "kvm"),
    ("microsoft corporation virtual", "hyper-v"),
    ("vmware", "vmware"),
    ("innotek", "virtualbox"),
    ("xen", "xen"),
    ("parallels", "parallels"),
    ("apple inc. virtual", "apple"),
)
_CONTAINER_MARKS = ("docker", "containerd", "kubepods", "libpod", "lxc")


def detect(*, root: Path = _ROOT, arch: str = "", system: str = "") -> DeviceFacts:
    """Return the facts of this machine, with the shipped profile that fits it best.

    Args:
        root: where ``proc`` and ``sys`` are; another folder in tests.
        arch: as `machine_arch`; empty: of this process.
        system: Linux, Darwin, Windows; empty: of this process.
    """
    arch, system = arch or machine_arch(), system or platform.system()
    cpu = read_cpu(root, arch, system)
    model = board(root, system)
    facts = DeviceFacts(
        fingerprint=fingerprint(cpu, arch, model, memory.machine_bytes(root)),
        cpu=cpu.name,
        arch=arch,
        cores=usable_cores(root),
        features=cpu.features,
        memory_bytes=memory.total_bytes(root),
        os=_os_name(system),
        governor=_governor(root),
        virtual=_virtual(root, cpu),
        power=_power(root),
    )
    from arte_edge.device.catalogue import match_device  # it reads every shipped profile: only when asked

    return facts.model_copy(update={"profile": match_device(facts, model, system)})


def machine_arch() -> str:
    """Return ``x86_64``, ``aarch64`` (Linux), ``arm64`` (macOS, Windows), or what else the system says."""
    arch = platform.machine().lower()
    return "x86_64" if arch in ("amd64", "x64") else arch


def board(root: Path = _ROOT, system: str = "") -> str:
    """Return the board's model, as in ``Raspberry Pi 5 Model B Rev 1.0``; empty where nothing tells it."""
    if (system or platform.system()) == "Darwin":
        return ""
    for name in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        if text := _read(root / name):
            return text
    vendor, product = _firmware(root)
    return f"{vendor} {product}".strip()


def fingerprint(cpu: Cpu, arch: str, model: str, machine_bytes: int) -> str:
    """Return 16 hex digits over what does not change from run to run; whose machine it is is not in it.

    The memory counts in whole gigabytes, since the kernel's own share differs from version to version.
    """
    facts = [cpu.name, arch, cpu.count, list(cpu.features), model, round(machine_bytes / 1e9)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def usable_cores(root: Path = _ROOT) -> int:
    """Return the cores that this process may use: its affinity, or a container's share of time if that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for file in memory.cgroup_files(root, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        words = [*_read(file).split(), _read(file.with_name("cpu.cfs_period_us"))]
        if len(words) > 1 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
            cores = min(cores, max(1, -(-int(words[0]) // int(words[1]))))
    return cores


def _os_name(system: str) -> str:
    """Return system and version without the build, as in ``Linux 6.6``."""
    version = platform.mac_ver()[0] if system == "Darwin" else platform.release()
    return " ".join(["macOS" if system == "Darwin" else system, ".".join(version.split(".")[:2])]).strip()


def _governor(root: Path) -> str:
    """Return the clock's governor; where clusters differ, all of them."""
    files = sorted(root.glob("sys/devices/system/cpu/cpufreq/policy*/scaling_governor"))
    return "+".join(dict.fromkeys(filter(None, map(_read, files))))


def _virtual(root: Path, cpu: Cpu) -> str:
    """Return what stands between us and the hardware, outermost first, joined by ``+``."""
    layers = []
    vendor, product = _firmware(root)
    named = f"{vendor} {product}".lower()
    if "metal" not in named and (known := [name for start, name in _HYPERVISORS if named.startswith(start)]):
        layers.append(known[0])
    elif "microsoft" in _read(root / "proc/sys/kernel/osrelease").lower():
        layers.append("wsl")
    elif cpu.hypervisor:
        layers.append("vm")
    groups = _read(root / "proc/self/cgroup") + _read(root / "proc/1/cgroup")
    marked = any((root / name).exists() for name in (".dockerenv", "run/.containerenv"))
    if marked or any(mark in groups for mark in _CONTAINER_MARKS):
        layers.append("container")
    if cpu.emulated:
        layers.append("qemu-user")
    return "+".join(layers)


def _firmware(root: Path) -> tuple[str, str]:
    folder = root / "sys/class/dmi/id"
    return _read(folder / "sys_vendor"), _read(folder / "product_name")


def _power(root: Path) -> str:
    """Return ``mains`` or ``battery``; a board without either sensor says nothing."""
    supplies = [
        (_read(kind), _read(kind.with_name("online")), _read(kind.with_name("status")))
        for kind in sorted(root.glob("sys/class/power_supply/*/type"))
    ]
    if any(kind in ("Mains", "USB") and online == "1" for kind, online, _ in supplies):
        return "mains"
    if any(kind == "Battery" and status == "Discharging" for kind, _, status in supplies):
        return "battery"
    return ""


def _read(path: Path) -> str:
    """Return a small file's text, empty if it is not there; the device tree ends its strings with a zero."""
    try:
        return path.read_bytes().decode(errors="replace").strip("\0 \n")
    except OSError:
        return ""
