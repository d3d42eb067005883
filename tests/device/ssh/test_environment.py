"""Which environment a device gets: never torch, a compiler only when asked for, pip's reasons in words.

The package as a device gets it: the running code, the same bytes every time, nothing that does not belong.
"""

import dataclasses
import os
import sys
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Folders, Patch

from arte_edge import catalog
from arte_edge.bench.remote import ENV_BYTES, check_disk
from arte_edge.device.profiles import Remote, Runtimes
from arte_edge.device.ssh import environment
from arte_edge.device.ssh.connection import ReconnectPolicy
from arte_edge.device.ssh.environment import (
    Marker,
    Plan,
    Site,
    env_bytes_missing,
    fetch_wheels,
    install,
    install_commands,
    is_offline,
    own_wheel,
    plan,
    platform_tags,
    read_marker,
    send_wheel,
)
from arte_edge.device.ssh.workdir import Probe, Python, parse, probe
from arte_edge.errors import ArteError, InputError

PYTHON = Python("/usr/bin/python3", (3, 11, 2), False, 64)
SYSTEM = {"work": "/home/pi/.cache/arte-edge-device", "system": "Linux", "machine": "aarch64"}
BYTES = {"memory_bytes": 8 << 30, "available_bytes": 7 << 30, "free_bytes": 20_000_000_000}
PI = Probe(**SYSTEM, **BYTES, glibc_minor=36, pythons=(PYTHON,), can_compile=True)
BARE = dataclasses.replace(PI, can_compile=False)


def chosen(pi: Probe = PI, *formats: str, runtimes: Runtimes = Runtimes(), **more: Any) -> Plan:  # noqa: B008
    return plan(pi, formats or ["gguf"], runtimes, "kitchen", **more)


HAS = dataclasses.replace(PI, pythons=(dataclasses.replace(PYTHON, has_llama_cpp=True),))
PREFERS = Runtimes(gguf=("xllamacpp", "llama-cpp-python"))


@pytest.mark.parametrize(
    ("pi", "formats", "more", "extras", "why"),
    [
        (PI, "gguf", {}, ["xllamacpp"], "--compile"),
        (BARE, "gguf", {}, ["xllamacpp"], "there is no compiler"),
        (HAS, "gguf onnx-genai", {}, ["onnx"], "installed there already"),
        (HAS, "gguf", {"runtimes": PREFERS}, ["xllamacpp"], "the profile prefers it"),
        (PI, "gguf", {"compile_there": True}, ["gguf"], "compiled there"),
        (BARE, "gguf", {"installed": ["gguf"]}, ["gguf"], "earlier"),
    ],
)
def test_a_device_gets_the_runtime_that_suits_it_and_hears_why(
    pi: Probe, formats: str, more: dict[str, Any], extras: list[str], why: str
) -> None:
    found = chosen(pi, *formats.split(), **more)
    assert list(found.extras) == extras and why in found.why
    assert (found.compiles, found.sees_system) == ("compile_there" in more, extras == ["onnx"])


@pytest.mark.parametrize(
    ("facts", "python", "more", "message", "hint"),
    [
        ({"can_compile": False}, {}, {"compile_there": True}, "no C and C\\+\\+ compiler", "--compile"),
        ({}, {"bits": 32}, {}, "32-bit Python", "python"),
        ({}, {"version": (3, 9, 2)}, {}, r"has Python 3\.9\.2; .* 3\.11", "python"),
        ({"pythons": ()}, {}, {}, "has no Python", "python"),
        ({"machine": "armv7l"}, {}, {}, "armv7l", "64-bit"),
    ],
)
def test_what_cannot_be_installed_is_refused(
    facts: dict[str, Any], python: dict[str, Any], more: dict[str, Any], message: str, hint: str
) -> None:
    pythons = (dataclasses.replace(PYTHON, **python),)
    with pytest.raises(ArteError, match=f"kitchen.* {message}|{message}") as error:
        chosen(dataclasses.replace(PI, **{"pythons": pythons} | facts), **more)
    assert hint in error.value.hint


def test_a_checkpoint_is_rejected_since_torch_never_goes_there() -> None:
    with pytest.raises(InputError, match="never installed on a device"):
        chosen(PI, "gguf", "safetensors")


@pytest.mark.parametrize("extras", [("xllamacpp",), ("onnx",), ("onnx", "xllamacpp")])
def test_nothing_is_compiled_by_accident(extras: tuple[str, ...]) -> None:
    found = dataclasses.replace(chosen(), extras=extras)
    commands = install_commands(found, "/w/env", "/w/arte.whl", wheelhouse="/w/house")
    (pip,) = [words for words in commands if any(word.startswith("/w/arte.whl[") for word in words)]
    assert pip[pip.index("--only-binary") + 1] == ":all:"
    assert "--no-index" in pip and "/w/house" in pip
    assert pip[-1] == f"/w/arte.whl[{','.join(extras)}]"


def test_pips_words_tell_a_missing_network_from_a_missing_package() -> None:
    assert is_offline("NewConnectionError: [Errno -3] Temporary failure in name resolution")
    assert not is_offline("ERROR: No matching distribution found for xllamacpp>=2026.1")


def test_space_counts_what_is_not_there_yet() -> None:
    found = chosen(PI, "gguf", "onnx")
    everything = env_bytes_missing(Marker(), found, ENV_BYTES)
    assert everything == ENV_BYTES[""] + ENV_BYTES["xllamacpp"] + ENV_BYTES["onnx"]
    assert env_bytes_missing(Marker("sum", ("xllamacpp",)), found, ENV_BYTES) == ENV_BYTES["onnx"]
    check_disk(PI, 19_000_000_000, "kitchen")
    with pytest.raises(ArteError, match=r"20\.00 GB are free"):
        check_disk(PI, 20_000_000_000, "kitchen")


@given(st.text())
def test_any_output_of_a_device_is_read_without_a_crash(text: str) -> None:
    parse(text)
    parse(f"python={text}\ndf={text}\nlibc={text}")


def test_a_pi_is_read_as_it_is() -> None:
    text = (
        "work=/home/pi/w\nsystem=Linux\nmachine=aarch64\nlibc=glibc 2.36\ntool=cc\ntool=c++\n"
        'python={"version": [3, 9, 2], "path": "/p", "llama_cpp": false, "bits": "64bit"}\npython=\n'
        'python={"version": [3, 12, 0], "path": "/q", "llama_cpp": true, "bits": "64bit"}\n'
        "MemTotal:        8256224 kB\nMemAvailable:    7000000 kB\n"
        "df=/dev/mmcblk0p2     122374536 9000000 108000000       8% /\n"
    )
    found = parse(text)
    assert found.python and found.python.path == "/q" and found.can_compile
    assert (found.memory_bytes, found.available_bytes) == (8256224 * 1024, 7000000 * 1024)
    assert (found.free_bytes, found.glibc_minor) == (108000000 * 1024, 36)


def test_the_loopback_device_tells_all_of_it(device: Any) -> None:
    with device.ssh() as ssh:
        found = probe(ssh, Remote(host="kitchen"))
    assert found.work == str(device.work)
    assert found.python and found.memory_bytes and found.free_bytes and found.glibc_minor


def test_an_environment_is_made_once_from_copied_wheels_when_no_index_is_reached(
    device: Any, tmp_path: Path, program: Callable[[str, str], Path], monkeypatch: Patch
) -> None:
    """The real pip there, without ensurepip and without a network; of what our wheel needs only one package."""
    monkeypatch.setattr(environment.Plan, "requirements", lambda self, wheel: [wheel, "tomlkit"])
    real_fetch = environment.fetch_wheels

    def fetch(requirements: Any, *there: Any) -> list[Path]:
        fetched.append(list(requirements))
        return real_fetch([*requirements, "--no-deps"], *there)

    def commands(*args: Any, **words: Any) -> list[list[str]]:
        made = install_commands(*args, **words)[:-1]  # the last asks the command, which misses its needs here
        return [made[0], *([*line, "--no-deps"] for line in made[1:])]

    fetched: list[list[str]] = []
    monkeypatch.setattr(environment, "fetch_wheels", fetch)
    monkeypatch.setattr(environment, "install_commands", commands)
    # A Python as Debian without python3-venv has it, and an index that nobody answers for.
    no_index = "export PIP_CONFIG_FILE=/dev/null PIP_INDEX_URL=http://127.0.0.1:9/simple"
    no_pip = 'case "$*" in "-m venv /"*) echo "ensurepip is not available"; exit 1;; esac'
    python = program("python3", f'{no_index}\n{no_pip}\nexec {sys.executable} "$@"')
    wheel = own_wheel(tmp_path)
    said: list[str] = []
    with device.ssh() as ssh:
        found = probe(ssh, Remote(host="kitchen", python=str(python)))
        here = Python(str(python), found.pythons[0].version, False, 64)
        made = chosen(dataclasses.replace(found, pythons=(here,)))
        site = Site(ssh, found, ReconnectPolicy(said.append), said.append)
        there = send_wheel(site, wheel)
        path = install(site, made, wheel, there)
        assert read_marker(ssh, f"{found.work}/{made.env_name}").extras == ("xllamacpp",)
        n_said = len(said)
        assert install(site, made, wheel, there) == path
        assert len(said) == n_said
    assert Path(path).is_file() and os.access(path, os.X_OK)
    assert [len(words) for words in fetched] == [1, 2]
    assert fetched[0] == ["pip"] and fetched[1][1] == "tomlkit"
    assert any("no ensurepip" in line for line in said)
    assert any("no package index" in line for line in said)
    assert list(Path(path).parents[1].glob("lib/python3*/site-packages/tomlkit"))
    assert list(Path(path).parents[1].glob("lib/python3*/site-packages/arte_edge/_data/devices/*.toml"))


ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: Folders) -> Path:
    return own_wheel(tmp_path_factory.mktemp("wheel"))


def test_it_holds_the_running_code_and_the_shipped_data_and_no_weights(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert files["arte_edge/device/ssh/agent.py"] == (ROOT / "arte_edge/device/ssh/agent.py").read_bytes()
    for kind in ("devices", "export", "suites"):
        for name in catalog.names(kind):
            assert f"arte_edge/_data/{kind}/{name}.toml" in files
    assert {name.split("/")[0] for name in files} == {"arte_edge", wheel.name.split("-py3")[0] + ".dist-info"}
    assert not any(name.endswith((".pyc", ".gguf", ".safetensors")) or "/." in name for name in files)


def test_the_same_files_give_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    assert own_wheel(tmp_path).read_bytes() == wheel.read_bytes()


def test_its_metadata_name_the_extras_and_no_torch_outside_of_them(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        needs = message_from_bytes(archive.read(name)).get_all("Requires-Dist")
    core = [need for need in needs if "extra ==" not in need]
    assert any(need.startswith("psutil") for need in core)
    assert not any(need.startswith(("torch", "scipy", "onnx", "gguf")) for need in core)
    assert any(need.startswith("xllamacpp") and "xllamacpp" in need.partition("extra ==")[2] for need in needs)


def test_platform_tags_are_those_that_the_device_would_accept() -> None:
    tags = platform_tags("aarch64", 19)
    assert tags == [f"manylinux{version}_aarch64" for version in ("_2_19", "_2_18", "_2_17", "2014")]


def test_a_package_without_such_a_wheel_is_an_error_that_names_it(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ArteError, match="xllamacpp") as error:
        fetch_wheels(["xllamacpp"], "aarch64", 36, (3, 11), tmp_path / "house")
    assert "aarch64" in error.value.hint
