"""Each case in a process of its own, and what becomes of it, whatever that is.

A model that crashes its runtime, that the kernel kills for its memory, or that never ends, must not
take the other cases with it. The request goes to the child's stdin as one line of JSON; the child
says what it does, and in the end its result, as lines of JSON on its stdout. No shell is involved.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ["CHILD", "Ended", "run_child"]

# -P: the folder that the command is given in must not be where the child finds its modules.
CHILD = (sys.executable, "-P", "-m", "arte_edge.bench.child")

_ROOT = Path("/")
_NEAR = 0.85  # of the memory there is: a process killed above it was killed for it
_LINGER_S = 10.0  # between a child's last word and its end
_OUT_OF_MEMORY = "Take a smaller type or context (-p, -n, -d), or close other programs."

OnProgress = Callable[[str, int, int], None]


class Ended(dict[str, Any]):
    """What a child answered, or ``status`` and ``reason`` where it could not."""


def run_child(
    request: dict[str, Any],
    timeout_s: float,
    on_progress: OnProgress | None = None,
    *,
    command: Sequence[str] = CHILD,
    root: Path = _ROOT,
) -> Ended:
    """Run one request in a child process and return its answer. Raises nothing that the child did.

    Args:
        timeout_s: from its start; then it is killed.
        on_progress: called with (what, done, total) as the child says it.
        command: the child, as an argument list.
        root: where ``proc`` and ``sys`` are; another folder in tests.
    """
    kills = _oom_kills(root)
    with tempfile.TemporaryFile() as errors:
        try:
            child = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        except OSError as error:  # no memory for another process, or no such program
            return Ended(status="crashed", reason=f"The process could not be started: {error.strerror}.")
        doing = "starting"
        answer: Ended | None = None
        timed_out = False
        try:
            for message in _messages(child, request, time.monotonic() + timeout_s):
                if "result" in message:
                    answer = Ended(message["result"])
                    break
                doing = _say(message, on_progress) or doing
            else:
                timed_out = not _gone(child, 0.0)
        finally:
            code, peak_bytes = _end(child, 0.0 if answer is None and timed_out else _LINGER_S)
        if answer is not None:
            return answer
        if timed_out:
            return Ended(
                status="timeout",
                reason=f"Not done after {timeout_s:g} s, {doing}. Raise --timeout, or lower -p, -n or -r.",
                peak_rss_bytes=peak_bytes,
            )
        ended = _post_mortem(code, doing, peak_bytes, _oom_kills(root) > kills, child.pid, root)
        if ended["status"] == "crashed" and (last := _last_words(errors)):
            ended["reason"] += f" It said: {last}"
        return ended


def _messages(child: subprocess.Popen[bytes], request: dict[str, Any], ends: float) -> Any:
    """Yield what the child says until it closes its stdout or `ends` (monotonic seconds) has come."""
    assert child.stdin is not None and child.stdout is not None
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_pump, args=(child.stdout, lines), daemon=True).start()
    with contextlib.suppress(BrokenPipeError, OSError):
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()  # and stays open: its end tells the child that we are gone
    while (left_s := ends - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=left_s)
        except queue.Empty:
            return
        if line is None:
            _gone(child, _LINGER_S)
            return
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                yield message


def _pump(stream: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            lines.put(line)
    lines.put(None)


def _say(message: dict[str, Any], on_progress: OnProgress | None) -> str:
    what, done, total = message.get("doing"), message.get("done", 0), message.get("total", 0)
    if not isinstance(what, str):
        return ""
    if on_progress is not None:
        on_progress(what, done, total)
    return f"in {what} {done} of {total}" if total else what


def _gone(child: subprocess.Popen[bytes], within_s: float) -> bool:
    """Return whether the process has ended, waiting a little; it is not reaped where wait4 will do that."""
    ends = time.monotonic() + within_s
    while True:
        if hasattr(os, "waitid"):
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if child.returncode is not None or os.waitid(os.P_PID, child.pid, flags) is not None:
                return True
        elif child.poll() is not None:
            return True
        if time.monotonic() >= ends:
            return False
        time.sleep(0.01)


def _end(child: subprocess.Popen[bytes], patience_s: float) -> tuple[int, int | None]:
    """Let the child end, or make it; return its exit code (negative: signal) and its peak memory in bytes."""
    with contextlib.suppress(OSError):
        assert child.stdin is not None
        child.stdin.close()
    if not _gone(child, patience_s):
        child.kill()
    if not hasattr(os, "wait4") or child.returncode is not None:
        return child.wait(), None
    _, state, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(state)
    return child.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _post_mortem(code: int, doing: str, peak_bytes: int | None, counted: bool, pid: int, root: Path) -> Ended:
    """Say how a child died that gave no answer."""
    peak = f" It held {peak_bytes / 1e6:.0f} MB." if peak_bytes else ""
    if code == -signal.SIGKILL if hasattr(signal, "SIGKILL") else False:
        if evidence := _memory_evidence(peak_bytes, counted, pid, root):
            status, reason = "out-of-memory", f"Killed for its memory, {doing} ({evidence}). {_OUT_OF_MEMORY}"
        else:
            reason = f"Killed by somebody, {doing}; nothing says that it was the kernel. Run it again."
            status = "crashed"
        return Ended(status=status, reason=reason + peak, peak_rss_bytes=peak_bytes)
    if code < 0:
        name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else f"signal {-code}"
        advice = {
            "SIGILL": "The runtime was built for another processor: install one built for this one.",
            "SIGBUS": "The file became shorter or the disk fails: check its sha256.",
        }.get(name, "The runtime crashed: check the file's sha256, or try another --runtime.")
        return Ended(status="crashed", reason=f"{name}, {doing}. {advice}{peak}", peak_rss_bytes=peak_bytes)
    return Ended(
        status="crashed",
        reason=f"It ended with code {code}, {doing}, without a result.",
        peak_rss_bytes=peak_bytes,
    )


def _memory_evidence(peak_bytes: int | None, counted: bool, pid: int, root: Path) -> str:
    """Return what speaks for the kernel's out-of-memory killer, empty if nothing does."""
    if counted:
        return "the control group counted an out-of-memory kill"
    if root == _ROOT and f"Killed process {pid} " in _kernel_log():
        return "the kernel's log says so"
    from arte_edge.memory import total_bytes

    total = total_bytes(root)
    if peak_bytes and total and peak_bytes > _NEAR * total:
        return f"at {peak_bytes / 1e6:.0f} of {total / 1e6:.0f} MB"
    return ""


def _oom_kills(root: Path) -> int:
    """Return how often the kernel has killed for memory in our control groups (``memory.events``)."""
    from arte_edge.memory import cgroup_files

    counts = [0]
    for file in cgroup_files(root, "memory", "memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError):
            text = file.read_text(encoding="ascii", errors="replace")
            counts += [int(n) for n in re.findall(r"(?m)^oom_kill (\d+)$", text)]
    return max(counts)


def _kernel_log() -> str:
    """Return the end of the kernel's log, empty where we may not read it."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout[-100_000:].decode(errors="replace")


def _last_words(errors: IO[bytes]) -> str:
    """Return the last line that the child wrote to stderr, cut to a length for a table."""
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - 4000))
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
