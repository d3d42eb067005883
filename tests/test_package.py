"""The wheel as others get it: built from a copy of the project, installed with core dependencies only.

The empty environment is a real one (pip resolves and installs, from its cache where it can): an
import that only works beside torch must fail here and not on somebody's Raspberry Pi.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from tiny import Folders

from arte_edge import catalog

ROOT = Path(__file__).resolve().parents[1]
# What a build reads; everything else of a checkout (environments, runs, .git) stays out of the copy.
FILES = (".gitignore", "LICENSE", "README.md", "pyproject.toml")
FOLDERS = ("arte_edge", "benchmarks/suites", "devices", "export")
NOT_COPIED = shutil.ignore_patterns("__pycache__", ".*_cache")
DATA = {"export": "_data/export", "devices": "_data/devices", "benchmarks/suites": "_data/suites"}
SECRET = "OPENAI_API_KEY=do-not-ship"

IMPORT_EVERYTHING = """
import importlib, importlib.util, json, pkgutil, traceback
import arte_edge
failed = {}
walk = pkgutil.walk_packages(arte_edge.__path__, "arte_edge.", onerror=lambda name: None)
names = [found.name for found in walk]
for name in names:
    try:
        importlib.import_module(name)
    except BaseException:
        failed[name] = traceback.format_exc(limit=-1)
rooms = ["export", "devices", "benchmarks", "tests", "docs"]
top = [room for room in rooms if importlib.util.find_spec(room)]
print(json.dumps({"file": arte_edge.__file__, "names": names, "failed": failed, "top": top}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["ARTE_EDGE_HOME"] = str(cwd / "arte-edge-home")
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    run(sys.executable, "-m", "build", kind, "--no-isolation", "--outdir", target, source, cwd=target.parent)
    (built,) = target.iterdir()
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def shipped(folder: Path) -> dict[str, bytes]:
    """Return what the wheel must hold of `folder`, by path below it."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    wanted = [path for path in files if path.name != ".env" and path.suffix != ".gguf"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in wanted}


@pytest.fixture(scope="session")
def source(tmp_path_factory: Folders) -> Path:
    """A copy of the project with what a working checkout collects: keys, weights, byte code."""
    copy = tmp_path_factory.mktemp("source") / "arte-edge"
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=NOT_COPIED)
    for folder in (*DATA, "arte_edge"):
        (copy / folder / ".env").write_text(SECRET, encoding="utf-8")
        (copy / folder / "student.gguf").write_bytes(b"GGUF")
    (copy / "arte_edge/__pycache__").mkdir()
    (copy / "arte_edge/__pycache__/stale.cpython-311.pyc").write_bytes(b"stale")
    return copy


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: Folders) -> Path:
    return build("--wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def sdist(source: Path, tmp_path_factory: Folders) -> Path:
    return build("--sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: Folders) -> Path:
    """The ``bin`` folder of an environment that holds the wheel and its core dependencies."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    pip = (sys.executable, "-m", "pip", "--python", venv / "bin/python")
    run(*pip, "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt", wheel, cwd=venv.parent)
    return venv / "bin"


def test_the_only_top_level_of_the_wheel_is_the_package(wheel: Path) -> None:
    package, info = sorted({name.partition("/")[0] for name in contents(wheel)})
    assert package == "arte_edge" and info.endswith(".dist-info")


def test_the_wheel_holds_the_package_and_the_data_rooms_and_nothing_else(source: Path, wheel: Path) -> None:
    expected = {f"arte_edge/{name}": data for name, data in shipped(source / "arte_edge").items()}
    for room, place in DATA.items():
        files = {f"arte_edge/{place}/{name}": data for name, data in shipped(source / room).items()}
        assert files, f"{room} is empty"
        expected |= files
    found = {name: data for name, data in contents(wheel).items() if ".dist-info/" not in name}
    assert sorted(found) == sorted(expected)
    assert found == expected


def test_no_ignored_file_reaches_the_wheel_or_the_sdist(wheel: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert [n for n in [*names, *contents(wheel)] if n.endswith((".env", ".pyc", ".gguf"))] == []
    assert not any(SECRET.encode() in data for data in contents(wheel).values())


def test_the_wheel_carries_licence_typing_marker_and_command(wheel: Path) -> None:
    files = contents(wheel)
    assert "arte_edge/py.typed" in files
    (licence,) = [name for name in files if name.endswith(".dist-info/licenses/LICENSE")]
    assert b"Apache License" in files[licence]
    (entry,) = [name for name in files if name.endswith(".dist-info/entry_points.txt")]
    assert b"arte-edge = arte_edge.__main__:run" in files[entry]


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (project,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "built").mkdir()
    assert contents(build("--wheel", project, tmp_path / "built")) == contents(wheel)


def test_an_installed_wheel_brings_no_training_or_runtime_package(installed: Path, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--python", installed / "python")
    names = {row["name"].lower() for row in json.loads(run(*pip, "list", "--format=json", cwd=tmp_path))}
    assert "pydantic" in names
    assert names.isdisjoint({"torch", "transformers", "trl", "peft", "datasets", "onnxruntime", "scipy"})
    assert not any("llama" in name for name in names)


def test_every_module_imports_with_core_dependencies_only(installed: Path, tmp_path: Path) -> None:
    report = json.loads(run(installed / "python", "-c", IMPORT_EVERYTHING, cwd=tmp_path))
    assert Path(report["file"]).is_relative_to(installed.parent)
    assert report["failed"] == {}
    rooms = {name.split(".")[1] for name in report["names"]}
    assert {"cli", "distill", "models", "results", "runtimes", "tasks"} <= rooms
    assert report["top"] == [], "a folder of the project is importable beside the package"


@pytest.mark.parametrize("kind", ["tasks", "models"])
def test_the_installed_command_knows_every_shipped_name(installed: Path, tmp_path: Path, kind: str) -> None:
    answer = run(installed / "arte-edge", kind, "ls", "--json", cwd=tmp_path)
    assert catalog.names(kind)
    assert [name for name in catalog.names(kind) if name not in answer] == []
