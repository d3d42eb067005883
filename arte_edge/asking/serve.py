"""The runtime's own server for one GGUF file, on this machine alone, with the file's own chat template.

It is llama-cpp-python's where that is installed with its server, else llama.cpp's ``llama-server``. Both answer
OpenAI's ``/v1/chat/completions``; a bare user message is enough for a student whose template holds its instruction.
"""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import httpx

from arte_edge.asking.ask import Student
from arte_edge.device.model_size import model_format
from arte_edge.errors import ArteError, InputError
from arte_edge.gguf.reader import GgufHeader, read_model_header
from arte_edge.machine import thread_count
from arte_edge.runtimes.llamacpp.servers import HOST, NEEDED, end_process, llama_server, python_server

_MOST_CONTEXT_TOKENS = 4096  # a cache for all that some models were trained for fills the memory
_START_S, _STOP_S, _POLL_S = 300.0, 1.0, 0.1
_LOG_LINES = 6
_PYTHON_HEALTH, _OWN_TEMPLATE = "/v1/models", ("--chat_format", "chat_template.default")


class Server:
    """A server in a child process. Close it, or use it in a ``with``."""

    def __init__(self, command: list[str], port: int, health: str, request: dict[str, object]) -> None:
        """Start `command` and wait until the path `health` answers.

        Raises ArteError: it ends before that, or takes longer than five minutes.
        """
        self.url = f"http://{HOST}:{port}"
        self.request = request
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the server runs)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self._wait(health)
        except BaseException:
            self.close()
            raise

    def _wait(self, health: str) -> None:
        limit_s = time.monotonic() + _START_S
        with httpx.Client(trust_env=False, timeout=5) as http:
            while time.monotonic() < limit_s:
                if self.process.poll() is not None:
                    raise self._ended()
                try:
                    if http.get(self.url + health).status_code == httpx.codes.OK:
                        return
                except httpx.HTTPError:
                    pass
                time.sleep(_POLL_S)
        raise ArteError(f"The server does not answer after {_START_S:.0f} s", "Try a smaller file.")

    def _ended(self) -> ArteError:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        tail = "\n".join([line for line in lines if line.strip()][-_LOG_LINES:])
        return ArteError(f"The server ended with code {self.process.returncode}:\n{tail}")

    @property
    def curl(self) -> str:
        """A command line that asks the server one question."""
        document = json.dumps(self.request, ensure_ascii=False)
        url = f"{self.url}/v1/chat/completions"
        return shlex.join(["curl", "-s", url, "-H", "Content-Type: application/json", "-d", document])

    def wait(self) -> None:
        """Return when the server was ended. Raises ArteError: it ended by itself."""
        self.process.wait()
        raise self._ended()

    def close(self) -> None:
        """End the server."""
        if self.process.poll() is None:
            end_process(self.process, _STOP_S)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve_file(student: Student, port: int, threads: int | None = None) -> Server:
    """Start a server for a student's GGUF file and wait until it answers; raises as `arte_edge.api.serve`."""
    path = student.path
    if model_format(path) != "gguf":
        hint = "Export it first, as in: arte-edge export RUN --gguf Q4_K_M."
        raise InputError(f"{path}: not a GGUF file, and the servers run those alone", hint)
    header = read_model_header(path)
    command, health = _command(path, header, port, thread_count(threads))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(
                f"Port {port} of {HOST} cannot be used: {error.strerror}", f"Give another: --port {port + 1}."
            ) from error
    question = student.example or "Your question"
    request: dict[str, object] = {"messages": [{"role": "user", "content": question}], "temperature": 0}
    if health == _PYTHON_HEALTH:
        request["repeat_penalty"] = 1  # its default changes answers
    if student.asking is not None:
        request["max_tokens"] = student.asking.answer_tokens
        if student.asking.stops:
            request["stop"] = list(student.asking.stops)
    return Server(command, port, health, request)


def _command(path: Path, header: GgufHeader, port: int, threads: int) -> tuple[list[str], str]:
    """Return the command of the best server that is installed, and the path that answers when it is ready."""
    context = min(header.context_tokens or _MOST_CONTEXT_TOKENS, _MOST_CONTEXT_TOKENS)
    if command := python_server(path, str(port), context, threads):
        # It would put formatters of its own in place of some templates.
        return [*command, *(_OWN_TEMPLATE if header.chat_template else ())], _PYTHON_HEALTH
    if command := llama_server(path, str(port), context, threads):
        return command, "/health"
    missing = ", ".join(name for name in NEEDED if find_spec(name) is None)
    raise ArteError(
        f"No server is installed: llama-cpp-python's lacks {missing}, and there is no llama-server on the PATH",
        "pip install 'llama-cpp-python[server]'",
    )
