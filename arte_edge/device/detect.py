"""This machine: processor, cores, features, memory, board, and an anonymous fingerprint of them."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from arte_edge.machine import available_cores, cgroup_files, machine_bytes, total_bytes
from arte_edge.results.rows import DeviceFacts

_ROOT = Path("/")
# The features by which llama.cpp and onnxruntime choose kernels, as Linux spells them. The list is fixed,
# so that a new Linux version that reports more does not change a machine's fingerprint.
CPU_FEATURES = {
    "x86_64": (
        *("sse3", "ssse3", "sse4_1", "sse4_2", "avx", "f16c", "fma", "avx2", "bmi2", "avx_vnni"),
        *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vnni", "avx512_bf16"),
        *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    ),
    "aarch64": (*("asimd", "fphp", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "svei8mm", "sve2", "sme", "sme2"),),
    "armv7l": ("neon", "vfpv4"),
}
CPU_FEATURES["arm64"] = CPU_FEATURES["aarch64"]
_EMULATED = (0x00, 0x051)  # the MIDR of QEMU's `-cpu max`; no real processor has it


@dataclass(frozen=True)
class Cpu:
    name: str
    count: int  # logical CPUs of the machine; 0: unknown
    features: tuple[str, ...]  # those of `CPU_FEATURES` that every core has
    hypervisor: bool = False
    emulated: bool = False  # user-mode emulation: the kernel is of another architecture


def read_cpu(root: Path, arch: str, system: str) -> Cpu:
    """Return the processor of the system (Linux, Darwin, Windows) below `root`; unknown facts are empty."""
    if system == "Darwin":
        return _from_sysctl(arch)
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Cpu(_fallback_name(), 0, ())
    return parse_cpuinfo(text, arch)


def parse_cpuinfo(text: str, arch: str) -> Cpu:
    """Return the processor that ``/proc/cpuinfo`` describes to a process of architecture `arch`."""
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
    flags |= {"sse3"} if "pni" in flags else set()
    known = tuple(name for name in CPU_FEATURES.get(arch, ()) if name in flags)
    emulated = is_arm and _midr(cores[0]) == _EMULATED
    return Cpu(_clean(name), len(cores), known, hypervisor="hypervisor" in flags, emulated=emulated)


def _pairs(block: str) -> dict[str, str]:
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}


def _clean(name: str) -> str:
    """Return a processor's name without trademarks, clock frequency and repeated spaces."""
    name = re.sub(r"\((?:R|TM|tm)\)|\bCPU\b|@.*$", " ", name)
    return re.sub(r"\s+", " ", name).strip()


def _midr(core: dict[str, str]) -> tuple[int, int]:
    try:
        return int(core.get("CPU implementer", "-1"), 0), int(core.get("CPU part", "-1"), 0)
    except ValueError:
        return -1, -1


def _arm_name(cores: list[dict[str, str]]) -> str:
    """Return ``Cortex-A76``, or ``4x Cortex-A76 + 4x Cortex-A55``, the newest part first."""
    table = tomllib.loads(Path(__file__).with_name("cores.toml").read_text(encoding="utf-8"))

    def name(maker: int, part: int) -> str:
        unknown = f"ARM {maker:#04x}:{part:#05x}" if part >= 0 else "ARM"
        return str(table.get(f"{maker:#04x}", {}).get(f"{part:#05x}", unknown))

    kinds = Counter(_midr(core) for core in cores)
    ordered = sorted(kinds, key=lambda kind: kind[1], reverse=True)
    if len(ordered) == 1:
        return name(*ordered[0])
    return " + ".join(f"{kinds[kind]}x {name(*kind)}" for kind in ordered)


# sysctl's name of a feature on Apple silicon -> Linux's
_ARM_FEATURES = {"FP16": "asimdhp", "DotProd": "asimddp", "I8MM": "i8mm", "BF16": "bf16", "SME": "sme", "SME2": "sme2"}
_APPLE = {f"hw.optional.arm.FEAT_{apple}": linux for apple, linux in _ARM_FEATURES.items()} | {
    f"hw.optional.{apple}": linux
    for apple, linux in {"AdvSIMD": "asimd", "avx2_0": "avx2", "avx512f": "avx512f", "fma": "fma"}.items()
}


def _from_sysctl(arch: str) -> Cpu:
    """Return the processor of macOS; sysctl omits names that it does not know."""
    names = ("machdep.cpu.brand_string", "hw.logicalcpu", "kern.hv_vmm_present", *_APPLE)
    try:
        done = subprocess.run(
            ["sysctl", *names], capture_output=True, text=True, timeout=2, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return Cpu(_fallback_name(), 0, ())
    return parse_sysctl(done.stdout, arch)


def parse_sysctl(text: str, arch: str) -> Cpu:
    """Return the processor from the output of ``sysctl``, lines of ``name: value``."""
    values = _pairs(text)
    has = {linux for apple, linux in _APPLE.items() if values.get(apple) == "1"}
    features = tuple(name for name in CPU_FEATURES.get(arch, ()) if name in has)
    count = values.get("hw.logicalcpu", "0")
    return Cpu(
        _clean(values.get("machdep.cpu.brand_string", "")) or _fallback_name(),
        int(count) if count.isdigit() else 0,
        features,
        hypervisor=values.get("kern.hv_vmm_present") == "1",
    )


def _fallback_name() -> str:
    return platform.processor() or platform.machine() or "unknown"


# start of the firmware's vendor and product name -> hypervisor
_HYPERVISORS = dict.fromkeys(("qemu", "amazon ec2", "google", "kvm"), "kvm") | {
    "microsoft corporation virtual": "hyper-v",
    "vmware": "vmware",
    "innotek": "virtualbox",
    "xen": "xen",
    "parallels": "parallels",
    "apple inc. virtual": "apple",
}
_CONTAINER_MARKS = ("docker", "containerd", "kubepods", "libpod", "lxc")


def detect(*, root: Path = _ROOT, arch: str = "", system: str = "") -> DeviceFacts:
    """Return the facts of this machine (in tests: of another), with the shipped profile that matches it best."""
    from arte_edge.device.profiles import match_device

    arch, system = arch or machine_arch(), system or platform.system()
    cpu = read_cpu(root, arch, system)
    model = board(root, system)
    facts = DeviceFacts(
        fingerprint=fingerprint(cpu, arch, model, machine_bytes(root)),
        cpu=cpu.name,
        arch=arch,
        cores=usable_cores(root),
        features=cpu.features,
        memory_bytes=total_bytes(root),
        os=_os_name(system),
        governor=_governor(root),
        virtual=_virtual(root, cpu),
        power=_power(root),
    )
    return facts.model_copy(update={"profile": match_device(facts, model, system)})


def machine_arch() -> str:
    """Return ``x86_64``, ``aarch64`` (Linux), ``arm64`` (macOS, Windows), or the system's own name."""
    arch = platform.machine().lower()
    return "x86_64" if arch in ("amd64", "x64") else arch


def board(root: Path = _ROOT, system: str = "") -> str:
    """Return the board's model, as in ``Raspberry Pi 5 Model B Rev 1.0``; empty if unknown."""
    if (system or platform.system()) == "Darwin":
        return ""
    for name in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        if text := read_text(root / name):
            return text
    return _firmware(root)


def fingerprint(cpu: Cpu, arch: str, model: str, memory_bytes: int) -> str:
    """Return 16 hex digits over the facts that do not change between runs; nothing personal is in them.

    Memory counts in whole gigabytes, since the kernel's own share differs between versions.
    """
    facts = [cpu.name, arch, cpu.count, list(cpu.features), model, round(memory_bytes / 1e9)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def usable_cores(root: Path = _ROOT) -> int:
    """Return the cores that this process may use: its affinity, or a container's CPU quota if that is less."""
    cores = available_cores()
    for file in cgroup_files(root, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        values = [*read_text(file).split(), read_text(file.with_name("cpu.cfs_period_us"))]
        if len(values) > 1 and values[0].isdigit() and values[1].isdigit() and int(values[1]) > 0:
            cores = min(cores, max(1, -(-int(values[0]) // int(values[1]))))
    return cores


def _os_name(system: str) -> str:
    """Return system and version without the build, as in ``Linux 6.6``."""
    version = platform.mac_ver()[0] if system == "Darwin" else platform.release()
    return " ".join(["macOS" if system == "Darwin" else system, ".".join(version.split(".")[:2])]).strip()


def _governor(root: Path) -> str:
    """Return the CPU frequency governor; if clusters differ, all of them."""
    files = sorted(root.glob("sys/devices/system/cpu/cpufreq/policy*/scaling_governor"))
    return "+".join(dict.fromkeys(filter(None, map(read_text, files))))


def _virtual(root: Path, cpu: Cpu) -> str:
    """Return the layers of virtualization, outermost first, joined by ``+``."""
    layers = []
    firmware = _firmware(root).lower()
    known = [name for start, name in _HYPERVISORS.items() if firmware.startswith(start)]
    if known and "metal" not in firmware:
        layers.append(known[0])
    elif "microsoft" in read_text(root / "proc/sys/kernel/osrelease").lower():
        layers.append("wsl")
    elif cpu.hypervisor:
        layers.append("vm")
    groups = read_text(root / "proc/self/cgroup") + read_text(root / "proc/1/cgroup")
    marked = any((root / name).exists() for name in (".dockerenv", "run/.containerenv"))
    if marked or any(mark in groups for mark in _CONTAINER_MARKS):
        layers.append("container")
    if cpu.emulated:
        layers.append("qemu-user")
    return "+".join(layers)


def _firmware(root: Path) -> str:
    """Return vendor and product name."""
    folder = root / "sys/class/dmi/id"
    return f"{read_text(folder / 'sys_vendor')} {read_text(folder / 'product_name')}".strip()


def _power(root: Path) -> str:
    """Return ``mains`` or ``battery``, empty without such a sensor."""
    supplies = [
        (read_text(kind), read_text(kind.with_name("online")), read_text(kind.with_name("status")))
        for kind in sorted(root.glob("sys/class/power_supply/*/type"))
    ]
    if any(kind in ("Mains", "USB") and online == "1" for kind, online, _ in supplies):
        return "mains"
    if any(kind == "Battery" and status == "Discharging" for kind, _, status in supplies):
        return "battery"
    return ""


def read_text(path: Path) -> str:
    """Return a small file's text, empty if it cannot be read; the device tree ends its strings with a zero byte."""
    try:
        return path.read_bytes().decode(errors="replace").strip("\0 \n")
    except OSError:
        return ""
