"""Ctrl-C, SIGTERM and a closed terminal end the command within two seconds: one line, exit code 4, no process left.

The main thread gets a `KeyboardInterrupt`, so that a verb can tidy up, such as stop its job on a device. In a long
native call it comes too late, and a library may swallow it: a second thread ends the process after a moment, whatever
the first one does. Nothing is lost: rows are synced in whole groups, files are renamed into place when complete.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

_GRACE_S = 1.4
_EXIT_CODE = 4
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_line = "Interrupted."
_begun = threading.Event()
_ending = threading.Lock()


def resumes() -> None:
    """Say in the line that the same command resumes; a verb calls it where that is true."""
    global _line
    _line = "Interrupted. Run the same command again to resume."


def install() -> None:
    """Handle the signals from here on, except those that are ignored, as by nohup."""
    if signal.getsignal(signal.SIGINT) is _interrupt:
        return
    ours, written_to = socket.socketpair()
    written_to.setblocking(False)
    signal.set_wakeup_fd(written_to.detach(), warn_on_full_buffer=False)
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    threading.Thread(target=_watch, args=(ours,), daemon=True).start()


def end(family: frozenset[int] = frozenset()) -> NoReturn:
    """Print the line, kill `family` and every process below this one, and exit at once; the first caller does it."""
    _ending.acquire()
    clear = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""  # what a progress bar leaves
    with suppress(OSError):
        if os.name == "nt" or select.select([], [2], [], 0)[1]:  # a pipe that nobody reads must not keep us
            os.write(2, f"{clear}{_line}\n".encode())
    for pid in family | _descendants():
        with suppress(OSError):
            os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    os._exit(_EXIT_CODE)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _begun.is_set():  # a second signal does not disturb the tidying up
        _begun.set()
        raise KeyboardInterrupt


def _watch(signals: socket.socket) -> None:
    while signals.recv(1)[0] not in _SIGNALS:
        pass
    family = _descendants()  # before a child dies and its own children get another parent
    signals.settimeout(_GRACE_S)
    with suppress(TimeoutError):
        signals.recv(1)  # a second signal: the user does not want to wait
    end(family)


def _descendants() -> frozenset[int]:
    """Return the ids of the processes below this one; none without /proc, where our children watch for our end."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):  # it may have ended
            parent = int(stat.read_bytes().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [os.getpid()]
    for pid in found:  # grows meanwhile
        found += children.get(pid, [])
    return frozenset(found[1:])
