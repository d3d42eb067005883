"""The servers that users start on a GGUF file, asked over HTTP as their clients ask.

llama-cpp-python's, llama.cpp's own ``llama-server`` if it is on the path, and xllamacpp's, each in a process of its
own for some seconds, on a free port of the loopback interface.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from arte_edge.errors import first_line
from arte_edge.runtimes.prompt_render import Message
from arte_edge.runtimes.protocol import Served

HOST = "127.0.0.1"
_PYTHON = "llama-cpp-python's server"
NEEDED = ("llama_cpp", "uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")
_START_S, _ANSWER_S, _POLL_S = 120.0, 120.0, 0.05
_LLAMA_CPP_PYTHON = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
from llama_cpp.server.__main__ import main
main()
"""
_XLLAMACPP = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port, params.n_ctx, params.cpuparams.n_threads = map(int, sys.argv[2:])
params.cpuparams_batch.n_threads = params.cpuparams.n_threads
params.ui = params.warmup = params.fit_params = False
params.n_parallel = 1
server = xllamacpp.Server(params)
sys.stdin.read()
"""
_PENALTY = "penalizes repetitions, which changes answers, unless a request has repeat_penalty = 1"


def served(
    path: Path,
    conversations: Sequence[Sequence[Message]],
    max_tokens: int,
    stop: Sequence[str],
    context_tokens: int,
    threads: int,
) -> list[Served]:
    """Return what each server that is installed here answers greedily; they leave the stop text out."""
    return [
        _served(program, command, path, conversations, {"max_tokens": max_tokens, "stop": list(stop)})
        for program, command in _commands(path, context_tokens, threads).items()
    ]


def _commands(path: Path, context_tokens: int, threads: int) -> dict[str, list[str]]:
    """Return how each server is started; ``PORT`` stands for its port."""
    own = {_PYTHON: python_server, "llama-server": llama_server}
    commands = {name: start(path, "PORT", context_tokens, threads) for name, start in own.items()}
    if find_spec("xllamacpp"):
        more = [str(path), "PORT", str(context_tokens), str(threads)]
        commands["xllamacpp"] = [sys.executable, "-P", "-c", _XLLAMACPP, *more]
    return {name: command for name, command in commands.items() if command}


def python_server(path: Path, port: str, context_tokens: int, threads: int) -> list[str]:
    """Return the command of llama-cpp-python's server, empty if it is not installed.

    It ends when its standard input does, so a pipe there ends it with the process that holds the other end.
    """
    if not all(map(find_spec, NEEDED)):
        return []
    command = [sys.executable, "-P", "-c", _LLAMA_CPP_PYTHON, "--model", str(path), "--verbose", "False"]
    command += ["--host", HOST, "--port", port, "--n_ctx", str(context_tokens)]
    return [*command, "--n_threads", str(threads), "--n_threads_batch", str(threads)]


def llama_server(path: Path, port: str, context_tokens: int, threads: int) -> list[str]:
    """Return the command of llama.cpp's own server, empty if it is not on the PATH."""
    if (server := shutil.which("llama-server")) is None:
        return []
    command = [server, "-m", str(path), "--jinja", "--host", HOST, "--port", port]
    return [*command, "-c", str(context_tokens), "-t", str(threads)]


def _served(
    program: str,
    command: Sequence[str],
    path: Path,
    conversations: Sequence[Sequence[Message]],
    settings: dict[str, Any],
) -> Served:
    own, remark = program == _PYTHON, ""
    settings |= {"model": path.name, "temperature": 0.0}
    try:
        with _running(command) as client:
            texts = _ask(client, conversations, settings)
            plain = _ask(client, conversations, settings | {"repeat_penalty": 1.0}) if own else texts
            if texts != plain:
                texts, remark = plain, _PENALTY
    except (httpx.HTTPError, OSError, ValueError, LookupError) as error:
        return Served(program, unable=first_line(error) or type(error).__name__)
    return Served(program, tuple(texts), remark=remark, own=own)


def _ask(client: httpx.Client, conversations: Sequence[Sequence[Message]], settings: dict[str, Any]) -> list[str]:
    texts = []
    for messages in conversations:
        document = {"messages": [dict(message) for message in messages], **settings}
        answer = client.post("/v1/chat/completions", json=document)
        answer.raise_for_status()
        texts.append(str(answer.json()["choices"][0]["message"]["content"] or ""))
    return texts


@contextmanager
def _running(command: Sequence[str]) -> Iterator[httpx.Client]:
    """Start a server, wait until it has loaded its model, and end it afterwards. Raises OSError: it does not start."""
    with socket.socket() as one:
        one.bind((HOST, 0))
        port = str(one.getsockname()[1])
    filled = [port if part == "PORT" else part for part in command]
    quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(filled, **quiet)  # type: ignore[call-overload]
    try:
        address = f"http://{HOST}:{port}"
        with httpx.Client(base_url=address, timeout=_ANSWER_S, trust_env=False) as client:
            end = time.monotonic() + _START_S
            while not _answers(client):
                if process.poll() is not None:
                    raise OSError(f"it ends with code {process.returncode}")
                if time.monotonic() > end:
                    raise OSError(f"it does not answer within {_START_S:.0f} s")
                time.sleep(_POLL_S)
            yield client
    finally:
        end_process(process, 10)


def end_process(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """End a child process: kindly, and after `patience_s` seconds by force."""
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/v1/models").is_success
    except httpx.TransportError:
        return False
