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

__all__ = ["NEEDED", "end_process", "served"]

_PYTHON = "llama-cpp-python's server"
NEEDED = ("llama_cpp", "uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")
_START_S, _ANSWER_S, _POLL_S = 120.0, 120.0, 0.05
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
    here = ["--host", "127.0.0.1", "--port", "PORT"]
    room, n_threads = str(context_tokens), str(threads)
    commands = {}
    if all(find_spec(name) for name in NEEDED):
        own = ["--n_ctx", room, "--n_threads", n_threads, "--n_threads_batch", n_threads]
        commands[_PYTHON] = [
            sys.executable,
            "-P",
            "-m",
            "llama_cpp.server",
            "--model",
            str(path),
            *here,
            *own,
        ]
    if binary := shutil.which("llama-server"):
        commands["llama-server"] = [binary, "-m", str(path), *here, "-c", room, "-t", n_threads]
    if find_spec("xllamacpp"):
        commands["xllamacpp"] = [sys.executable, "-P", "-c", _XLLAMACPP, str(path), "PORT", room, n_threads]
    return commands


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


def _ask(
    client: httpx.Client, conversations: Sequence[Sequence[Message]], settings: dict[str, Any]
) -> list[str]:
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
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    filled = [port if part == "PORT" else part for part in command]
    quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(filled, **quiet)  # type: ignore[call-overload]
    try:
        address = f"http://127.0.0.1:{port}"
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
