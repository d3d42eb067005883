"""A vLLM server that the run starts: its arguments and key, its start, its end with whoever started it."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import Patch, save_adapter
from vllm_stand_in import started, write_command

from arte_edge.cache import DiskFull
from arte_edge.cli.main import main
from arte_edge.console import Reporter
from arte_edge.distill.config import RunConfig, build
from arte_edge.distill.run_context import RunContext
from arte_edge.distill.stages.align import _pairs_of_other
from arte_edge.errors import EngineError, InputError
from arte_edge.models.resolve import from_folder
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.loader import ServerLimits
from arte_edge.runtimes.openai import vllm_process as module
from arte_edge.runtimes.openai.client import RetryPolicy
from arte_edge.runtimes.openai.engine import OpenAIEngine
from arte_edge.runtimes.openai.vllm_process import VllmServer, VllmSettings, check_arguments, vllm_command
from arte_edge.store import read_jsonl
from arte_edge.tasks.loaders import load_task

pytest.importorskip("torch")
GREEDY = Sampling(max_tokens=6)
PROMPTS = [Request(f"the {animal} sat") for animal in ("cat", "mat", "question", "answer")]


@pytest.fixture
def commands(tmp_path: Path, model_cache: Path, monkeypatch: Patch) -> Path:
    """Put a stand-in in the place of vLLM; return the folder where each that is started writes what it was given."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("ARTE_EDGE_VLLM", str(write_command(tmp_path)))
    monkeypatch.setenv("ARTE_TEST_VLLM", str(folder))
    monkeypatch.setenv("ARTE_EDGE_API_KEY", "the-users-own")
    return folder


def start(model: Path, tmp_path: Path, *arguments: str, rank: int = 0) -> VllmServer:
    settings = VllmSettings(tmp_path / "served", arguments, rank, ServerLimits(timeout_s=20.0))
    return VllmServer(from_folder(model), settings)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def all_end(pids: list[int], within_s: float = 15.0) -> bool:
    until = time.monotonic() + within_s
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


def test_it_starts_writes_as_our_own_copy_does_and_ends_with_its_children(
    commands: Path, llama_folder: Path, llama: Any, tmp_path: Path
) -> None:
    server = start(llama_folder, tmp_path, "--max-model-len", "2048", rank=5)
    engine = server.engine(None, parallel=2)
    rows = engine.complete(PROMPTS, GREEDY)
    assert [row.text for row in rows] == [row.text for row in llama.complete(PROMPTS, GREEDY)]
    (given,) = started(commands)
    argv, key = given["argv"], given["env"]["VLLM_API_KEY"]
    assert argv[:2] == ["serve", str(llama_folder)]
    for option in (f"--uds {server._socket}", "--max-model-len 2048", "--enable-lora --max-lora-rank 8"):
        assert option in " ".join(argv)
    off = dict.fromkeys(("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    off["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    assert {name: given["env"].get(name) for name in off} == off
    assert "PYTHONPATH" not in given["env"] and "ARTE_EDGE_API_KEY" not in given["env"]
    assert server._folder.stat().st_mode & 0o77 == 0, "no other user reaches the socket"
    # The key is in no command line, and in no file of the run.
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    assert len(key) > 30 and not any(key in " ".join(process.cmdline()) for process in family)
    assert key not in server.log.read_text() and given["pids"][0] in [process.pid for process in family]
    engine.close()
    server.close()
    assert not any(map(is_alive, given["pids"])) and not server.log.exists()
    assert not Path(server._folder).exists()


def test_a_start_that_fails_says_what_the_log_says(
    commands: Path, llama_folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("ARTE_TEST_VLLM_DOES", "fail")
    with pytest.raises(EngineError, match=r"exit code 3(?s:.*)no room for 1 GPU block\n  last line") as caught:
        start(llama_folder, tmp_path)
    assert str(tmp_path / "served" / "vllm.log") in caught.value.message
    assert "teacher.server_args" in caught.value.hint
    assert all_end(started(commands)[0]["pids"]), "its child too"


def test_a_server_that_never_answers_is_ended(
    commands: Path, llama_folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("ARTE_TEST_VLLM_DOES", "wait")
    monkeypatch.setattr("arte_edge.runtimes.openai.vllm_process._START_S", 4.0)
    with pytest.raises(EngineError, match="did not answer within"):
        start(llama_folder, tmp_path)
    assert all_end(started(commands)[0]["pids"])


def test_a_server_that_ends_at_work_is_named_with_its_log(
    commands: Path, llama_folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("arte_edge.runtimes.openai.served.RetryPolicy", partial(RetryPolicy, base_s=0.01))
    save_adapter(llama_folder, tmp_path / "adapter", [3, 4, 5])
    server = start(llama_folder, tmp_path, rank=4)
    engine = server.engine(tmp_path / "adapter", parallel=1)
    one = OpenAIEngine.one

    def one_then_end(self: OpenAIEngine, request: Request, sampling: Sampling) -> Any:
        row = one(self, request, sampling)
        with suppress(ProcessLookupError):
            os.kill(server._process.pid, signal.SIGKILL)
        server._process.wait()
        return row

    monkeypatch.setattr(OpenAIEngine, "one", one_then_end)
    rows = engine.complete(PROMPTS, GREEDY)
    finished = [row for row in rows if row.finish != "error"]
    lost = [row for row in rows if row.finish == "error"]
    assert len(finished) == 1 and {row.fault for row in lost} == {"server"}, "what was finished can be stored"
    assert all(re.match(r"vLLM ended.*exit code -9", row.error) for row in lost)
    with pytest.raises(EngineError, match=r"vLLM ended.*exit code -9"):
        engine.complete(PROMPTS, GREEDY)
    engine.notes.clear()
    engine.close()
    assert engine.notes == [], "what has ended holds no adapter"
    server.close()
    assert all_end(started(commands)[0]["pids"]) and server.log.is_file()


def test_a_start_without_a_process_leaves_nothing(
    commands: Path, llama_folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    room = tmp_path / ("a" * 50) / ("b" * 50)  # too long for a socket's path
    room.mkdir(parents=True)
    monkeypatch.setattr(module.tempfile, "tempdir", str(room))
    made, make = [], module.tempfile.mkdtemp
    monkeypatch.setattr(module.tempfile, "mkdtemp", lambda **how: made.append(make(**how)) or made[-1])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.subprocess, "Popen", full)
    pipes = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(DiskFull):
        start(llama_folder, tmp_path)
    assert [Path(path).parent for path in made] == [Path("/tmp")] and not Path(made[0]).exists()
    assert not list((tmp_path / "served").iterdir()) and len(list(Path("/proc/self/fd").iterdir())) <= pipes


def test_a_group_of_processes_that_nobody_reaps_has_ended() -> None:
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    assert module._lives(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    os.killpg(process.pid, 0)  # as if it lived
    assert not module._lives(process.pid)
    process.wait()
    assert not module._lives(process.pid)


def test_logs_of_workers_that_were_ended_go_and_those_of_servers_that_failed_stay(tmp_path: Path) -> None:
    for name in ("ran.log", "ran.runs", "failed.log"):
        (tmp_path / name).touch()

    def end() -> None:
        (tmp_path / "ran.runs").unlink()

    module.end_workers(end, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["failed.log"]


def test_what_needs_a_tokenizer_alone_starts_no_server(
    commands: Path, llama_folder: Path, llama: Any, tmp_path: Path, monkeypatch: Patch, capsys: Any
) -> None:
    model = {"model": str(llama_folder)}
    config = RunConfig.model_validate({"teacher": model | {"server": "vllm"}, "student": model})
    run = RunContext(config, load_task("home_intents"), tmp_path / "run", Reporter(quiet=True))
    used: list[Any] = []
    monkeypatch.setattr("arte_edge.distill.stages.align._pairs", lambda run: used.append(run.engine(config.teacher)))
    _pairs_of_other(run)
    assert (used[0].chat_template, used[0].special_tokens) == (llama.chat_template, llama.special_tokens)
    assert used[0].count_tokens("the cat sat") == llama.count_tokens("the cat sat") and not run._engines
    run.close()
    (tmp_path / "run.toml").write_text(
        f'[task]\nref = "home_intents"\n[teacher]\nmodel = "{llama_folder}"\nserver = "vllm"\n'
        f'[student]\nmodel = "{llama_folder}"\n'
    )
    assert main(["distill", str(tmp_path / "run.toml"), "--dry-run", "--json"]) == 0, capsys.readouterr().err
    assert started(commands) == []


@pytest.mark.parametrize("phase", ["at work", "while it starts"])
def test_it_ends_with_a_run_that_is_killed(
    commands: Path, llama_folder: Path, tmp_path: Path, monkeypatch: Patch, phase: str
) -> None:
    if phase == "while it starts":
        monkeypatch.setenv("ARTE_TEST_VLLM_DOES", "wait")
    code = (
        "import sys, time; from pathlib import Path\n"
        "from arte_edge.models.resolve import from_folder\n"
        "from arte_edge.runtimes.loader import ServerLimits\n"
        "from arte_edge.runtimes.openai.vllm_process import VllmServer, VllmSettings\n"
        "settings = VllmSettings(Path(sys.argv[2]), (), 0, ServerLimits())\n"
        "server = VllmServer(from_folder(Path(sys.argv[1])), settings)\n"
        "print('up', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(llama_folder), str(tmp_path / "served")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        if phase == "at work":
            assert run.stdout.readline() == b"up\n"
        while not started(commands):
            time.sleep(0.05)
        family = [process.pid for process in psutil.Process(run.pid).children(recursive=True)]
        pids = started(commands)[0]["pids"]
        assert set(pids) <= set(family) and all(map(is_alive, pids))
        run.kill()
    assert all_end(family), "the guard too"


def test_a_run_ends_it_before_a_training_and_starts_it_again_with_the_adapter(
    commands: Path, llama_folder: Path, tmp_path: Path
) -> None:
    save_adapter(llama_folder, tmp_path / "adapter", [3, 4, 5])
    model = {"model": str(llama_folder)}
    config = RunConfig.model_validate({"teacher": model | {"server": "vllm"}, "student": model})

    def write() -> tuple[list[list[str]], RunContext]:
        run = RunContext(config, load_task("home_intents"), tmp_path / "run", Reporter(quiet=True))
        teacher, texts = config.teacher, []
        try:
            original = run.engine(teacher)
            texts.append([row.text for row in run.calls.complete(original, PROMPTS, GREEDY, "rows")])
            pids = started(commands)[-1]["pids"]
            assert all(map(is_alive, pids))
            with run.training("tune"):
                assert not any(map(is_alive, pids))
            aligned = run.engine_with(run.local(teacher), (tmp_path / "adapter", "unused"), teacher)
            texts.append([row.text for row in run.calls.complete(aligned, PROMPTS, GREEDY, "rows")])
        finally:
            run.close()
        return texts, run

    (original, aligned), run = write()
    assert original != aligned and run.calls.made == 2 * len(PROMPTS)
    one, other = started(commands)
    assert one["env"]["VLLM_API_KEY"] != other["env"]["VLLM_API_KEY"]
    assert all_end([*one["pids"], *other["pids"]], within_s=0.0)
    again, run = write()
    assert again == [original, aligned] and run.calls.made == 0
    stored = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert one["env"]["VLLM_API_KEY"].encode() not in stored and b"127.0.0.1" not in stored
    assert len({row["by"] for row in read_jsonl(tmp_path / "run" / "calls.jsonl")}) == 2


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--host", "0.0.0.0"], "--host"),
        (["--trust-remote-code"], "--trust-remote-code"),
        (["--trust_remote_code"], "--trust_remote_code"),
        (["--trust-remote"], "--trust-remote"),
        (["--enforce-eager", "other/model"], "other/model"),
        (["--enforce-eager=--host"], "--enforce-eager"),
        (["--dtype"], "--dtype"),
        (["--dtype", "--api-key"], "--dtype"),
        (["dtype", "float16"], "dtype"),
        (["--config", "vllm.yaml"], "--config"),
    ],
)
def test_arguments_that_change_more_than_the_speed_are_refused(given: list[str], named: str) -> None:
    with pytest.raises(InputError, match=rf"teacher\.server_args.*'{named}'"):
        build("run.toml", {"teacher": {"model": "m", "server": "vllm", "server_args": given}})


def test_arguments_that_are_taken() -> None:
    given = ["--tensor-parallel-size", "4", "--dtype=float16", "--enforce-eager", "--max-num-seqs", "8"]
    assert check_arguments(given) == tuple(given)


def test_the_command_is_found_or_said_to_be_missing_before_any_work(
    tmp_path: Path, monkeypatch: Patch, capsys: Any
) -> None:
    monkeypatch.delenv("ARTE_EDGE_VLLM", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    model = 'model = "qwen2.5-coder-0.5b-instruct"'
    (tmp_path / "run.toml").write_text(f'[teacher]\n{model}\nserver = "vllm"\n')
    with pytest.raises(InputError, match="The command vllm is not installed here") as caught:
        vllm_command()
    assert "pip install vllm" in caught.value.hint and "ARTE_EDGE_VLLM" in caught.value.hint
    run = ["distill", str(tmp_path / "run.toml"), "--runs", str(tmp_path / "runs"), "--dry-run"]
    assert main(run) == 2 and "teacher.server: The command vllm is not" in " ".join(capsys.readouterr().err.split())
    for folder in ("bin", "venv"):
        (tmp_path / folder).mkdir()
        made = write_command(tmp_path / folder)
        assert vllm_command() == [str(made), "serve"]
    (tmp_path / "bin" / "python3").symlink_to("/bin/true")
    monkeypatch.setenv("ARTE_EDGE_VLLM", str(tmp_path / "bin" / "python3"))
    assert vllm_command()[1:] == ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ARTE_EDGE_VLLM", "~/venv/vllm")
    assert vllm_command() == [str(tmp_path / "venv" / "vllm"), "serve"]
    monkeypatch.setenv("ARTE_EDGE_VLLM", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"ARTE_EDGE_VLLM=.*nowhere: no such command"):
        vllm_command()
