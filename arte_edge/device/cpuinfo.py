"""What the kernel says of the processor: its name, its cores and the features that quantized kernels use.

Linux tells it in ``/proc/cpuinfo``, in words on x86 and in numbers on ARM; macOS in ``sysctl``.
Under user-mode emulation the file is the host's, which gives the emulation away.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CPU_FEATURES", "Cpu", "parse_cpuinfo", "parse_sysctl", "read_cpu"]

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
