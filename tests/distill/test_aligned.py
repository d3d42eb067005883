"""A teacher that one run aligned is another run's teacher: its adapter, on the very weights it was trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import Capture, Patch

from arte_edge.distill.aligned import aligned_teacher, write_aligned
from arte_edge.errors import InputError
from arte_edge.models.resolve import LocalModel

BASE = "scripted-teacher"


def aligned_run(folder: Path) -> Path:
    """Write what of a run with an alignment is needed."""
    (folder / "align" / "adapter").mkdir(parents=True)
    (folder / "run.toml").write_text("")
    (folder / "align" / "adapter" / "adapter_model.safetensors").write_bytes(b"peft")
    (folder / "align" / "adapter.gguf").write_bytes(b"gguf")
    write_aligned(folder, BASE, LocalModel(BASE, f"sha256 of {BASE}", None, folder, "F16"))
    return folder


@pytest.mark.parametrize("moved", [False, True])
def test_its_adapter_is_opened_on_its_base_and_is_part_of_its_identity(
    house: Any, tmp_path: Path, monkeypatch: Patch, moved: bool
) -> None:
    ref = aligned_run(tmp_path / "a")
    if moved:  # the folder alone is the artifact
        ref = (ref / "aligned").rename(tmp_path / "kept")
    opened: list[tuple[str, Any]] = []
    scripted = house.teacher

    def open_local(model: LocalModel, adapter: Any = None, **_: Any) -> Any:
        opened.append((model.name, adapter))
        return scripted

    monkeypatch.setattr("arte_edge.distill.run_context.open_local", open_local)
    tables = {"data": "original-teacher", "teacher": {"model": str(ref)}}
    plain, run = house.run(data="original-teacher"), None
    identity = plain.identity(plain.config.teacher)
    plain.close()
    run = house.run(**tables)
    assert run.engine(run.config.teacher) is scripted
    assert run.identity(run.config.teacher) != identity and identity[0] in run.identity(run.config.teacher)[0]
    run.close()
    [(name, (path, sha256))] = opened
    assert (name, path.read_bytes()) == (BASE, b"gguf")
    assert sha256 in (path.parent / "teacher.json").read_text()


def test_other_weights_and_a_changed_adapter_are_errors(tmp_path: Path) -> None:
    teacher = aligned_teacher(str(aligned_run(tmp_path / "a")))
    assert teacher is not None
    with pytest.raises(InputError, match="aligned on other weights"):
        teacher.adapter_for(LocalModel(BASE, "another", None, tmp_path, "F16"), llamacpp=True)
    (teacher.folder / "adapter.gguf").unlink()
    (teacher.folder / "adapter.gguf").write_bytes(b"changed")
    base = LocalModel(BASE, f"sha256 of {BASE}", None, tmp_path, "F16")
    with pytest.raises(InputError, match="not the adapter"):
        teacher.adapter_for(base, llamacpp=True)
    assert teacher.adapter_for(base, llamacpp=False)[0].name == "adapter"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda a: None, "is an aligned teacher, and aligns once"),
        (lambda a: (a / "aligned" / "teacher.json").unlink(), "this run has no aligned teacher"),
        (lambda a: (a / "aligned" / "teacher.json").write_text(json.dumps({"base": "x"})), "lacks"),
        (lambda a: (a / "aligned" / "teacher.json").write_text("{"), "not readable"),
    ],
)
def test_a_run_that_is_no_teacher_for_this_one_says_so_before_any_call(
    house: Any, tmp_path: Path, capsys: Capture, damage: Any, why: str
) -> None:
    ref = aligned_run(tmp_path / "a")
    damage(ref)
    assert house.distill("--teacher", str(ref)) == 2
    assert why in " ".join(capsys.readouterr().err.split())
    assert house.calls == 0
