"""One measurement in a child process of its own, with a time limit: both the parent's and the child's side.

A crash of a runtime, a kill for memory or a timeout ends the child and becomes a row with its reason, and
memory use is that of one measurement. ``python -m arte_edge.bench.worker`` is the child: it gets one JSON
request on stdin, and writes JSON lines of progress and one result.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from arte_edge.bench.settings import Case
from arte_edge.bench.timing import OnProgress, judge, measure, metrics
from arte_edge.errors import ArteError, EngineError

# -P: the child must not import modules from the current folder.
_CHILD = (sys.executable, "-P", "-m", "arte_edge.bench.worker")
_ROOT = Path("/")
_PROC = Path("/proc/self")
_NEAR = 0.85  # of the total memory; a process that was killed above it was killed for its memory
_EXIT_S = 10.0  # from a child's result to its exit
_OUT_OF_MEMORY = "Take a smaller type or context (-p, -n, -d), or close other programs."


def run_child(
    request: dict[str, Any],
    timeout_s: float,
    on_progress: OnProgress | None = None,
    *,
    per_step: bool = False,
    command: Sequence[str] = _CHILD,
    root: Path = _ROOT,
) -> dict[str, Any]:
    """Run one request in a child process and return its result, or ``status`` and ``reason`` if it failed.

    Args:
        timeout_s: after this time the child is killed.
        on_progress: called with (activity, done, total).
        per_step: `timeout_s` is the longest time without progress, however long the whole takes.
    """
    kills = _oom_kills(root)
    with tempfile.TemporaryFile() as errors:
        try:
            child = subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        except OSError as error:  # no memory for another process, or no such program
            return {"status": "crashed", "reason": f"The process could not be started: {error.strerror}."}
        activity, timed_out = "starting", False
        result: dict[str, Any] | None = None
        try:
            for message in _messages(child, request, timeout_s, per_step):
                if "result" in message:
                    result = message["result"]
                    break
                if isinstance(what := message.get("doing"), str):
                    done, total = message.get("done", 0), message.get("total", 0)
                    if on_progress is not None:
                        on_progress(what, done, total)
                    activity = f"in {what} {done} of {total}" if total else what
            else:
                timed_out = not _exited(child, 0.0)
        finally:
            code, peak_bytes = _end(child, 0.0 if timed_out else _EXIT_S)
        if result is not None:
            return result
        if timed_out:
            status = "timeout"
            reason = f"Not done after {timeout_s:g} s, {activity}. Raise --timeout, or lower -p, -n or -r."
            if per_step:
                reason = f"No progress for {timeout_s:g} s, {activity}. Raise --timeout, or end before it with --limit."
        else:
            evidence = ""
            if hasattr(signal, "SIGKILL") and code == -signal.SIGKILL:
                evidence = _memory_evidence(peak_bytes, _oom_kills(root) > kills, child.pid, root)
            status, reason = _cause_of_death(code, activity, evidence)
            if peak_bytes and code < 0:
                reason += f" It held {peak_bytes / 1e6:.0f} MB."
            if status == "crashed" and (last := _last_line(errors)):
                reason += f" Its last message: {last}"
        return {"status": status, "reason": reason, "peak_rss_bytes": peak_bytes}


def _messages(
    child: subprocess.Popen[bytes], request: dict[str, Any], timeout_s: float, per_step: bool
) -> Iterator[dict[str, Any]]:
    """Yield the child's messages until it closes its stdout, or until the timeout of the whole or of a message."""
    assert child.stdin is not None and child.stdout is not None
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_pump, args=(child.stdout, lines), daemon=True).start()
    with contextlib.suppress(BrokenPipeError, OSError):
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()  # not closed: the child exits when its stdin ends
    ends = time.monotonic() + timeout_s
    while (left_s := ends - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=left_s)
        except queue.Empty:
            return
        if line is None:
            _exited(child, _EXIT_S)
            return
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                ends = time.monotonic() + timeout_s if per_step else ends
                yield message


def _pump(stream: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            lines.put(line)
    lines.put(None)


def _exited(child: subprocess.Popen[bytes], within_s: float) -> bool:
    """Return whether the process exits within this time; it is not reaped where `_end` uses wait4."""
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


def _end(child: subprocess.Popen[bytes], within_s: float) -> tuple[int, int | None]:
    """Let the child exit, or kill it; return its exit code (negative: signal) and its peak memory in bytes."""
    with contextlib.suppress(OSError):
        assert child.stdin is not None
        child.stdin.close()
    if not _exited(child, within_s):
        child.kill()
    if not hasattr(os, "wait4") or child.returncode is not None:
        return child.wait(), None
    _, state, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(state)
    return child.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cause_of_death(code: int, activity: str, memory_evidence: str) -> tuple[str, str]:
    """Return the status and the reason of a child that exited without a result."""
    if memory_evidence:
        return "out-of-memory", f"Killed for its memory, {activity} ({memory_evidence}). {_OUT_OF_MEMORY}"
    if code >= 0:
        return "crashed", f"It exited with code {code}, {activity}, without a result."
    name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else f"signal {-code}"
    advice = {
        "SIGKILL": "Killed by another process; there is no sign of the out-of-memory killer. Run it again.",
        "SIGILL": "The runtime was built for another processor: install one built for this one.",
        "SIGBUS": "The file became shorter or the disk is failing: check its sha256.",
    }.get(name, "The runtime crashed: check the file's sha256, or try another --runtime.")
    return "crashed", f"{name}, {activity}. {advice}"


def _memory_evidence(peak_bytes: int | None, counted: bool, pid: int, root: Path) -> str:
    """Return the evidence for the kernel's out-of-memory killer, empty if there is none."""
    if counted:
        return "the control group counted an out-of-memory kill"
    from arte_edge.machine import total_bytes

    if root == _ROOT:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            log = subprocess.run(["dmesg"], capture_output=True, timeout=5, check=False).stdout
            if f"Killed process {pid} ".encode() in log[-100_000:]:
                return "the kernel's log says so"
    total = total_bytes(root)
    if peak_bytes and total and peak_bytes > _NEAR * total:
        return f"at {peak_bytes / 1e6:.0f} of {total / 1e6:.0f} MB"
    return ""


def _oom_kills(root: Path) -> int:
    """Return the number of out-of-memory kills in our control groups (``memory.events``)."""
    from arte_edge.machine import cgroup_files

    counts = [0]
    for file in cgroup_files(root, "memory", "memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError):
            text = file.read_text(encoding="ascii", errors="replace")
            counts += [int(n) for n in re.findall(r"(?m)^oom_kill (\d+)$", text)]
    return max(counts)


def _last_line(errors: IO[bytes]) -> str:
    """Return the last line of the child's stderr, at most 200 characters of it."""
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - 4000))
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def main() -> None:
    """Run one request from stdin and exit with 0, whatever its result."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints to stdout goes to stderr
    request: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    phase = ""

    def report(what: str, done: int = 0, total: int = 0) -> None:
        nonlocal phase
        phase = what
        _send(out, {"doing": what, "done": done, "total": total})

    try:
        if request["kind"] == "quality":
            from arte_edge.bench.accuracy import measure_request

            result = measure_request(request, report)
        else:
            result = measure_case(Case.model_validate(request["case"]), report)
    except MemoryError:
        reason = f"No memory left, in {phase or 'the start'}. Take a smaller type or context (-p, -n, -d)."
        result = {"status": "out-of-memory", "reason": reason}
    except ArteError as error:
        status = "crashed" if isinstance(error, EngineError) else "refused"
        result = {"status": status, "reason": f"{error.message}. {error.hint}".strip()}
    except Exception as error:  # an exception of a runtime is a row and does not end the sweep
        text = next(iter(str(error).splitlines()), "")
        result = {"status": "crashed", "reason": f"{type(error).__name__}: {text} (in {phase})"}
    _send(out, {"result": result})
    os._exit(0)  # a runtime that crashes in its clean-up must not lose the result


def measure_case(case: Case, report: OnProgress) -> dict[str, Any]:
    """Open the model, measure, and return the fields of a `SpeedRow` that only this process knows."""
    from arte_edge.bench.sensors import EnergyMeter, Sensors
    from arte_edge.device.contention import CpuMeter
    from arte_edge.runtimes.loader import open_decoder, warm_import

    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    report("loading", 0, 0)
    warm_import(case.path, case.runtime)  # so that `load_ms` is the model's alone
    start = time.perf_counter_ns()
    model = open_decoder(
        case.path,
        threads=case.threads,
        context_tokens=case.context_tokens,
        runtime=case.runtime,
        type_k=case.type_k,
        type_v=case.type_v,
    )
    load_ms = (time.perf_counter_ns() - start) / 1e6
    time.sleep(case.delay_s)
    test_time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    with Sensors(power_watts=case.power_watts) as sensors:
        meter = EnergyMeter(power_watts=case.power_watts)
        timed = measure(model, case, meter if meter.source else None, report, CpuMeter(case.threads))
    readings = sensors.readings()
    throttled, reason = judge(sensors.bits_before, readings, sensors.bits_after, sensors.limit_c)
    heats = [reading.temperature_c for reading in readings if reading.temperature_c is not None]
    clocks = [reading.clock_mhz for reading in readings if reading.clock_mhz is not None]
    facts = dataclasses.asdict(model.facts)
    return {
        **metrics(case, timed),
        **{key: value for key, value in facts.items() if key not in ("bos", "notes")},
        "test_time": test_time,
        "load_ms": round(load_ms, 3),
        "load_average": load_average,
        "peak_rss_bytes": peak_rss_bytes(),
        "mapped_bytes": mapped_bytes([case.path]),
        "temperature_c_max": max(heats, default=None),
        "clock_mhz_min": min(clocks, default=None),
        "throttled": throttled,
        "throttle_reason": reason,
        "readings": [reading.model_dump() for reading in readings],
    }


def peak_rss_bytes(proc: Path = _PROC) -> int:
    """Return the peak resident memory of this process, mapped weights included.

    ``VmHWM`` where there is ``/proc``: unlike ``ru_maxrss`` it is reset by `exec`, so a child does not
    inherit the peak of a large parent. Elsewhere ``ru_maxrss`` (bytes on macOS, kilobytes on the BSDs)
    and, on Windows, psutil's peak working set.
    """
    with contextlib.suppress(OSError):
        if found := re.search(rb"(?m)^VmHWM:\s*([1-9]\d*)", (proc / "status").read_bytes()):
            return int(found[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def mapped_bytes(paths: Sequence[Path]) -> int | None:
    """Return how many bytes of `paths` (files, or folders of files) are mapped by this process and resident.

    0 means that the runtime copied the weights instead of mapping them; None: the system does not tell.
    """
    import psutil

    try:
        parts = psutil.Process().memory_maps()
    except (AttributeError, OSError, psutil.Error):  # macOS; no /proc
        return None
    real = [path.resolve() for path in paths]
    files = {str(file.resolve()) for path in real for file in (path, *path.rglob("*"))}
    return sum(int(part.rss) for part in parts if part.path in files)


def _send(out: IO[bytes], message: dict[str, Any]) -> None:
    out.write(json.dumps(message).encode() + b"\n")
    out.flush()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(3)


if __name__ == "__main__":
    main()
