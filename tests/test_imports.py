"""What the command costs before it does anything: which modules load, and how soon help answers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNTIMES = ("torch", "transformers", "onnxruntime", "llama_cpp")
# Neither needed before a verb runs, and each costs more than the whole command does.
OPTIONAL = (*RUNTIMES, "accelerate", "datasets", "gguf", "girth", "peft", "ray", "rouge_score", "scipy", "trl")


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules in memory after a fresh interpreter ran `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


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


@pytest.mark.parametrize(("given", "kept"), [(None, "1"), (" ", "1"), ("0", "0")])
def test_libraries_are_told_to_report_nothing_unless_the_user_says_otherwise(given: str | None, kept: str) -> None:
    names = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment |= {} if given is None else dict.fromkeys(names, given)
    code = f"import os, arte_edge; print(*(os.environ[name] for name in {names}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert done.stdout.split() == [kept.encode()] * 3


def run_cpu_s(*arguments: str) -> tuple[bytes, float]:
    """Run Python; return its output and its processor time, which another busy process does not raise."""
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=-1) as process:
        assert process.stdout
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return output, used.ru_utime + used.ru_stime


@pytest.mark.skipif(sys.platform == "win32", reason="wait4 is POSIX")
@pytest.mark.parametrize("words", ["--help", "bench --help", "models --help", "tasks --help"])
def test_help_answers_within_half_a_second(words: str) -> None:
    output, cpu_s = run_cpu_s("-m", "arte_edge", *words.split())
    _, base_s = run_cpu_s("-c", "import typer, rich")  # over 0.1 s only where the processor is slow
    assert b"Usage" in output and cpu_s < max(0.5, 5 * base_s)


def test_peft_is_imported_without_a_word_and_fetches_no_code(tmp_path: Path) -> None:
    """With bitsandbytes and ``kernels`` installed it would, on a processor that multiplies bfloat16."""
    if not all(importlib.util.find_spec(name) for name in ("peft", "bitsandbytes")):
        pytest.skip("peft and bitsandbytes are not installed")
    (tmp_path / "kernels.py").write_text(
        "from pathlib import Path\ndef get_kernel(*args, **kwargs):\n    Path(__file__).with_name('fetched').touch()\n"
    )
    code = "import sys; from pathlib import Path; from arte_edge.transformers_load import import_peft; import_peft(); "
    code += "assert {'peft', 'bitsandbytes'} <= set(sys.modules) and not Path(sys.argv[1], 'fetched').exists(); "
    code += "import kernels; kernels.get_kernel()"  # whoever wants it has it
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "fetched").exists()
