"""What the command costs before it does anything: which modules load, and how soon help answers."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNTIMES = ("torch", "transformers", "onnxruntime", "llama_cpp")
# Neither needed before a verb runs, and each costs more than the whole command does.
OPTIONAL = (*RUNTIMES, "accelerate", "datasets", "gguf", "girth", "peft", "rouge_score", "scipy", "trl")
HELP_LIMIT_S = 0.5


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules in memory after a fresh interpreter ran `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_importing_the_package_loads_no_runtime() -> None:
    assert loaded_by("import arte_edge").isdisjoint((*OPTIONAL, "numpy", "pydantic", "typer"))


def test_the_command_loads_no_runtime_and_no_network_client() -> None:
    loaded = loaded_by("import arte_edge.cli.main")
    assert "typer" in loaded
    assert loaded.isdisjoint((*OPTIONAL, "huggingface_hub", "httpx"))


def test_no_module_loads_an_optional_part_when_imported() -> None:
    everything = (
        "import importlib, pkgutil, arte_edge\n"
        "for found in pkgutil.walk_packages(arte_edge.__path__, 'arte_edge.'):\n"
        "    importlib.import_module(found.name)"
    )
    assert loaded_by(everything).isdisjoint(OPTIONAL)


@pytest.mark.parametrize("words", [["--help"], ["models", "--help"], ["tasks", "--help"]], ids=" ".join)
def test_help_answers_within_half_a_second(words: list[str]) -> None:
    # The best of several runs: a busy machine makes one run slow, slow code makes every run slow.
    command = [sys.executable, "-m", "arte_edge", *words]
    best_s = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        best_s = min(best_s, time.perf_counter() - start)
        if best_s < HELP_LIMIT_S:
            return
    pytest.fail(f"the best of 12 runs took {best_s:.2f} s")
