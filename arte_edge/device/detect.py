"""This machine: processor, cores, features, memory, board, and a fingerprint of them without names."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from arte_edge import memory
from arte_edge.results.rows import DeviceFacts

__all__ = [
    "CPU_FEATURES",
    "Cpu",
    "board",
    "detect",
    "fingerprint",
    "machine_arch",
    "parse_cpuinfo",
    "parse_sysctl",
    "read_cpu",
    "usable_cores",
]

# What llama.cpp and onnxruntime choose kernels by, in the kernel's spelling. The list is short and
# fixed, so that a new kernel that tells more does not change a machine's fingerprint.
CPU_FEATURES = {
    "x86_64": (
        *("sse3", "ssse3", "sse4_1", "sse4_2", "avx", "f16c", "fma", "avx2", "bmi2", "avx_vnni"),
        *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vnni", "avx512_bf16"),
        *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    ),
    "aarch64": (
        *("asimd", "fphp", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "svei8mm", "sve2", "sme", "sme2"),
    ),
    "armv7l": ("neon", "vfpv4"),
}
CPU_FEATURES["arm64"] = CPU_FEATURES["aarch64"]
# implementer of the MIDR register -> its parts: Arm's and Qualcomm's technical reference manuals, Linux
_CORES = {
    0x41: "b76 ARM1176, c07 Cortex-A7, c08 Cortex-A8, c09 Cortex-A9, c0f Cortex-A15, d03 Cortex-A53, "
    "d04 Cortex-A35, d05 Cortex-A55, d07 Cortex-A57, d08 Cortex-A72, d09 Cortex-A73, d0a Cortex-A75, "
    "d0b Cortex-A76, d0c Neoverse-N1, d0d Cortex-A77, d0e Cortex-A76AE, d40 Neoverse-V1, d41 Cortex-A78, "
    "d42 Cortex-A78AE, d44 Cortex-X1, d46 Cortex-A510, d47 Cortex-A710, d48 Cortex-X2, d49 Neoverse-N2, "
    "d4b Cortex-A78C, d4c Cortex-X1C, d4d Cortex-A715, d4e Cortex-X3, d4f Neoverse-V2, d80 Cortex-A520, "
    "d81 Cortex-A720, d82 Cortex-X4, d84 Neoverse-V3, d8e Neoverse-N3",
    0x4E: "004 Carmel",
    0x51: "001 Oryon, 802 Kryo-3XX-Gold, 803 Kryo-3XX-Silver, 804 Kryo-4XX-Gold, 805 Kryo-4XX-Silver",
    0x61: "022 Icestorm-M1, 023 Firestorm-M1, 032 Blizzard-M2, 033 Avalanche-M2",
}
_EMULATED = (0x00, 0x051)  # the MIDR of QEMU's `-cpu max`, which no maker sells


@dataclass(frozen=True)
class Cpu:
    """One machine's processor."""

    name: str
    count: int  # logical CPUs of the machine, whoever may use them; 0: not told
    features: tuple[str, ...]  # those of `CPU_FEATURES` that every core has
    hypervisor: bool = False
    emulated: bool = False  # user-mode emulation: the kernel below is of another architecture


def read_cpu(root: Path, arch: str, system: str) -> Cpu:
    """Return what the system below `root` says of its processor; never raises for what it does not tell.

    Args:
        arch: as `arte_edge.device.detect.machine_arch` returns it, e.g. ``aarch64``.
        system: Linux, Darwin, Windows.
    """
    if system == "Darwin":
        return _from_sysctl(arch)
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Cpu(_fallback_name(), 0, ())
    return parse_cpuinfo(text, arch)


def parse_cpuinfo(text: str, arch: str) -> Cpu:
    """Return what a ``/proc/cpuinfo`` says to a process that believes to run on `arch`."""
    blocks = [_pairs(block) for block in re.split(r"\n\s*\n", text)]
    shared = {key: value for block in blocks if "processor" not in block for key, value in block.items()}
    cores = [block for block in blocks if block.get("processor", "").isdigit()]
    is_x86 = any("flags" in core and "vendor_id" in core for core in cores)
    is_arm = any("CPU implementer" in core for core in cores)
    if is_x86:
        name = cores[0].get("model name", "").strip() or "x86_64"
        flags = set.intersection(*(set(core.get("flags", "").split()) for core in cores))
    elif is_arm:
        name = _arm_name(cores)
        flags = set.intersection(*(set(core.get("Features", "").split()) for core in cores))
    else:
        name = next((b["Model"] for b in (*cores, shared) if b.get("Model")), "") or _fallback_name()
        flags = set()
    emulated = (is_x86 and arch in ("aarch64", "armv7l")) or (is_arm and arch in ("x86_64", "i686"))
    if emulated:  # the host's features are not those of the emulated processor
        return Cpu(f"emulated {arch} on {_clean(name)}", len(cores), (), emulated=True)
    known = tuple(name for name in CPU_FEATURES.get(arch, ()) if name in _as_linux_spells(flags))
    emulated = is_arm and _midr(cores[0]) == _EMULATED
    return Cpu(_clean(name), len(cores), known, hypervisor="hypervisor" in flags, emulated=emulated)


def _pairs(block: str) -> dict[str, str]:
    return {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())
    }


def _clean(name: str) -> str:
    """Return a processor's name without trade marks, the clock and doubled spaces."""
    name = re.sub(r"\((?:R|TM|tm)\)|\bCPU\b|@.*$", " ", name)
    return re.sub(r"\s+", " ", name).strip()


def _as_linux_spells(flags: set[str]) -> set[str]:
    return flags | ({"sse3"} if "pni" in flags else set())


def _midr(core: dict[str, str]) -> tuple[int, int]:
    try:
        return int(core.get("CPU implementer", "-1"), 0), int(core.get("CPU part", "-1"), 0)
    except ValueError:
        return -1, -1


def _core_name(maker: int, part: int) -> str:
    pairs = (core.split() for core in _CORES.get(maker, "").split(", ") if core)
    return {int(number, 16): name for number, name in pairs}.get(
        part, f"ARM {maker:#04x}:{part:#05x}" if part >= 0 else "ARM"
    )


def _arm_name(cores: list[dict[str, str]]) -> str:
    """Return ``Cortex-A76``, or ``4x Cortex-A76 + 4x Cortex-A55``, the newest part first."""
    kinds = Counter(_midr(core) for core in cores)
    ordered = sorted(kinds, key=lambda kind: kind[1], reverse=True)
    if len(ordered) == 1:
        return _core_name(*ordered[0])
    return " + ".join(f"{kinds[kind]}x {_core_name(*kind)}" for kind in ordered)


# sysctl's name of a feature on Apple silicon -> Linux's
_APPLE = {
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.arm.FEAT_SME2": "sme2",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
    "hw.optional.fma": "fma",
}


def _from_sysctl(arch: str) -> Cpu:
    """Ask macOS, once for all names; one that this system does not know is left out of its answer."""
    names = ("machdep.cpu.brand_string", "hw.logicalcpu", "kern.hv_vmm_present", *_APPLE)
    try:
        done = subprocess.run(
            ["sysctl", *names], capture_output=True, text=True, timeout=2, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return Cpu(_fallback_name(), 0, ())
    return parse_sysctl(done.stdout, arch)


def parse_sysctl(text: str, arch: str) -> Cpu:
    """Return what ``sysctl`` printed, one ``name: value`` a line."""
    told = _pairs(text)
    has = {linux for apple, linux in _APPLE.items() if told.get(apple) == "1"}
    features = tuple(name for name in CPU_FEATURES.get(arch, ()) if name in has)
    count = told.get("hw.logicalcpu", "0")
    return Cpu(
        _clean(told.get("machdep.cpu.brand_string", "")) or _fallback_name(),
        int(count) if count.isdigit() else 0,
        features,
        hypervisor=told.get("kern.hv_vmm_present") == "1",
    )


def _fallback_name() -> str:
    import platform

    return platform.processor() or platform.machine() or "unknown"


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
    from arte_edge.device.profiles import match_device  # it reads every shipped profile: only when asked

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
