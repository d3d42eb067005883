"""The registry: shipped and own entries are read with every mistake named; a pull leaves only whole verified files."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import Make, Patch

from arte_edge import catalog
from arte_edge.cache import DiskFull
from arte_edge.errors import ArteError, InputError
from arte_edge.models import registry, resolve

_GOOD = """
[[model]]
name = "mine"
role = "student"
license = "MIT"
file = "mine.gguf"
size_bytes = 3
sha256 = "%s"
hub = { id = "me/mine" }
""" % ("0" * 64)


def _write(cache: Path, text: str) -> None:
    (cache / "models.toml").write_text(text)


def test_every_shipped_file_is_an_entry_with_two_sources(model_cache: Path) -> None:
    files = list(catalog.root("models").rglob("*.toml"))
    assert len(files) >= 4
    shipped = registry.entries()
    assert sorted(shipped) == sorted(path.stem for path in files)
    for entry in shipped.values():
        assert entry.hub and entry.mirror, entry.name
        assert len({part.package for part in entry.mirror.parts}) == len(entry.mirror.parts)
        assert entry.description and entry.license


def test_the_large_teacher_is_joined_in_the_order_of_its_parts(model_cache: Path) -> None:
    mirror = registry.entry("qwen2.5-coder-1.5b-instruct").mirror
    assert mirror is not None
    numbers = [re.findall(r"\d+", part.member)[-1] for part in mirror.parts]
    assert numbers == [f"{number:02}" for number in range(1, 23)]


def test_a_user_adds_a_model_and_replaces_a_shipped_one(model_cache: Path) -> None:
    _write(model_cache, _GOOD + _GOOD.replace('"mine"', '"gemma-3-270m"'))
    assert registry.entry("mine").hub == registry.Hub(id="me/mine")
    assert registry.entry("gemma-3-270m").license == "MIT"
    assert registry.entry("smollm2-135m-instruct").license == "Apache-2.0"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (_GOOD.replace("license", "licence"), "unknown key 'licence'", "license"),
        (_GOOD.replace('id = "me/mine"', 'id = "me/mine", revison = "x"'), "unknown key 'hub.revison'", "revision"),
        (_GOOD + 'mirror = { version = "1", parts = [{ package = "p", membr = "x" }] }', "membr", "member"),
        (_GOOD.replace("0" * 64, "abc"), "mine: sha256", ""),
        (_GOOD.replace('hub = { id = "me/mine" }', ""), r"\[hub\], \[mirror\]", ""),
        (_GOOD.replace("mine.gguf", "../mine.gguf"), "mine: file", ""),
        (_GOOD.replace("size_bytes = 3", "size_bytes = 0"), "mine: size_bytes", ""),
        (_GOOD.replace("[[model]]", "[[modle]]"), "unknown key 'modle'", r"\[\[model\]\]"),
        (_GOOD.replace("[[model]]", "[model]"), "not a list", r"\[\[model\]\]"),
        ("this is = = not toml", "not TOML", ""),
    ],
)
def test_a_mistake_in_the_users_file_is_named_with_its_place(
    model_cache: Path, text: str, message: str, hint: str
) -> None:
    _write(model_cache, text)
    with pytest.raises(InputError, match=message) as caught:
        registry.entries()
    assert str(model_cache / "models.toml") in caught.value.message
    assert re.search(hint, caught.value.hint)


@pytest.mark.parametrize("package", ["--index-url=http://x", "-r", "a b", "git+https://x", "./local"])
def test_a_package_name_cannot_be_an_option_or_an_address_for_pip(
    model_cache: Path, package: str, register: Make
) -> None:
    register("mine", b"abc", packages=[package])
    with pytest.raises(InputError, match=r"parts\.0\.package"):
        registry.entries()


MakeWheel = Callable[[str, bytes], Path]

_PULL = "import sys; from arte_edge.cli.main import main; sys.exit(main(['models', 'pull', *sys.argv[1:]]))"


@pytest.fixture
def cut_model(make_gguf: Make, make_wheel: MakeWheel, register: Make) -> tuple[str, bytes]:
    """A real GGUF registered as ``cut``, cut into three wheels of unequal size."""
    content = make_gguf("source.gguf", rows=64).read_bytes()
    places = [0, 1000, 1001, len(content)]
    packages = ["cut_one", "cut_two", "cut_three"]
    for package, start, stop in zip(packages, places, places[1:], strict=False):
        make_wheel(package, content[start:stop])
    return register("cut", content, packages=packages), content


def _left_in(cache: Path) -> list[str]:
    """Return every file below `cache` but the registry, the locks and the cached checksums."""
    keep = {"models.toml", "hashes.json"}
    return sorted(p.name for p in cache.rglob("*") if p.is_file() and p.name not in keep and p.suffix != ".lock")


def test_parts_are_joined_in_order_and_cached(
    model_cache: Path, cut_model: tuple[str, bytes], monkeypatch: Patch
) -> None:
    name, content = cut_model
    steps: list[tuple[str, int, int]] = []
    model = resolve(name, progress=lambda *step: steps.append(step))
    assert model.gguf is not None and model.gguf.read_bytes() == content
    assert (model.name, model.quantization, model.folder) == ("cut", "Q8_0", None)
    assert steps[-1] == ("part 3 of 3", len(content), len(content))
    assert _left_in(model_cache) == ["cut.gguf"]
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert resolve(name, offline=True) == model


def test_a_killed_download_resumes_after_the_last_complete_part(
    model_cache: Path, cut_model: tuple[str, bytes], tmp_path: Path
) -> None:
    name, content = cut_model
    third = tmp_path / "wheelhouse" / "cut_three-1.0-py3-none-any.whl"
    whole = third.read_bytes()
    third.unlink()
    os.mkfifo(third)  # pip hangs on it: the process can be killed while it works on the third part
    child = subprocess.Popen([sys.executable, "-c", _PULL, name], start_new_session=True)
    journal = model_cache / "staging" / f"cut-{registry.entry(name).sha256[:12]}" / "mirror" / "mirror.json"
    deadline = time.monotonic() + 60
    while not (journal.is_file() and '"parts": 2' in journal.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not registry.place(registry.entry(name)).exists()
    with (journal.parent / "cut.gguf").open("ab") as torn:
        torn.write(b"half of a part")  # as a kill during the copy leaves it
    third.unlink()
    third.write_bytes(whole)
    for done in ("cut_one", "cut_two"):  # they must not be downloaded again
        (tmp_path / "wheelhouse" / f"{done}-1.0-py3-none-any.whl").unlink()
    model = resolve(name)
    assert model.gguf is not None and model.gguf.read_bytes() == content


def test_wrong_bytes_are_removed_and_named(model_cache: Path, make_wheel: MakeWheel, register: Make) -> None:
    make_wheel("evil", b"x" * 500)
    name = register("mine", b"x" * 500, packages=["evil"], sha256="0" * 64)
    with pytest.raises(ArteError, match="'mine' cannot be fetched") as caught:
        resolve(name)
    assert "mirror evil: checksum mismatch: sha256" in caught.value.hint and "000000" in caught.value.hint
    assert _left_in(model_cache) == []


def test_the_mirror_replaces_an_unreachable_hub(make_gguf: Make, make_wheel: MakeWheel, register: Make) -> None:
    content = make_gguf().read_bytes()
    make_wheel("only", content)
    started = time.monotonic()
    assert resolve(register("both", content, packages=["only"], hub="me/both")).gguf
    assert time.monotonic() - started < 30


def test_without_a_mirror_an_unreachable_hub_fails_fast(model_cache: Path, register: Make) -> None:
    started = time.monotonic()
    with pytest.raises(ArteError, match="cannot be fetched") as caught:
        resolve(register("far", b"abc", hub="me/far"))
    assert "cannot be reached: no connection" in caught.value.hint and "HF_ENDPOINT" in caught.value.hint
    assert time.monotonic() - started < 10
    assert _left_in(model_cache) == []


@pytest.mark.parametrize("variable", ["ARTE_EDGE_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_names_the_command(cut_model: tuple[str, bytes], monkeypatch: Patch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(InputError, match="offline") as caught:
        resolve(cut_model[0])
    assert "arte-edge models pull cut" in caught.value.hint


def test_a_missing_package_and_a_wheel_without_its_part_are_named(
    register: Make, tmp_path: Path, make_wheel: MakeWheel
) -> None:
    with pytest.raises(ArteError) as caught:
        resolve(register("gone", b"abc", packages=["nowhere"]))
    assert "pip cannot download nowhere" in caught.value.hint
    make_wheel("hollow", b"").rename(tmp_path / "wheelhouse" / "other-1.0-py3-none-any.whl")
    with pytest.raises(ArteError) as caught:
        resolve(register("hollow", b"abc", packages=["other"]))
    assert "other" in caught.value.hint


def test_a_password_in_the_index_address_is_not_in_the_error(
    register: Make, monkeypatch: Patch, tmp_path: Path
) -> None:
    talkative = tmp_path / "talkative"  # pip hides passwords in most of its messages, not in all
    (talkative / "pip").mkdir(parents=True)
    line = "ERROR: no answer from https://someone:hunter2@127.0.0.1/simple"
    (talkative / "pip" / "__init__.py").touch()
    (talkative / "pip" / "__main__.py").write_text(f"import sys; print({line!r}); sys.exit(1)")
    monkeypatch.setenv("PYTHONPATH", f"{talkative}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(ArteError) as caught:
        resolve(register("secret", b"abc", packages=["nowhere"]))
    assert "no answer from https://127.0.0.1/simple" in caught.value.hint
    assert "hunter2" not in str(caught.value)


def test_a_disk_that_fills_up_leaves_no_half_file(
    model_cache: Path, make_gguf: Make, make_wheel: MakeWheel, register: Make
) -> None:
    content = make_gguf(rows=9000).read_bytes()  # 300 kB
    for number, start in enumerate(range(0, len(content), 100_000)):
        make_wheel(f"piece{number}", content[start : start + 100_000])
    name = register("big", content, packages=["piece0", "piece1", "piece2", "piece3"][: -(-len(content) // 100_000)])
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000)); {_PULL}"
    done = subprocess.run([sys.executable, "-c", limited, name], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "no room for model 'big'" in " ".join(done.stderr.split())
    assert _left_in(model_cache) == []


def test_a_disk_that_is_too_small_is_found_before_anything_is_fetched(
    make_gguf: Make, make_wheel: MakeWheel, register: Make, monkeypatch: Patch
) -> None:
    content = make_gguf(rows=9000).read_bytes()  # 300 kB
    make_wheel("whole", content)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=200_000))
    steps: list[str] = []
    with pytest.raises(DiskFull, match=r"no room for model 'big': 0\.6 MB needed, 0\.2 MB free") as caught:
        resolve(register("big", content, packages=["whole"]), progress=lambda step, *_: steps.append(step))
    assert steps == [] and "ARTE_EDGE_HOME" in caught.value.hint


def test_a_cache_that_cannot_be_written_is_named(
    model_cache: Path, cut_model: tuple[str, bytes], make_wheel: MakeWheel
) -> None:
    (model_cache / "staging").write_text("a file where a folder should be")
    with pytest.raises(ArteError, match="staging") as caught:
        resolve(cut_model[0])
    assert "ARTE_EDGE_HOME" in caught.value.hint


@contextmanager
def _index(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder` as a page of links, and yield its address and the list of wheels requested."""
    requested: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(".whl"):
                requested.append(self.path)
                time.sleep(0.5)  # long enough for the second process to come
            super().do_GET()

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", requested
    finally:
        server.shutdown()
        server.server_close()


def test_two_processes_fetch_once(cut_model: tuple[str, bytes], tmp_path: Path) -> None:
    with _index(tmp_path / "wheelhouse") as (address, requested):
        environment = os.environ | {"PIP_FIND_LINKS": address}
        command = [sys.executable, "-c", _PULL, cut_model[0]]
        children = [
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(2)
        ]
        assert [child.wait() for child in children] == [0, 0]
    assert sorted(path.split("-")[0] for path in requested) == ["/cut_one", "/cut_three", "/cut_two"]
