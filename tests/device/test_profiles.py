"""Profiles: what ships is whole and sourced, and what is wrong with a file is said with file and key.

Which device is meant: shipped, one's own, a file, an address; and which profile fits a machine.
"""

from pathlib import Path

import pytest
from tiny import facts

from arte_edge import catalog
from arte_edge.device.profiles import (
    Profile,
    add_device,
    find_device,
    match_device,
    own_folder,
    own_names,
    read_profile,
    remove_device,
)
from arte_edge.errors import InputError
from arte_edge.results.rows import DeviceFacts

NAMES = catalog.names("devices")
GOOD = 'title = "Board"\ncores = 4\nmemory_bytes = [4000000000]\n'
PEAK = "[peak_bandwidth]\nvalue = 1.0\n"


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_fact_has_a_source_and_figures_that_can_be_true(name: str) -> None:
    profile = find_device(name)
    assert profile.name == name and profile.remote is None and profile.match
    assert profile.recipe in catalog.names("export")
    assert {"cores", "features", "memory_bytes", "system_bytes"} <= set(profile.sources)
    assert set(profile.sources) <= set(Profile.model_fields)
    peak, effective = profile.peak_bandwidth, profile.effective_bandwidth
    assert peak is not None and 1e9 < peak.value < 1e12
    assert effective is None or 0.1 * peak.value < effective.value < 0.9 * peak.value
    assert profile.system_bytes < profile.memory_bytes[0]
    assert profile.throttle_c is None or 60 <= profile.throttle_c.value <= 110
    assert profile.power_w is None or 1 <= profile.power_w.value <= 200
    for fact in profile.facts().values():
        says_so = "assumed" in fact.source or "not looked up" in fact.source or fact.evidence != "measured"
        assert says_so, "nobody of us measured these boards"


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        (GOOD + "corse = 4\n", "unknown key 'corse'", "cores"),
        (GOOD + PEAK + "evidence = 'measured'\nsuorce = 'abcd'\n", "suorce", "source"),
        (GOOD + "[match]\nmodle = 'x'\n", "unknown key 'match.modle'", "model"),
        (GOOD + PEAK + "evidence = 'hearsay'\nsource = 'abcd'\n", "evidence", ""),
        (GOOD + PEAK + "evidence = 'published'\n", "peak_bandwidth.source", ""),
        (GOOD.replace("cores = 4", "cores = 0"), "cores", ""),
        (GOOD + "base = 'raspberry-pi-55'\n", "base", "raspberry-pi-5"),
        ("title = ", "not TOML", ""),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path: Path, text: str, says: str, hint: str) -> None:
    path = tmp_path / "board.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_profile(path)
    assert str(path) in caught.value.message and says in caught.value.message
    assert hint in caught.value.hint


def machine(arch: str, cpu: str = "x", features: tuple[str, ...] = ()) -> DeviceFacts:
    return facts(profile="", arch=arch, cpu=cpu, features=features)


AVX2 = ("avx2", "fma")
AVX512 = (*AVX2, "avx512f", "avx512_vnni")


@pytest.mark.parametrize(
    ("device", "model", "system", "profile"),
    [
        (machine("aarch64"), "Raspberry Pi 5 Model B Rev 1.0", "Linux", "raspberry-pi-5"),
        (machine("aarch64"), "Raspberry Pi 500 Rev 1.0", "Linux", "raspberry-pi-5"),
        (machine("aarch64"), "Raspberry Pi 4 Model B Rev 1.4", "Linux", "raspberry-pi-4b"),
        (machine("aarch64"), "Raspberry Pi Zero 2 W Rev 1.0", "Linux", "raspberry-pi-zero-2w"),
        (machine("aarch64"), "Orange Pi 5", "Linux", "orange-pi-5"),
        (machine("aarch64"), "NVIDIA Jetson Orin Nano Developer Kit", "Linux", "jetson-orin-nano"),
        (machine("arm64", "Apple M2"), "", "Darwin", "apple-m-series"),
        (machine("arm64", "Snapdragon(R) X Elite"), "", "Windows", "snapdragon-x"),
        (machine("aarch64", "Oryon"), "", "Linux", "snapdragon-x"),
        (machine("x86_64", "Intel Core i3-1315U", AVX2), "", "Linux", "x86-laptop-avx2"),
        (machine("x86_64", "AMD Ryzen AI 5 340", AVX512), "", "Linux", "x86-laptop-avx512"),
        (machine("x86_64", "AMD EPYC", AVX512), "", "Linux", "generic-x86"),
        (machine("aarch64", "Neoverse-N1"), "", "Linux", "generic-arm64"),
        (machine("riscv64"), "", "Linux", ""),
    ],
)
def test_each_machine_finds_its_profile(device: DeviceFacts, model: str, system: str, profile: str) -> None:
    assert match_device(device, model, system) == profile


def test_an_own_device_takes_its_facts_from_its_base(model_cache: Path) -> None:
    path = add_device("kitchen", "pi@kitchen", base="raspberry-pi-5", notes="fan, 27 W supply")
    assert path == own_folder() / "kitchen.toml" == model_cache / "devices" / "kitchen.toml"
    device, base = find_device("kitchen"), find_device("raspberry-pi-5")
    assert device.remote and device.remote.host == "pi@kitchen" and device.remote.notes == "fan, 27 W supply"
    assert (device.name, device.base) == ("kitchen", "raspberry-pi-5")
    assert device.effective_bandwidth == base.effective_bandwidth and device.memory_bytes == base.memory_bytes
    assert device.match is None and base.remote is None
    path.write_text(path.read_text().replace("\n[remote]", "memory_bytes = [4294967296]\n\n[remote]", 1))
    assert find_device("kitchen").memory_bytes == (4294967296,)
    assert remove_device("kitchen") == path and own_names() == []


def test_an_address_is_a_device_too_and_a_file_as_well(tmp_path: Path, model_cache: Path) -> None:
    device = find_device("pi@10.0.0.7")
    assert device.remote and device.remote.host == "pi@10.0.0.7" and device.base == "generic-arm64"
    file = tmp_path / "board.toml"
    file.write_text('title = "Board"\ncores = 2\nmemory_bytes = [1000]\n')
    assert find_device(str(file)).title == "Board"


HOSTS = ["-oProxyCommand=touch x", "pi@-x", "pi@host;ls", "pi@ho st", "pi@host:22", "$(id)@host", "a@b@c", "", "@host"]


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_that_ssh_or_a_shell_could_misread_is_rejected(host: str, model_cache: Path) -> None:
    with pytest.raises(InputError):
        add_device("kitchen", host)
    assert own_names() == []
    own_folder().mkdir(parents=True)  # nor by hand
    text = f'title = "x"\nbase = "generic-arm64"\n[remote]\nhost = "{host}"\n'
    (own_folder() / "bad.toml").write_text(text)
    with pytest.raises(InputError, match=r"remote\.host"):
        find_device("bad")


@pytest.mark.parametrize("name", ["-rf", "a b", "../x", "Kitchen", "", "raspberry-pi-5"])
def test_a_name_that_is_none_or_is_taken_is_rejected(name: str, model_cache: Path) -> None:
    with pytest.raises(InputError):
        add_device(name, "pi@kitchen")


def test_nothing_is_overwritten(model_cache: Path) -> None:
    add_device("kitchen", "pi@kitchen")
    with pytest.raises(InputError, match="exists already"):
        add_device("kitchen", "pi@other")


def test_an_unknown_base_names_the_nearest(model_cache: Path) -> None:
    with pytest.raises(InputError) as caught:
        add_device("kitchen", "pi@kitchen", base="raspberry-pi-6")
    assert "raspberry-pi" in caught.value.hint
    with pytest.raises(InputError, match="python"):
        add_device("kitchen", "pi@kitchen", python="-c")
