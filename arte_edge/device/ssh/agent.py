"""The device's side of a job: commands that run without a connection; they are started, followed and stopped.

    python -m arte_edge.device.ssh.agent start  FOLDER           start or resume; print the state
    python -m arte_edge.device.ssh.agent follow FOLDER OUT ERR   print the output after these bytes, until the end
    python -m arte_edge.device.ssh.agent stop   FOLDER           stop it with its children

``FOLDER`` (below ``<work>/jobs``) holds ``commands.json``: the commands to run one after the other, and
whether to continue after one that failed. Their stdout is collected in ``out.jsonl``, synced to disk line by
line, their stderr in ``err.log``, and the exit code in ``ended.json``. Commands that finished before a reboot
are not run again. One job runs at a time: it holds ``<work>/lock``, which the kernel releases however the job
ends, and writes its name into ``<work>/owner.json``.

It runs directly from the wheel before any environment is made, so it, and what it imports, needs only
the standard library.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from arte_edge.cache import boot_id, write_atomic

_POLL_S = 0.25
# Writing shows whether the reader is still connected, so an idle stream is written to this often.
_HEARTBEAT_S = 15.0


def main(argv: list[str]) -> int:
    """Run the command in the module's docstring; every answer is one JSON object per line."""
    verb, folder, *rest = argv
    path = Path(folder).absolute()
    events: Iterator[dict[str, Any]] = iter(())
    if verb == "work":
        work(path, sys.stdout)
    elif verb == "start":
        events = iter([start(path)])
    elif verb == "follow":
        events = follow(path, int(rest[0]), int(rest[1]))
    elif verb == "stop":
        events = iter([{"stopped": stop(path)}])
    else:
        return 2
    for event in events:
        print(json.dumps(event), flush=True)
    return 0


def _work_folder(folder: Path) -> Path:
    return folder.parents[1]


def _lock(folder: Path) -> TextIO | None:
    """Return the acquired lock of the device, None if a job holds it."""
    import fcntl  # not on Windows, which only starts jobs on other machines

    file = (_work_folder(folder) / "lock").open("w", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value).encode())


def state(folder: Path) -> dict[str, Any]:
    """Return ``{"state": …}``: ended (with code), running, busy (another job is running) or idle.

    An idle job that was started before has the reason why it is not running: reboot or killed.
    """
    if ended := _read(folder / "ended.json"):
        return {"state": "ended", **ended}
    lock = _lock(folder)
    owner = _read(_work_folder(folder) / "owner.json")
    if lock is None:
        return {"state": "running" if owner.get("job") == folder.name else "busy"}
    lock.close()
    begun = _read(folder / "begun.json")
    why = "" if not begun else "reboot" if begun.get("boot") != boot_id() else "killed"
    return {"state": "idle", "why": why}


def start(folder: Path) -> dict[str, Any]:
    """Start or resume the job in a session of its own. Returns its state afterwards."""
    before = state(folder)
    failed = before["state"] == "ended" and before.get("code") != 0
    if before["state"] != "idle" and not failed:
        return before
    (folder / "ended.json").unlink(missing_ok=True)
    with (folder / "job.log").open("ab") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "arte_edge.device.ssh.agent", "work", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    assert worker.stdout is not None
    answer = worker.stdout.readline().strip()
    return {"state": answer.decode() or "failed", "why": before.get("why", "")}


def work(folder: Path, ready: TextIO) -> None:
    """Run the job's commands one after the other; `ready` gets ``running`` once it has the lock, else ``busy``."""
    lock = _lock(folder)
    for _ in range(10):  # `state` holds it for a moment
        if lock is not None:
            break
        time.sleep(0.1)
        lock = _lock(folder)
    if lock is None:
        ready.write("busy\n")
        ready.flush()
        return
    _write(_work_folder(folder) / "owner.json", {"job": folder.name, "pid": os.getpid()})
    _write(folder / "begun.json", {"boot": boot_id()})
    ready.write("running\n")
    ready.flush()
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # the process that started this one may have ended
    done = _read(folder / "done.json")
    code = 0
    with (folder / "out.jsonl").open("ab") as out, (folder / "err.log").open("ab") as err:
        _drop_torn_line(folder / "out.jsonl")
        order = _read(folder / "commands.json")
        for number, command in enumerate(order.get("commands", [])):
            if str(number) in done:
                continue
            if failed := _run(command, folder, out, err):
                code = failed
                if order.get("keep_going"):
                    continue
                break
            done[str(number)] = 0
            _write(folder / "done.json", done)
    _write(folder / "ended.json", {"code": code})
    lock.close()


def _run(command: list[str], folder: Path, out: Any, err: Any) -> int:
    # The wheel that this module runs from must not shadow the packages of the command's environment.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"ARTE_EDGE_HOME": str(_work_folder(folder) / "home"), "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    try:
        child = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err
        )
    except OSError as error:
        err.write(f"{command[0]}: {error.strerror}\n".encode())
        return 127
    assert child.stdout is not None
    for line in child.stdout:
        out.write(line)
        out.flush()
        os.fsync(out.fileno())  # a row is minutes of work, which a power cut must not lose
    return child.wait()


def _drop_torn_line(path: Path) -> None:
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def follow(folder: Path, out_bytes: int, err_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield new complete lines of stdout and new stderr, with the bytes read so far, until the job ends.

    The last event has ``end``: the job's `state` at its end.
    """
    last_s = time.monotonic()
    while True:
        now = state(folder)  # before reading, so that nothing written before the end is missed
        lines = _since(folder / "out.jsonl", out_bytes)
        lines = lines[: lines.rfind(b"\n") + 1]
        errors = _since(folder / "err.log", err_bytes)
        out_bytes += len(lines)
        err_bytes += len(errors)
        at = [out_bytes, err_bytes]
        if lines or errors or time.monotonic() - last_s >= _HEARTBEAT_S:
            yield {"out": lines.decode(errors="replace"), "err": errors.decode(errors="replace"), "at": at}
            last_s = time.monotonic()
        if now["state"] != "running":
            yield {"end": now, "at": at}
            return
        time.sleep(_POLL_S)


def _since(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()
    except OSError:
        return b""


def stop(folder: Path) -> bool:
    """Terminate the job's whole session, and kill it after 5 s. Returns whether it was running."""
    if state(folder)["state"] != "running":
        return False
    pid = int(_read(_work_folder(folder) / "owner.json")["pid"])
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(pid, number)
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            if state(folder)["state"] != "running":
                return True
            time.sleep(0.05)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
