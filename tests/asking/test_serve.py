"""The runtime's own server on a tiny file: the printed command gets an answer, and nothing outlives the verb."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import tiny
from tiny import Capture, Folders, Patch

import arte_edge as ae
from arte_edge.asking import serve as module
from arte_edge.asking.form import with_instruction
from arte_edge.asking.serve import serve_file
from arte_edge.cli.main import main
from arte_edge.errors import ArteError, InputError
from arte_edge.results.student_json import Asking, write_student
from arte_edge.runtimes.llamacpp import servers

SYSTEM = "Say which of the rooms is meant."


@pytest.fixture(scope="module")
def served(tmp_path_factory: Folders) -> Path:
    """An export of a GGUF file whose chat template holds an instruction."""
    for name in ("llama_cpp.server", "uvicorn", "sse_starlette", "starlette_context", "transformers"):
        pytest.importorskip(name)
    from arte_edge.gguf.convert import convert

    folder = tmp_path_factory.mktemp("served")
    checkpoint = tiny.write_student(folder / "student")
    template = with_instruction(tiny.TEMPLATE, SYSTEM, {})
    (checkpoint / "chat_template.jinja").write_text(template, "utf-8")
    file = convert(checkpoint, folder / "m-Q8_0.gguf")
    record = Asking(form="answer", instruction=SYSTEM, answer_tokens=7, stops=("it's\n",), example="in the hall")
    write_student(folder, tiny.student_file(tiny.artifact(), asking=record))
    return file


@pytest.mark.skipif(shutil.which("curl") is None, reason="runs curl")
def test_the_printed_command_gets_an_answer_and_a_signal_ends_both(served: Path, closed_port: int) -> None:
    command = [sys.executable, "-m", "arte_edge", "serve", str(served.parent), "--port", str(closed_port)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        words = shlex.split(child.stdout.readline())
        assert words[0] == "curl"
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
        answer = json.loads(done.stdout)
        assert answer["choices"][0]["message"]["content"]
        assert answer["usage"]["completion_tokens"] <= 7
        # The instruction alone has more tokens than a bare question.
        assert answer["usage"]["prompt_tokens"] > len(SYSTEM) // 4
        request = json.loads(words[-1])
        assert request["messages"] == [{"role": "user", "content": "in the hall"}]
        assert request["stop"] == ["it's\n"] and request["temperature"] == 0
    finally:
        os.kill(child.pid, signal.SIGTERM)
        _, err = child.communicate(timeout=30)
    assert child.returncode == 4 and "Interrupted." in err
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{closed_port}/v1/models", trust_env=False)


def test_the_server_answers_as_ask_does_and_closes(served: Path, closed_port: int) -> None:
    with ae.serve(served, port=closed_port, threads=1) as server:
        with pytest.raises(InputError, match=f"Port {closed_port} of 127.0.0.1 cannot be used"):
            ae.serve(served, port=closed_port)
        document = server.request | {"stop": []}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=document, timeout=60, trust_env=False)
        text = reply.json()["choices"][0]["message"]["content"]
        assert text == ae.ask(served, "in the hall", grammar=False).text
    assert server.process.poll() is not None
    # So does a server whose parent is gone, and with it the other end of its pipe.
    orphan = subprocess.Popen(servers.python_server(served, str(closed_port), 64, 1), stdin=subprocess.PIPE)
    orphan.communicate(timeout=60)
    assert orphan.returncode == 1
    # A server that ends by itself is an error with the end of its log.
    code = "print('out of memory'); raise SystemExit(9)"
    with pytest.raises(ArteError, match=r"ended with code 9:\nout of memory"):
        module.Server([sys.executable, "-c", code], closed_port, "/", {})


def test_without_a_server_the_command_that_installs_one_is_named(
    bench_gguf: Path, monkeypatch: Patch, capsys: Capture, tmp_path: Path, closed_port: int
) -> None:
    for one in (module, servers):
        monkeypatch.setattr(one, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "")
    assert main(["serve", str(bench_gguf)]) == 1
    assert "pip install 'llama-cpp-python[server]'" in capsys.readouterr().err
    # Where llama.cpp's own server is on the PATH, it is started.
    program = tmp_path / "llama-server"
    program.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\nraise SystemExit(5)\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArteError, match=rf"ended with code 5:\n.*--jinja.*'{closed_port}'"):
        ae.serve(bench_gguf, port=closed_port)


def test_a_checkpoint_is_not_served(tiny_student: Path) -> None:
    with pytest.raises(InputError, match="not a GGUF file"):
        ae.serve(tiny_student)


def test_a_port_in_use_is_said_before_anything_is_started(bench_gguf: Path, monkeypatch: Patch) -> None:
    pytest.importorskip("llama_cpp.server")
    monkeypatch.setattr(subprocess, "Popen", None)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="cannot be used"):
        serve_file(ae.open_student(bench_gguf), taken.getsockname()[1])
