from pathlib import Path

import pytest
from tiny import Make, Patch

from arte_edge.errors import InputError
from arte_edge.export.build import BuildCache, BuiltFile


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: Patch) -> BuildCache:
    monkeypatch.setenv("ARTE_EDGE_HOME", str(tmp_path / "home"))
    return BuildCache(tmp_path / "out")


@pytest.fixture
def build(cache: BuildCache, make_gguf: Make) -> Make:
    """Find the file of a step in `cache`, or build it."""
    n_built = 0

    def build(inputs: int = 1) -> BuiltFile:
        nonlocal n_built
        if found := cache.find("q", inputs, *cache.places("a.gguf")):
            return found
        target = cache.pending("a.gguf")
        with cache.building(target):
            make_gguf(f"source-{n_built}.gguf").rename(target)
        n_built += 1
        return cache.record("q", inputs, target, {"bits_per_weight": 8.5})

    return build


@pytest.mark.parametrize("change", ["inputs", "damaged", "removed", "record"])
def test_a_step_is_built_again_after_any_change(cache: BuildCache, build: Make, change: str) -> None:
    with cache:
        path = build().path
        if change == "damaged":
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        elif change == "removed":
            path.unlink()
        elif change == "record":
            (cache.folder / "records" / "q.json").write_text('{"inputs": "cut')
        assert not build(2 if change == "inputs" else 1).cached


def test_a_file_is_found_under_each_of_its_names(cache: BuildCache, build: Make) -> None:
    with cache:
        _, accepted, rejected = cache.places("a.gguf")
        file = build()
        for is_good, place in ((False, rejected), (True, accepted)):
            assert cache.place(file.path, "a.gguf", accepted=is_good) == place
            file = build()
            assert file.cached and file.path == place
            assert accepted.exists() is is_good and rejected.exists() is not is_good


def test_a_folder_replaces_an_older_one(cache: BuildCache) -> None:
    with cache:
        for content in ("old", "new"):
            folder = cache.pending("m")
            folder.mkdir()
            (folder / "model.onnx").write_text(content)
            cache.place(folder, "m", accepted=True)
        assert (cache.out / "m" / "model.onnx").read_text() == "new"


def test_an_interrupted_build_leaves_no_record(cache: BuildCache, build: Make) -> None:
    with cache:
        target = cache.pending("a.gguf")
        with pytest.raises(KeyboardInterrupt), cache.building(target):
            target.write_bytes(b"half")
            raise KeyboardInterrupt
        assert not build().cached


def test_a_result_is_found_until_its_inputs_change(cache: BuildCache) -> None:
    with cache:
        assert cache.find_result("v", [1]) is None
        cache.record_result("v", [1], {"passed": True})
        assert cache.find_result("v", [1]) == {"passed": True} and cache.find_result("v", [2]) is None


def test_two_exports_into_one_folder_exclude_each_other(cache: BuildCache) -> None:
    with cache, pytest.raises(InputError, match="another process"), BuildCache(cache.out):
        pass
