"""Rules of the house that no linter knows: file length, public names, data rooms, pins, links."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from arte_edge import catalog
from arte_edge.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "arte_edge"
MODULES = sorted(PACKAGE.rglob("*.py"))
OTHER_CODE = sorted(path for room in ("docs", "tests", "benchmarks") for path in (ROOT / room).rglob("*.py"))
DATA_ROOMS = ("export", "devices", "benchmarks/suites")
SHIPPED_TOML = [
    path for room in (PACKAGE, *(ROOT / room for room in DATA_ROOMS)) for path in sorted(room.rglob("*.toml"))
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES + OTHER_CODE, ids=relative)
def test_no_file_is_longer_than_300_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").strip()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_public_names_are_listed_and_exist(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defines = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign)]
    if not defines:  # a bare __init__.py or __main__.py has nothing to list
        return
    module = importlib.import_module(module_name(path))
    listed = module.__all__  # ruff keeps it sorted (RUF022)
    assert [name for name in listed if not hasattr(module, name)] == []
    assert len(listed) == len(set(listed))


def test_every_shipped_toml_parses() -> None:
    assert SHIPPED_TOML, "no shipped TOML was found at all"
    for path in SHIPPED_TOML:
        try:
            tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            pytest.fail(f"{relative(path)}: {error}")


@pytest.mark.parametrize("kind", ["tasks", "presets", "models", "export", "devices", "suites"])
def test_the_catalogue_finds_every_shipped_file_of_a_kind(kind: str) -> None:
    found = {catalog.find(kind, name) for name in catalog.names(kind)}
    expected = catalog.root(kind).glob("*/" if kind == "tasks" else "*.toml")
    assert found == {path for path in expected if not path.name.startswith((".", "_"))}
    assert found


@pytest.mark.parametrize("room", DATA_ROOMS)
def test_a_data_room_opens_with_a_readme_and_holds_no_code(room: str) -> None:
    first = (ROOT / room / "README.md").read_text(encoding="utf-8").splitlines()[0]
    assert re.match(r"\w+, not code; .*`arte_edge/", first)
    # One .py here would break the editable install (hatch cannot map it) and be shipped.
    assert list((ROOT / room).rglob("*.py")) == []


def test_every_extra_has_the_modules_it_must_bring() -> None:
    assert set(EXTRAS) == set(PROJECT["optional-dependencies"]) - {"all", "dev"}


def imported_by(path: Path) -> Iterator[str]:
    """Yield the top-level modules that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_what_is_imported_is_declared(path: Path) -> None:
    # A module that only arrives with somebody else's package goes when that package changes.
    extras = PROJECT["optional-dependencies"]
    texts = [
        *PROJECT["dependencies"],
        *(text for extra in extras if extra != "dev" for text in extras[extra]),
    ]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    installed = packages_distributions()
    optional = {module for modules in EXTRAS.values() for module in modules}  # not all installed here
    others = set(imported_by(path)) - sys.stdlib_module_names - optional - {"arte_edge"}
    missing = [
        name for name in others if declared.isdisjoint(map(canonicalize_name, installed.get(name, [name])))
    ]
    assert missing == []


def test_pins_are_in_constraints_and_inside_the_ranges() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        canonicalize_name(requirement.name): next(iter(requirement.specifier))
        for requirement in (Requirement(line) for line in lines if line and not line.startswith("#"))
    }
    # A local version ("2.13.0+cpu") exists on one index only.
    assert [name for name, pin in pins.items() if pin.operator != "==" or "+" in pin.version] == []
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["train"], *extras["gguf"], *extras["dev"]]:
        wanted = Requirement(text)
        if wanted.name == PROJECT["name"]:
            continue
        assert "==" not in text, f"{text}: pyproject.toml has ranges, constraints.txt has pins"
        assert canonicalize_name(wanted.name) in pins, f"{wanted.name} has no pin in constraints.txt"
        assert pins[canonicalize_name(wanted.name)].version in wanted.specifier, text


PAGES = sorted(
    [*ROOT.glob("*.md")]
    + [page for room in ("docs", "export", "devices", "benchmarks") for page in (ROOT / room).rglob("*.md")]
)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_index_leads_to_every_page_of_the_documentation() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md"]
    assert pages
    assert [name for name in pages if f"({name}" not in index] == []
