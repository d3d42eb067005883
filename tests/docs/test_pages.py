"""The generated pages say what the code says."""

import json
import runpy
from pathlib import Path

import pytest

from arte_edge import catalog
from arte_edge.distill.config import RunConfig, load_toml
from arte_edge.results.student_json import SCHEMA_VERSION

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "presets.md").read_text(encoding="utf-8")
BUILDER = runpy.run_path(str(DOCS / "build_presets_page.py"))


def keys() -> list[str]:
    dumped = RunConfig().model_dump()
    return [
        f"{name}.{key}" if key else name
        for name, value in dumped.items()
        for key in (value if isinstance(value, dict) else [""])
    ]


def test_the_presets_page_is_checked() -> None:
    assert BUILDER["render"](PAGE) == PAGE, "python docs/build_presets_page.py"
    changed = PAGE.replace("| `tune.epochs` | `2.0` |", "| `tune.epochs` | `3.0` |")
    assert changed != PAGE
    assert BUILDER["render"](changed) == PAGE


@pytest.mark.parametrize("key", keys())
def test_every_key_has_exactly_one_row(key: str) -> None:
    assert sum(line.startswith(f"| `{key}` |") for line in PAGE.splitlines()) == 1


def test_a_row_tells_the_default_and_what_each_preset_sets() -> None:
    [row] = [line for line in PAGE.splitlines() if line.startswith("| `align.learning_rate` |")]
    paper = load_toml(catalog.find("presets", "paper"))["align"]["learning_rate"]
    default = RunConfig().align.learning_rate
    cells = [cell.strip() for cell in row.split("|")]
    assert default != paper and cells[2:4] == [f"`{default}`", f"`{paper}`"]


SCHEMA = runpy.run_path(str(DOCS / "build_student_schema.py"))


def test_the_published_schema_is_that_of_the_code() -> None:
    assert SCHEMA["main"](["--check"]) == 0
    assert json.loads(SCHEMA["render"]())["properties"]["schema_version"]["const"] == SCHEMA_VERSION


def test_every_key_of_the_schema_is_closed_and_explained_where_its_name_does_not_do() -> None:
    document = json.loads(SCHEMA["render"]())
    for name, table in document["$defs"].items():
        assert table["additionalProperties"] is False, name
        assert table["description"], name
