"""Commands that run on the device without a connection to it: started, followed, stopped. This part runs there.

    python -m arte_edge.device.ssh.agent start  FOLDER           begin or go on; says how it stands
    python -m arte_edge.device.ssh.agent follow FOLDER OUT ERR    print what is new since these bytes, until the end
    python -m arte_edge.device.ssh.agent stop   FOLDER           end it, children included

``FOLDER`` (below ``<work>/jobs``) holds ``commands.json``: the commands to run one after the other, and
whether the next one is run when one has failed.
Their output is collected in ``out.jsonl``, flushed to the card line by line, what they say in
``err.log``, and ``ended.json`` says how it ended. Commands that were finished before a reboot
are not run again. One job at a time has the device: it holds ``<work>/lock``, which the kernel
frees however the job ends, and names itself in ``<work>/owner.json``.

It is run from the wheel as it lies there, before any environment is made, so it needs nothing but
Python's own library.
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

__all__ = ["boot_id", "follow", "main", "standing", "start", "stop", "work"]

_POLL_S = 0.25
# A reader that is gone shows when it is written to; this is how long one may go unnoticed.
_SIGN_OF_LIFE_S = 15.0


def main(argv: list[str]) -> int:
    """Do what the module's docstring says; every answer is one JSON object a line."""
    verb, folder, *rest = argv
    path = Path(folder).absolute()
    if verb == "start":
        _answer(start(path))
    elif verb == "work":
        work(path, sys.stdout)
    elif verb == "follow":
        for event in follow(path, int(rest[0]), int(rest[1])):
            _answer(event)
    elif verb == "stop":
        _answer({"stopped": stop(path)})
    else:
        return 2
    return 0


def _answer(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def boot_id() -> str:
    """Return what changes with every boot, empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _work_folder(folder: Path) -> Path:
    return folder.parents[1]


def _lock(folder: Path) -> TextIO | None:
    """Return the device's lock, held, or None if a job holds it."""
    import fcntl  # not on Windows, which only starts jobs elsewhere

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
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def standing(folder: Path) -> dict[str, Any]:
    """Return ``{"state": …}``: ended (with code), running, busy (another job has the device) or idle.

    An idle job that had begun says why it is not running: reboot or killed.
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
    """Begin the job, or go on with it, in a session of its own. Returns its standing afterwards."""
    before = standing(folder)
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
    said = worker.stdout.readline().strip()
    return {"state": said.decode() or "failed", "why": before.get("why", "")}


def work(folder: Path, ready: TextIO) -> None:
    """Run the job's commands, one after the other, to the end or to the first that fails, as the job says.

    Args:
        ready: told ``running`` once the device is ours, else ``busy``; closed then.
    """
    lock = _lock(folder)
    for _ in range(10):  # somebody who only looked holds it for a moment
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
    os.dup2(nothing, 1)  # whoever started us may be gone by now
    done = _read(folder / "done.json")
    code = 0
    with (folder / "out.jsonl").open("ab") as out, (folder / "err.log").open("ab") as err:
        _drop_torn_line(folder / "out.jsonl")
        order = _read(folder / "commands.json")
        for number, words in enumerate(order.get("commands", [])):
            if str(number) in done:
                continue
            failed = _run(words, folder, out, err)
            if failed:
                code = failed
                if order.get("keep_going"):
                    continue
                break
            done[str(number)] = 0
            _write(folder / "done.json", done)
    _write(folder / "ended.json", {"code": code})
    lock.close()


def _run(words: list[str], folder: Path, out: Any, err: Any) -> int:
    # The wheel that this very module runs from must not shadow the environment the command belongs to.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"ARTE_EDGE_HOME": str(_work_folder(folder) / "home"), "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    try:
        child = subprocess.Popen(
            words, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err
        )
    except OSError as error:
        err.write(f"{words[0]}: {error.strerror}\n".encode())
        return 127
    assert child.stdout is not None
    for line in child.stdout:
        out.write(line)
        out.flush()
        os.fsync(out.fileno())  # a row is minutes of work: a power cut must not take it
    return child.wait()


def _drop_torn_line(path: Path) -> None:
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def follow(folder: Path, out_bytes: int, err_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield whole new lines of output and what else is said, with the bytes read so far; end with the job.

    The last event has ``end``: how the job stands (`standing`) when nothing more comes.
    """
    quiet_s = 0.0
    while True:
        now = standing(folder)  # before reading, so that nothing written before an end is missed
        lines = _since(folder / "out.jsonl", out_bytes)
        lines = lines[: lines.rfind(b"\n") + 1]
        said = _since(folder / "err.log", err_bytes)
        out_bytes += len(lines)
        err_bytes += len(said)
        if lines or said:
            yield {
                "out": lines.decode(errors="replace"),
                "err": said.decode(errors="replace"),
                "at": [out_bytes, err_bytes],
            }
            quiet_s = 0.0
        if now["state"] != "running":
            yield {"end": now, "at": [out_bytes, err_bytes]}
            return
        time.sleep(_POLL_S)
        quiet_s += _POLL_S
        if quiet_s >= _SIGN_OF_LIFE_S:
            yield {"at": [out_bytes, err_bytes]}
            quiet_s = 0.0


def _since(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()
    except OSError:
        return b""


def stop(folder: Path) -> bool:
    """End the job's whole session, kindly first. Returns whether it ran."""
    if standing(folder)["state"] != "running":
        return False
    pid = int(_read(_work_folder(folder) / "owner.json")["pid"])
    for what, wait_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.killpg(pid, what)
        until = time.monotonic() + wait_s
        while time.monotonic() < until:
            if standing(folder)["state"] != "running":
                return True
            time.sleep(0.05)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
