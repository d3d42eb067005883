"""The Python API: the command line's names and parameters, typed results, nothing printed, nothing loaded early."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny import Capture

import arte_edge as ae
from arte_edge.bench.settings import BenchSettings
from arte_edge.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
VERBS = ("ask", "bench", "chat", "distill", "export", "recommend", "report", "serve", "study", "verify")
# A command that is two functions, and one that is what a program does with another.
FUNCTIONS = {"ask": ("ask", "ask_file"), "chat": ("open_student",)}
# What only a terminal needs, and what only a program can pass.
CLI_ONLY = {"as_json", "dry_run", "prices", "gpus", "gpu_price", "list", "output", "output_file"}
API_ONLY = {"reporter", "progress", "on_row"}


def cli_parameters(verb: str) -> set[str]:
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    return {p.name.rstrip("_") for p in command.params if not getattr(p, "hidden", False)} - CLI_ONLY


def api_signature(verb: str) -> dict[str, inspect.Parameter]:
    signatures = [inspect.signature(getattr(ae, name)) for name in FUNCTIONS.get(verb, (verb,))]
    # A word of the language ends with an underscore: from_.
    return {name.rstrip("_"): p for signature in signatures for name, p in signature.parameters.items()}


def api_parameters(verb: str) -> set[str]:
    parameters = api_signature(verb)
    names = {name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    if verb == "bench":  # its settings are one model, so that a new one is added in one place
        assert parameters["settings"].kind is inspect.Parameter.VAR_KEYWORD
        names |= set(BenchSettings.model_fields)
    return names - API_ONLY


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_the_parameters_of_its_command(verb: str) -> None:
    assert api_parameters(verb) == cli_parameters(verb)


@pytest.mark.parametrize("verb", VERBS)
def test_a_default_is_the_same_in_both(verb: str) -> None:
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    parameters = api_signature(verb)
    for parameter in command.params:
        name = parameter.name.rstrip("_")
        if name not in parameters or parameters[name].default is inspect.Parameter.empty:
            continue
        mine: Any = parameters[name].default
        theirs: Any = parameter.default
        assert str(mine or "") == str(theirs or ""), f"{verb} {name}"


def test_every_public_name_is_there_and_documented() -> None:
    assert set(ae.__all__) <= set(dir(ae))
    for name in ae.__all__:
        assert inspect.getdoc(getattr(ae, name)), name


def test_a_package_stays_importable_beside_its_verb() -> None:
    import arte_edge.bench.settings as settings

    assert settings.BenchSettings is BenchSettings
    assert callable(ae.bench) and inspect.ismodule(ae.bench)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ae.nonsense  # type: ignore[attr-defined]


def test_importing_costs_little_and_loads_no_runtime() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import arte_edge as ae; s = time.perf_counter() - t\n"
        "print(s, [m for m in ('torch', 'numpy', 'transformers', 'pydantic', 'rich') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT) for _ in range(3)]
    best = min(runs, key=lambda done: float(done.stdout.split()[0]))
    seconds, loaded = best.stdout.split(maxsplit=1)
    assert float(seconds) < 0.1 and loaded.strip() == "[]"


def test_the_api_prints_nothing_and_does_not_know_the_command_line() -> None:
    source = (ROOT / "arte_edge" / "api.py").read_text("utf-8")
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = {name.id for name in calls if isinstance(name, ast.Name)}
    assert "print" not in names
    assert "arte_edge.cli" not in source


def test_what_is_not_there_is_an_error_of_ours(tmp_path: Path, capfd: Capture) -> None:
    for call in (
        lambda: ae.load_run(tmp_path),
        lambda: ae.distill(tmp_path / "none.toml"),
        lambda: ae.export(tmp_path / "none.gguf"),
        lambda: ae.report(tmp_path),
        lambda: ae.ask(tmp_path / "none.gguf", "text"),
        lambda: ae.serve(tmp_path / "none.gguf"),
        lambda: ae.recommend(tmp_path),
        lambda: ae.bench(tmp_path / "none.gguf"),
        lambda: ae.verify(tmp_path / "a.gguf", tmp_path / "b.gguf"),
    ):
        with pytest.raises(ae.ArteError):
            call()
    assert capfd.readouterr() == ("", "")
