"""The package as a device gets it: the running code, the same bytes every time, nothing that does not belong."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from arte_edge import catalog
from arte_edge.device import wheels
from arte_edge.device.wheels import Target, fetch_wheels, own_wheel
from arte_edge.errors import ArteError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_wheel(tmp_path_factory.mktemp("wheel"))


def test_it_holds_the_running_code_and_the_shipped_data_and_no_weights(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert files["arte_edge/device/job.py"] == (ROOT / "arte_edge/device/job.py").read_bytes()
    for kind in ("devices", "export", "suites"):
        for name in catalog.names(kind):
            assert f"arte_edge/_data/{kind}/{name}.toml" in files
    assert {name.split("/")[0] for name in files} == {"arte_edge", wheel.name.split("-py3")[0] + ".dist-info"}
    assert not any(name.endswith((".pyc", ".gguf", ".safetensors")) or "/." in name for name in files)


def test_the_same_files_give_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    assert own_wheel(tmp_path).read_bytes() == wheel.read_bytes()


def test_pip_takes_it_with_its_extras_and_without_torch(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin/python")]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    subprocess.run([*pip, "install", "-q", "--no-index", "--no-deps", str(wheel)], check=True)
    code = (
        "import json; from importlib.metadata import requires; from arte_edge import catalog;"
        "print(json.dumps([requires('arte-edge'), str(catalog.root('devices'))]))"
    )
    command = [venv / "bin/python", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)

    needs, devices = json.loads(done.stdout)
    core = [need for need in needs if "extra ==" not in need]
    assert any(need.startswith("psutil") for need in core)
    assert not any(need.startswith(("torch", "scipy", "onnx", "gguf")) for need in core)
    assert any(need.startswith("xllamacpp") and 'extra == "xllamacpp"' in need for need in needs)
    assert devices.startswith(str(venv))


def test_platform_tags_are_those_that_the_device_would_accept() -> None:
    tags = Target("aarch64", (3, 11), 19).platforms
    assert tags == [
        *("manylinux_2_19_aarch64", "manylinux_2_18_aarch64", "manylinux_2_17_aarch64"),
        "manylinux2014_aarch64",
    ]


def test_a_package_without_such_a_wheel_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ArteError, match="xllamacpp") as error:
        fetch_wheels(["xllamacpp"], Target("aarch64", (3, 11), 36), tmp_path / "house")
    assert "aarch64" in error.value.hint


@pytest.mark.parametrize(
    ("need", "expected"),
    [
        ("torch>=2.6", 'torch>=2.6 ; extra == "train"'),
        ("a>=1 ; python_version < '3.12'", "a>=1 ; (python_version < '3.12') and extra == \"train\""),
    ],
)
def test_a_requirement_of_an_extra_keeps_its_own_marker(need: str, expected: str) -> None:
    assert wheels._under(need, "train") == expected
