"""ssh through the system's own client: commands, errors in plain words, reconnecting, and jobs.

A job runs detached from the connection under `arte_edge.device.ssh.agent`, which the device runs from our wheel.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from arte_edge.device.profiles import check_host
from arte_edge.errors import ArteError
from arte_edge.store import parse_line

_NOISE = re.compile(r"^\s*$|^@+$|^(mux_client|Shared connection to|Connection to .* closed\.|Warning: )")
# "write error: No space left on device", "Disk quota exceeded", a limit on the size of a file
_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large", re.IGNORECASE)


def _last_line(text: str) -> str:
    """Return the last line that is not noise of ssh, empty if there is none."""
    lines = [line.strip() for line in text.splitlines() if not _NOISE.search(line)]
    return lines[-1] if lines else ""


class ConnectionLost(ArteError):
    """The device is unreachable at the moment; retrying may help."""

    def __init__(self, host: str, why: str) -> None:
        super().__init__(
            f"{host}: no connection ({why or 'no message from ssh'})",
            "Uploaded files are kept there; when the device answers again, run the same command again to resume.",
        )


class RemoteError(ArteError):
    """A command on the device failed."""

    def __init__(self, host: str, code: int, errors: str, hint: str = "") -> None:
        self.code = code
        self.errors = errors
        if _FULL.search(errors):
            super().__init__(
                f"{host}: the disk there is full",
                "Free some space there (`arte-edge devices check … --clean` removes our own folder); "
                "then run the same command again to resume.",
            )
        else:
            super().__init__(f"{host}: {_last_line(errors) or f'exit code {code}'}", hint)


def connection_error(host: str, errors: str) -> ArteError:
    """Return the error for ssh's exit code 255; `ConnectionLost` only where retrying may help."""
    by_hand = f"ssh {host}"
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in errors or "host key has just been changed" in errors:
        found = re.search(r"ssh-keygen .*-R .*", errors)
        forget = found.group().strip() if found else f"ssh-keygen -R {host.rpartition('@')[2]}"
        return ArteError(
            f"{host}: host key changed (possible man-in-the-middle)",
            f"If the device was reinstalled: {forget} and then once: {by_hand}",
        )
    if "Host key verification failed" in errors:
        return ArteError(f"{host}: unknown host key", f"Connect once and compare the fingerprint: {by_hand}")
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
    if found := re.search(r"(?m)^.*(?:Bad (?:configuration|owner)|terminating, \d+ bad|Can't open user).*$", errors):
        return ArteError(f"{host}: invalid ssh configuration: {found.group().strip()}")
    return ConnectionLost(host, _last_line(errors))


_CONNECT_S = 20
# A link that is silent for 3 x 10 s is considered broken (ssh_config(5), ServerAliveInterval).
_SETTINGS = (
    f"BatchMode=yes ConnectTimeout={_CONNECT_S} ServerAliveInterval=10 ServerAliveCountMax=3 RequestTTY=no "
    "ClearAllForwardings=yes RemoteCommand=none PermitLocalCommand=no ForwardAgent=no ForwardX11=no"
)
_OPTIONS = [word for setting in _SETTINGS.split() for word in ("-o", setting)]
_LOST = 255  # ssh's own exit code; our scripts never end with it
_MARK = "@arte-edge@"  # what a login script prints comes before it


@dataclass
class Channel:
    """A running remote command with its input and output as pipes."""

    host: str
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    sent: IO[bytes] = field(init=False)
    got: IO[bytes] = field(init=False)

    def __post_init__(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.sent, self.got = self.process.stdin, self.process.stdout

    def finish(self) -> str:
        """Close its input, wait for it to end and return the rest of its output. Raises as `Ssh.run` does."""
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
    """One device over ssh, a context manager. The first command connects; the others share its connection.

    Args:
        host: ``user@host``, or an alias of the ssh configuration.
        config: another file than ``~/.ssh/config``.

    Raises InputError: `host` is not a valid host; ArteError: there is no ssh on this machine.
    """

    def __init__(self, host: str, *, config: str = "") -> None:
        self.host = check_host(host)
        if shutil.which("ssh") is None:
            raise ArteError("There is no ssh on this machine", "Install the OpenSSH client.")
        self._base = ["ssh", *(("-F", config) if config else ()), *_OPTIONS]
        self._folder: Path | None = None
        self._master: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Ssh:
        # Windows' ssh cannot share a connection. The name of a socket must be shorter than 104 bytes.
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
        """Run `script` on the device with ``$1``, ``$2``… = `args` and return its output.

        Raises `ConnectionLost` (retrying may help), `RemoteError` (the script failed) or `ArteError`.
        """
        try:
            done = subprocess.run(
                self._command(script, args),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            self.hang_up()  # the next command gets a fresh connection
            raise ConnectionLost(self.host, f"no answer in {timeout_s:.0f} s") from error
        errors = done.stderr.decode(errors="replace")
        if done.returncode == _LOST:
            raise connection_error(self.host, errors)
        if done.returncode:
            raise RemoteError(self.host, done.returncode, errors)
        return done.stdout.decode(errors="replace").partition(f"{_MARK}\n")[2]

    @contextmanager
    def open(self, script: str, *args: str) -> Iterator[Channel]:
        """Run `script` on the device with its input and output as pipes; it is killed when the block ends.

        The output of a login script comes first on ``got``, so a reader must recognize its own lines.
        """
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                self._command(script, args), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0
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

    def _command(self, script: str, args: tuple[str, ...]) -> list[str]:
        """Return the ssh command line; its last argument is quoted for whichever login shell runs there."""
        remote = shlex.join(["exec", "sh", "-c", f"printf '%s\\n' {_MARK}\n{script}", "sh", *args])
        share = ["-o", "ControlMaster=no", "-o", f"ControlPath={self._socket() or 'none'}"]
        return [*self._base, *share, "--", self.host, remote]

    def _socket(self) -> Path | None:
        """Return the socket of the master connection, which is opened if there is none yet."""
        if self._folder is None:
            return None
        socket = self._folder / "s"
        if self._master is not None and self._master.poll() is None:
            return socket
        socket.unlink(missing_ok=True)
        with tempfile.TemporaryFile() as errors:
            # A session of its own: Ctrl-C must not reach it, since the command that stops the job uses this
            # connection. `cat` ends when our end of its pipe is closed, however this process ends.
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
        return socket


T = TypeVar("T")
# 2.5 minutes in total: a Raspberry Pi answers about 40 s after a reboot began.
WAITS_S: tuple[float, ...] = (1, 2, 4, 8, 15, 30, 30, 30, 30)


class ReconnectPolicy:
    """Retries after a lost connection, waiting `WAITS_S`; any progress resets the count of failures."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._failures = 0
        self._marks: dict[str, int] = {}

    def reached(self, what: str, mark: int) -> None:
        """Reset the count of failures if `what` has made progress since the last call."""
        if mark > self._marks.get(what, -1):
            self._marks[what] = mark
            self._failures = 0

    def retry(self, step: Callable[[], T]) -> T:
        """Return ``step()``, called again after each `ConnectionLost`; the last of them is raised."""
        while True:
            try:
                return step()
            except ConnectionLost as error:
                self._failures += 1
                if self._failures > len(WAITS_S):
                    raise
                wait_s = WAITS_S[self._failures - 1]
                self._say(f"{error.message}; trying again in {wait_s:g} s")
            time.sleep(wait_s)


def put_text(ssh: Ssh, path: str, text: str) -> None:
    """Write a small file on the device atomically."""
    script = 'umask 077; mkdir -p "$(dirname "$1")" && printf %s "$2" > "$1.tmp" && mv -f "$1.tmp" "$1"'
    ssh.run(script, path, text)


_LOG_CHARS = 4000  # the end of a job's log, for the message if it fails
# $1 interpreter, $2 our wheel, $3… arguments of the module
_JOB = 'py=$1; PYTHONPATH=$2; export PYTHONPATH; shift 2; cd / && exec "$py" -m arte_edge.device.ssh.agent "$@"'


class JobFailed(ArteError):
    """A command of the job failed."""

    def __init__(self, host: str, code: int, log: str) -> None:
        cause = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        super().__init__(
            f"{host}: {_last_line(log) or 'no error output'} ({cause})",
            "Finished measurements are kept there; run the same command again to resume.",
        )
        self.code = code
        self.log = log


@dataclass
class RemoteJob:
    """One job on a device: started, followed through every lost connection, stopped."""

    ssh: Ssh
    folder: str  # <work>/jobs/<name>
    python: str
    wheel: str
    policy: ReconnectPolicy

    def is_prepared(self) -> bool:
        """True if an earlier attempt prepared this very job."""
        return self.ssh.run('[ -e "$1/commands.json" ] && echo yes; exit 0', self.folder).strip() == "yes"

    def prepare(self, commands: Sequence[Sequence[str]], *, keep_going: bool = False) -> None:
        """Write the job's commands; with `keep_going` a failed command does not stop the ones after it."""
        order = {"commands": [list(command) for command in commands], "keep_going": keep_going}
        put_text(self.ssh, f"{self.folder}/commands.json", json.dumps(order))

    def run(self, on_line: Callable[[str], None], on_log: Callable[[str], None]) -> None:
        """Start or resume the job, and follow it until it ends.

        Args:
            on_line: called with every line of its stdout, those of earlier attempts included.
            on_log: called with its stderr as it arrives.

        Raises:
            ArteError: another job is running there; the device restarted or killed the job.
            JobFailed: a command failed.
            ConnectionLost: the device did not come back in time; the job continues there.
        """
        state = self.policy.retry(lambda: self._call("start"))
        if state["state"] == "busy":
            raise ArteError(
                f"{self.ssh.host} is busy with another benchmark; two at once would disturb each other",
                "Wait until it has finished and run the same command again.",
            )
        if state["state"] == "failed":
            raise ArteError(f"{self.ssh.host}: the job did not start", f"See {self.folder}/job.log there.")
        if why := state.get("why"):
            on_log(f"resuming after {'a reboot' if why == 'reboot' else 'the job was killed'}\n")
        at = [0, 0]
        log = ""

        def read() -> dict[str, Any]:
            nonlocal at, log
            args = ("follow", self.folder, str(at[0]), str(at[1]))
            with self.ssh.open(_JOB, self.python, self.wheel, *args) as channel:
                lines = io.BufferedReader(channel.got)  # type: ignore[type-var]
                for line in lines:  # a name keeps it alive: it closes the pipe when it is deleted
                    if (event := parse_line(line)) is None:
                        continue
                    for row in filter(None, event.get("out", "").split("\n")):
                        on_line(row)
                    if text := event.get("err", ""):
                        log = (log + text)[-_LOG_CHARS:]
                        on_log(text)
                    at = event.get("at", at)
                    self.policy.reached(self.folder, sum(at))
                    if "end" in event:
                        return dict(event["end"])
                channel.finish()
            raise ConnectionLost(self.ssh.host, "the stream ended early")

        end = self.policy.retry(read)
        if end["state"] != "ended":
            raise ArteError(
                f"{self.ssh.host} restarted during the benchmark"
                if end.get("why") == "reboot"
                else f"{self.ssh.host}: the job was killed there, perhaps out of memory",
                "Finished measurements are kept there; run the same command again to resume.",
            )
        if (code := int(end.get("code", 1))) != 0:
            raise JobFailed(self.ssh.host, code, log)

    def stop(self) -> None:
        """Stop the job and all its processes."""
        self._call("stop")

    def remove(self) -> None:
        """Remove the job's folder."""
        if PurePosixPath(self.folder).parent.name == "jobs":
            self.ssh.run('rm -rf "$1"', self.folder)

    def _call(self, verb: str) -> dict[str, Any]:
        for line in self.ssh.run(_JOB, self.python, self.wheel, verb, self.folder).splitlines():
            if (event := parse_line(line.encode())) is not None:
                return event
        raise ArteError(
            f"{self.ssh.host}: no answer from arte-edge's agent there", "`arte-edge devices check … --clean` resets it."
        )
