from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from arte_edge.export.provenance import gguf_fields, parent_of, private_fields, public_name
from arte_edge.results.student_json import Data, Lineage, Parent, Student

SUM = "cd" * 32
STUDENT = Student(name="tiny", sha256=SUM, architecture="llama", dtype="F16", parameter_count=9)


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("/home/me/models/secret.gguf", "secret.gguf"),
        ("./models/mine/", "mine"),
        ("~/x/y", "y"),
        ("models/deep/er", "er"),
        ("C:\\Users\\me\\m.gguf", "m.gguf"),
        ("model.gguf", "model.gguf"),
        ("org/name", "org/name"),
        ("org/name@main:Q4_K_M", "org/name@main:Q4_K_M"),
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("openai:gpt-x@http://10.0.0.7:8000/v1", "gpt-x"),
        ("openai:org/m@https://host/v1", "org/m"),
    ],
)
def test_a_public_name_has_no_folder_and_no_address(ref: str, name: str) -> None:
    assert public_name(ref) == name


def test_a_folder_that_looks_like_a_hub_id_loses_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "private" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("private/model") == "model"


def test_a_registry_model_has_its_hub_id_licence_and_checksum() -> None:
    parent = parent_of("smollm2-135m-instruct")
    assert "/" in parent.name and parent.license == "Apache-2.0" and len(parent.sha256) == 64


def test_the_keys_of_a_run_s_student() -> None:
    lineage = Lineage(
        source="run",
        base=Parent(name="org/base@abc", license="MIT"),
        teacher=Parent(name="teach", sha256=SUM),
        task="parity",
        task_sha256=SUM,
        method="arte",
        seed=7,
        data=Data(file="train.jsonl", rows=40, sha256=SUM),
    )
    keys = {key: field.value for key, field in gguf_fields(STUDENT, lineage, SUM).items()}
    assert keys["general.base_model.count"] == 1
    assert keys["general.base_model.0.repo_url"] == b"https://huggingface.co/org/base"
    assert keys["general.base_model.0.organization"] == b"org"
    assert keys["general.dataset.count"] == 1 and b"40 rows" in keys["general.dataset.0.description"]
    assert keys["general.license"] == b"MIT" and keys["general.name"] == b"tiny"
    assert keys["arte_edge.seed"] == 7 and keys["arte_edge.teacher.name"] == b"teach"
    assert keys["arte_edge.student.sha256"] == SUM.encode()


def test_what_is_not_known_is_not_written() -> None:
    keys = gguf_fields(STUDENT, Lineage(source="checkpoint", base=Parent(name="folder")), "")
    assert not [
        key for key in keys if key.startswith(("general.dataset", "general.license", "arte_edge.teacher"))
    ]
    assert "general.base_model.0.repo_url" not in keys
    assert all(field.value != b"" for field in keys.values())


def test_a_path_in_the_metadata_is_found(make_gguf: Callable[..., Path]) -> None:
    path = make_gguf(quantize__imatrix__file="/home/me/imatrix.gguf", general__name="clean")
    assert private_fields(path, ["/home/me/"]) == ["quantize.imatrix.file"]
    assert private_fields(path, ["/home/you/"]) == []
