"""An ssh connection through the system's own client, its errors in plain words, and reconnecting."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

from arte_edge.errors import ArteError, InputError

__all__ = [
    "WAITS_S",
    "Channel",
    "ConnectionLost",
    "Patience",
    "RemoteError",
    "Ssh",
    "check_host",
    "connection_error",
    "last_words",
]

_SENSELESS = re.compile(r"^\s*$|^@+$|^(mux_client|Shared connection to|Connection to .* closed\.|Warning: )")
# "write error: No space left on device", "Disk quota exceeded", a limit on the size of a file
_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large", re.IGNORECASE)


def last_words(text: str, lines: int = 1) -> str:
    """Return the last `lines` lines that say something."""
    said = [line.strip() for line in text.splitlines() if not _SENSELESS.search(line)]
    return "\n".join(said[-lines:])


class ConnectionLost(ArteError):
    """The device cannot be reached now; it may be back in a moment."""

    def __init__(self, host: str, why: str) -> None:
        super().__init__(
            f"{host}: no connection ({why or 'no message from ssh'})",
            "Uploaded files are kept there; when the device answers again, run the same command again to resume.",
        )


class RemoteError(ArteError):
    """A command on the device failed."""

    def __init__(self, host: str, code: int, errors: str, hint: str = "") -> None:
        said = last_words(errors) or f"exit code {code}"
        self.code = code
        self.errors = errors
        self.is_full = _FULL.search(errors) is not None
        if self.is_full:
            super().__init__(
                f"{host}: the disk there is full",
                "Free some space there (`arte-edge devices check … --clean` removes our own folder); "
                "then run the same command again to resume.",
            )
        else:
            super().__init__(f"{host}: {said}", hint)


def connection_error(host: str, errors: str) -> ArteError:
    """Return the error for ssh's exit code 255; `ConnectionLost` only where trying again may help."""
    by_hand = f"ssh {host}"
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in errors or "host key has just been changed" in errors:
        found = re.search(r"ssh-keygen .*-R .*", errors)
        forget = found.group().strip() if found else f"ssh-keygen -R {host.rpartition('@')[2]}"
        return ArteError(
            f"{host}: host key changed (possible man-in-the-middle)",
            f"If the device was reinstalled: {forget} and then once: {by_hand}",
        )
    if "Host key verification failed" in errors:
        return ArteError(
            f"{host}: unknown host key",
            f"Connect once and compare the fingerprint: {by_hand}",
        )
    if "Permission denied" in errors or "Too many authentication failures" in errors:
        return ArteError(
            f"{host}: login rejected; password prompts are not possible here",
            f"Install your key once: ssh-copy-id {host}. `{by_hand}` must work without a prompt.",
        )
    if "Could not resolve hostname" in errors:
        return ArteError(
            f"{host}: unknown host name",
            f"Check that the device is on and in this network, and that `{by_hand}` works.",
        )
    if found := re.search(
        r"(?m)^.*(?:Bad (?:configuration|owner)|terminating, \d+ bad|Can't open user).*$", errors
    ):
        return ArteError(f"{host}: invalid ssh configuration: {found.group().strip()}")
    return ConnectionLost(host, last_words(errors))


_CONNECT_S = 20
# A link that says nothing for 3 x 10 s is gone (ssh_config(5), ServerAliveInterval).
_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}", "-o", "ServerAliveInterval=10"),
    *("-o", "ServerAliveCountMax=3", "-o", "ClearAllForwardings=yes", "-o", "RequestTTY=no"),
    *(
        "-o",
        "RemoteCommand=none",
        "-o",
        "PermitLocalCommand=no",
        "-o",
        "ForwardAgent=no",
        "-o",
        "ForwardX11=no",
    ),
)
_LOST = 255  # ssh's own exit code; our scripts never end with it
_MARK = "@arte-edge@"  # what a login script prints before it is not ours


def check_host(host: str) -> str:
    """Return `host` if ssh may be given it.

    Raises:
        InputError: it is empty, would be read as an option, or holds blanks or control characters.
    """
    if not host or host.startswith("-") or any(c.isspace() or not c.isprintable() for c in host):
        raise InputError(
            f"{host!r} is not a host that ssh can be given", "Write it as ssh takes it: pi@kitchen"
        )
    return host


@dataclass
class Channel:
    """A command that runs there, its ends in our hands."""

    host: str
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    sent: IO[bytes] = field(init=False)
    got: IO[bytes] = field(init=False)

    def __post_init__(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.sent, self.got = self.process.stdin, self.process.stdout

    def finish(self) -> str:
        """Close its input, wait for its end and return what it printed that was not read yet.

        Raises:
            ConnectionLost, RemoteError, ArteError: as `Ssh.run` does.
        """
        with suppress(BrokenPipeError):
            self.sent.close()
        printed = self.got.read().decode(errors="replace")
        code = self.process.wait()
        if code:
            self.errors.seek(0)
            text = self.errors.read().decode(errors="replace")
            raise connection_error(self.host, text) if code == _LOST else RemoteError(self.host, code, text)
        return printed.rpartition(f"{_MARK}\n")[2]


class Ssh:
    """One device over ssh. Use as a context manager; opening connects nothing yet."""

    def __init__(self, host: str, *, config: str = "") -> None:
        """Remember whom to call.

        Args:
            host: ``user@host``, or an alias of the ssh configuration.
            config: another file than ``~/.ssh/config``.

        Raises:
            InputError: `host` cannot be one.
            ArteError: there is no ssh on this machine.
        """
        self.host = check_host(host)
        if shutil.which("ssh") is None:
            raise ArteError("There is no ssh on this machine", "Install the OpenSSH client.")
        self._base = ["ssh", *(("-F", config) if config else ()), *_OPTIONS]
        self._folder: Path | None = None
        self._master: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Ssh:
        # Windows' ssh cannot share a connection. The name of a socket must stay below 104 bytes.
        if os.name != "nt":
            self._folder = Path(tempfile.mkdtemp(prefix="arte-ssh-"))
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def hang_up(self) -> None:
        """End the master connection, if there is one."""
        if self._master is not None:
            assert self._master.stdin is not None
            self._master.stdin.close()
            self._master.terminate()
            try:
                self._master.wait(5)
            except subprocess.TimeoutExpired:
                self._master.kill()
                self._master.wait()
            self._master = None

    def run(self, script: str, *args: str, timeout_s: float = 120) -> str:
        """Run `script` there with ``$1``, ``$2``… = `args` and return what it printed.

        Raises:
            ConnectionLost: the connection broke, or nothing came back in `timeout_s`; trying again may help.
            RemoteError: the script ended with another code than 0.
            ArteError: the connection failed for a reason that retrying does not fix.
        """
        command = [*self._command(), self._line(script, args)]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            self.hang_up()  # whatever hangs, the next command gets a fresh connection
            raise ConnectionLost(self.host, f"no answer in {timeout_s:.0f} s") from error
        errors = done.stderr.decode(errors="replace")
        if done.returncode == _LOST:
            raise connection_error(self.host, errors)
        if done.returncode:
            raise RemoteError(self.host, done.returncode, errors)
        return done.stdout.decode(errors="replace").partition(f"{_MARK}\n")[2]

    @contextmanager
    def open(self, script: str, *args: str) -> Iterator[Channel]:
        """Run `script` there with its input and output as pipes; it is ended when the block ends.

        What a login script prints comes first on ``got``: who reads there must know its own lines.
        """
        command = [*self._command(), self._line(script, args)]
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0
            )
            try:
                yield Channel(self.host, process, errors)
            finally:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    with suppress(OSError):
                        assert pipe is not None
                        pipe.close()

    def _line(self, script: str, args: tuple[str, ...]) -> str:
        """Return the one string that the login shell there, whichever it is, takes apart into these words."""
        return shlex.join(["exec", "sh", "-c", f"printf '%s\\n' {_MARK}\n{script}", "sh", *args])

    def _command(self) -> list[str]:
        share = self._shared()
        return [*self._base, *share, "--", self.host]

    def _shared(self) -> list[str]:
        """Return the options that join the master connection; make one if there is none."""
        if self._folder is None:
            return ["-o", "ControlMaster=no", "-o", "ControlPath=none"]
        socket = self._folder / "s"
        share = ["-o", "ControlMaster=no", "-o", f"ControlPath={socket}"]
        if self._master is not None and self._master.poll() is None:
            return share
        socket.unlink(missing_ok=True)
        with tempfile.TemporaryFile() as errors:
            # A session of its own: Ctrl-C must not reach it, since the command that ends the work there
            # travels over it. `cat` ends when our end of its pipe does, however this process ends.
            self._master = subprocess.Popen(
                [
                    *(*self._base, "-o", "ControlMaster=yes", "-o", "ControlPersist=no"),
                    *("-o", f"ControlPath={socket}", "--", self.host, "exec cat"),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
            until = time.monotonic() + 2 * _CONNECT_S
            while not socket.exists():
                if self._master.poll() is not None or time.monotonic() > until:
                    self.hang_up()
                    errors.seek(0)
                    raise connection_error(self.host, errors.read().decode(errors="replace"))
                time.sleep(0.02)
        return share


T = TypeVar("T")
# Two and a half minutes in all: a Raspberry Pi answers about 40 s after a reboot began.
WAITS_S: tuple[float, ...] = (1, 2, 4, 8, 15, 30, 30, 30, 30)


class Patience:
    """Tries again after a lost connection; every step forward restores the patience."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._failures = 0
        self._marks: dict[str, int] = {}

    def reached(self, what: str, mark: int) -> None:
        """Count the failures anew if `what` is further than it was."""
        if mark > self._marks.get(what, -1):
            self._marks[what] = mark
            self._failures = 0

    def keep_trying(self, step: Callable[[], T]) -> T:
        """Return ``step()``, called again after every `ConnectionLost` until the patience is at its end.

        Raises:
            ConnectionLost: the last one.
        """
        from tenacity import RetryCallState, Retrying, retry_if_exception_type

        def count(state: RetryCallState) -> None:  # tenacity calls `after` first, then `wait`, then `stop`
            self._failures += 1

        def is_over(state: RetryCallState) -> bool:
            return self._failures > len(WAITS_S)

        def wait_s(state: RetryCallState) -> float:
            return WAITS_S[min(self._failures, len(WAITS_S)) - 1]

        def tell(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, ConnectionLost):
                self._say(f"{error.message}; trying again in {wait_s(state):g} s")

        kept = Retrying(
            retry=retry_if_exception_type(ConnectionLost),
            after=count,
            wait=wait_s,
            stop=is_over,
            before_sleep=tell,
            reraise=True,
        )
        return kept(step)
