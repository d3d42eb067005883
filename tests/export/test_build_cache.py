""""""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arte_edge.errors import InputError
from arte_edge.export.build_cache import Workshop


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARTE_EDGE_HOME", str(tmp_path / "home"))


@pytest.fixture
def built(make_gguf: Callable[..., Path]) -> list[Path]:
    """Where the last builds of `body` went."""
    return []


@pytest.fixture
def body(make_gguf: Callable[..., Path], built: list[Path]) -> Callable[[Path], dict[str, Any]]:
    def build(target: Path) -> dict[str, Any]:
        make_gguf(f"source-{len(built)}.gguf").rename(target)
        built.append(target)
        return {"bits_per_weight": 8.5}

    return build


def test_a_step_is_made_once(tmp_path: Path, body: Any, built: list[Path]) -> None:
    for start in (False, True):
        with Workshop(tmp_path / "out") as shop:
            made = shop.make("q", [1], shop.pending("a.gguf"), body)
            assert made.was_kept is start and made.summary == {"bits_per_weight": 8.5}
    assert len(built) == 1


@pytest.mark.parametrize("change", ["inputs", "damaged", "gone", "record gone"])
def test_a_step_is_made_again_when_anything_changed(
    tmp_path: Path, body: Any, built: list[Path], change: str
) -> None:
    with Workshop(tmp_path / "out") as shop:
        path = shop.make("q", [1], shop.pending("a.gguf"), body).path
        if change == "damaged":
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        elif change == "gone":
            path.unlink()
        elif change == "record gone":
            (shop.room / "records" / "q.json").write_text('{"inputs": "cut')
        again = shop.make("q", [2 if change == "inputs" else 1], shop.pending("a.gguf"), body)
        assert not again.was_kept
    assert len(built) == 2


def test_a_file_is_known_again_under_each_of_its_names(tmp_path: Path, body: Any, built: list[Path]) -> None:
    with Workshop(tmp_path / "out") as shop:
        accepted, rejected = shop.final("a.gguf", accepted=True), shop.final("a.gguf", accepted=False)
        made = shop.make("q", [1], shop.pending("a.gguf"), body, accepted, rejected)
        for is_good, place in ((False, rejected), (True, accepted)):
            assert shop.place(made.path, "a.gguf", accepted=is_good) == place
            made = shop.make("q", [1], shop.pending("a.gguf"), body, accepted, rejected)
            assert made.was_kept and made.path == place
            assert accepted.exists() is is_good and rejected.exists() is not is_good
    assert len(built) == 1


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    with Workshop(tmp_path / "out") as shop:
        for content in ("old", "new"):
            folder = shop.pending("m")
            folder.mkdir()
            (folder / "model.onnx").write_text(content)
            shop.place(folder, "m", accepted=True)
        assert (shop.out / "m" / "model.onnx").read_text() == "new"


def test_a_build_that_fails_leaves_no_record(tmp_path: Path, body: Any, built: list[Path]) -> None:
    def fail(target: Path) -> dict[str, Any]:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    with Workshop(tmp_path / "out") as shop:
        with pytest.raises(KeyboardInterrupt):
            shop.make("q", [1], shop.pending("a.gguf"), fail)
        assert not shop.make("q", [1], shop.pending("a.gguf"), body).was_kept


def test_a_verdict_is_remembered_until_its_inputs_change(tmp_path: Path) -> None:
    with Workshop(tmp_path / "out") as shop:
        assert shop.recall("v", [1]) is None
        shop.note("v", [1], {"passed": True})
        assert shop.recall("v", [1]) == {"passed": True} and shop.recall("v", [2]) is None


def test_two_exports_into_one_folder_are_kept_apart(tmp_path: Path) -> None:
    with (
        Workshop(tmp_path / "out"),
        pytest.raises(InputError, match="another process"),
        Workshop(tmp_path / "out"),
    ):
        pass


def test_at_the_end_only_records_are_left(tmp_path: Path, body: Any) -> None:
    with Workshop(tmp_path / "out") as shop:
        shop.make("base", [1], shop.base("a.gguf"), body)
        shop.close(keep_base=False)
        assert {path.name for path in shop.room.iterdir()} == {"lock", "records"}
