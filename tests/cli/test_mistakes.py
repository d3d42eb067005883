"""What people give every verb by mistake, and where they run it: one message and an exit code, never a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_cli_help import VERBS
from tiny import Capture, Patch

from arte_edge.cli.main import main

DEEP = {"deep.toml": f"x = {'[' * 5000}", "dotted.toml": ".".join("a" * 3000) + " = 1", "deep.json": "[" * 99999}
# Not verbs of paths: what they do with any word is tested where they are.
OTHERS = {"env", "ls", "tasks ls", "models ls", "devices ls", "devices detect", "devices add", "devices rm"}
MORE = {"push": ["--to", "ada/tiny"], "ask": ["text"], "copy": ["new.toml"], "tasks new": ["--jsonl", "{bad}"]}
VERBS_OF_PATHS = sorted({" ".join(words) for words, _ in VERBS} - OTHERS)


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: Patch) -> dict[str, str]:
    """Paths that no verb can use, by what is wrong with them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    for name in ("student.gguf", "\udcff.gguf"):  # the other's name is not UTF-8
        (tmp_path / name).write_bytes(b"\xff" * 64)
    for name, text in DEEP.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").write_text(DEEP["deep.toml"])
    (tmp_path / "loop").symlink_to("loop")
    paths = {
        "unknown user": "~nobody-has-this-name/x",
        "null byte": "a\0b",
        "too long": "x" * 5000,
        "brackets": "./[/bold][red]x.toml",
        "below a file": "file/x.toml",
        "a link to itself": "./loop",
    }
    return paths | {name: f"./{name}" for name in ("file", "folder", "run", "student.gguf", "\udcff.gguf", *DEEP)}


@pytest.mark.parametrize("verb", VERBS_OF_PATHS)
def test_no_bad_path_ends_in_a_traceback(verb: str, bad: dict[str, str], capsys: Capture) -> None:
    for what, path in bad.items():
        more = [word.format(bad=path) for word in MORE.get(verb, [])]
        if verb in ("compare", "verify"):
            more = [path]
        code = main([*verb.split(), "fresh" if verb == "tasks new" else path, *more])
        err = capsys.readouterr().err
        if verb in ("show", "copy") and what in ("file", "run", *DEEP):
            continue  # printed as it is
        assert (code in (1, 2, 3), err.count("error:")) == (True, 1), (what, code, err)
        assert "A fault of arte-edge" not in err, (what, err)
        assert code == 2 or what in ("file", "folder", "run", "student.gguf", *DEEP), (what, code, err)


def test_no_bad_option_ends_in_a_traceback(
    bad: dict[str, str], bench_gguf: Path, tiny_student: Path, capsys: Capture
) -> None:
    Path("seed").mkdir()
    Path("seed/run.toml").write_text("seed = 1\n")
    model, student = str(bench_gguf), str(tiny_student)
    commands = [["export", student, "--gguf", "F16", f"--{name}"] for name in ("out", "recipe", "task", "base")]
    commands += [["bench", model, "--no-speed", f"--{name}"] for name in ("task", "output-file")]
    commands += [["bench", model, "--suite"], ["bench", model, "--no-speed", "--task", "x", "--bbh"]]
    commands += [["verify", student, student, "--prompts"], ["distill", "quickstart", "--runs"]]
    for command in [*commands, ["report", "seed", "-o"]]:
        for what in ("unknown user", "null byte", "too long", "below a file", "a link to itself"):
            assert main([*command, bad[what]]) in (1, 2), (command, what)
            err = capsys.readouterr().err
            assert err.count("error:") == 1 and "A fault of arte-edge" not in err, (command, what, err)


# A command, and what its message must hold: the word that is wrong, or the nearest one that is right.
WRONG = """
distil: distil
tasks lss: lss
tasks ls --jsn: --jsn
--debg: --debg
models pull smollm2-135m-instrukt: Did you mean 'smollm2-135m-instruct'?
bench: MODEL
bench nothing.gguf: no such file
bench null -o xml: no such format
bench null -p x: n_prompt
bench null -r 0: repetitions
bench null --runtime vllm: runtime
bench null --suite quik: quik
bench null --output-file a.xlsx: a.xlsx
bench null --split train: train
bench null --no-speed: nothing to measure
bench null --device no-such-board: no-such-board
bench null --task no_such_task --no-speed: no_such_task
export: SOURCE
export x --gguf Q4_KM: Q4_K_M
export x --onnx intt4: int4
export x --recipe rasberry-pi-5: raspberry-pi-5
export ./nowhere --gguf F16: no such file
devices show raspberry-pi-6: Did you mean 'raspberry-pi-
devices rm raspberry-pi-5: Shipped profiles
devices add kitchen -- -oProxyCommand=x: not user@host
devices add raspberry-pi-5 pi@x: shipped profile
devices check raspberry-pi-5: devices add
devices show raspberry-pi-5 --model /nowhere.gguf: no such file
recommend export --device raspberry-pi-55: raspberry-pi-5
recommend export --device raspberry-pi-5 --max-ram lots: --max-ram lots: not a size
recommend empty --device raspberry-pi-5: arte-edge export RUN
verify no-such-model-name tiny.gguf: no-such-model-name
verify tiny.gguf none.gguf: none.gguf
verify tiny.gguf tiny.gguf --type Q9: Q9
verify tiny.gguf tiny.gguf --task no_such_task: no_such_task
verify empty tiny.gguf: empty
show quickstrat: Did you mean 'quickstart'?
check cut.toml: line 1
report empty: no run.toml
compare empty empty: arte-edge bench
push empty --to tiny: not USER/REPO
push empty --to a/b/c: not USER/REPO
push empty --to ../b: not USER/REPO
push empty --to ada/tiny: neither an export nor a checkpoint
push empty: --to
card empty: no student.json here
card empty --base-model tiny: not a Hub id
card empty --benchmark gsm8k: not DATASET:TASK_ID
"""


@pytest.mark.parametrize("line", WRONG.strip().splitlines())
def test_a_mistake_is_exit_2_and_said(
    line: str, model_cache: Path, export_folder: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    folder = export_folder.parent
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    (folder / "cut.toml").write_text("[task\n")
    (export_folder / "tiny-Q8_0.gguf").rename("tiny.gguf")
    command, said = line.split(": ", 1)
    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert said in " ".join(printed.err.split()) and printed.out == ""
    assert list((folder / "empty").iterdir()) == []


def test_what_is_given_for_a_run_is_named(bad: dict[str, str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "folder" / "task.toml").touch()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.toml").touch()
    for verb in ("distill", "check", "report", "show"):
        for path, kind in (("./folder", "a task"), ("./runs", "a folder of runs (mine)")):
            assert main([verb, path]) == 2
            assert f"not a run but {kind}" in " ".join(capsys.readouterr().err.split())


def test_brackets_and_colons_are_printed_as_they_are(tmp_path: Path, capsys: Capture) -> None:
    name = "[bold]a:fire:[/x]"
    assert main(["tasks", "new", str(tmp_path / name)]) == 0
    assert name in "".join(capsys.readouterr().out.split("\n"))
    assert main(["ask", name, os.fsdecode(b"caf\xe9")]) == 2 and "not UTF-8" in capsys.readouterr().err


def test_an_ascii_terminal_gets_question_marks_and_json_stays_json(tmp_path: Path) -> None:
    folder = tmp_path / "é[red]"
    folder.mkdir()
    (folder / "run.toml").write_text("seed = 1\n")
    plain = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "arte_edge", "report", str(folder)]
    options: dict[str, Any] = {"capture_output": True, "env": os.environ | plain, "check": True}
    done = subprocess.run(command, **options)
    assert b"[red]" in done.stdout and done.stdout.isascii()
    report = json.loads(subprocess.run([*command, "--json"], **options).stdout)["report"]
    assert os.fsencode(report.encode("utf-8", "surrogateescape")).endswith("é[red]/report.html".encode())


@pytest.mark.skipif(os.name == "nt", reason="file size limits are POSIX")
@pytest.mark.parametrize("words", [["report", "run"], ["copy", "quickstart", "new.toml"], ["tasks", "new", "t"]])
def test_a_disk_that_is_full_is_said(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").write_text("seed = 1\n")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); "
        f"from arte_edge.cli.main import main; sys.exit(main({words!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "the disk is full" in done.stderr and "Traceback" not in done.stderr
