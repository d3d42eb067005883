import importlib.util
import json
from pathlib import Path
from typing import Any

from arte_edge.results.student_json import SCHEMA_VERSION

ROOT = Path(__file__).resolve().parents[2]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("schema_script", ROOT / "docs/build_student_schema.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_published_schema_is_that_of_the_code() -> None:
    module = script()
    assert module.main(["--check"]) == 0
    assert json.loads(module.render())["properties"]["schema_version"]["const"] == SCHEMA_VERSION


def test_every_key_of_the_schema_is_closed_and_explained_where_its_name_does_not_do() -> None:
    document = json.loads(script().render())
    for name, table in document["$defs"].items():
        assert table["additionalProperties"] is False, name
        assert table["description"], name
