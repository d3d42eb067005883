"""One test in a child process of its own: started here, measured there, limited in time.

A crash of a runtime, a kill for memory or a timeout ends the child and becomes a row with its reason;
memory is measured from zero. ``python -m arte_edge.bench.worker`` is the child's side: one JSON request
on stdin, JSON lines of progress and one result on a descriptor of its own.
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
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from arte_edge.bench.settings import Case
from arte_edge.bench.timing import Timed, measure, pace, percentile, spread, trend
from arte_edge.errors import ArteError, EngineError

__all__ = ["CHILD", "Ended", "figures", "main", "measure_case", "run_child"]

# -P: the folder that the command is given in must not be where the child finds its modules.
CHILD = (sys.executable, "-P", "-m", "arte_edge.bench.worker")
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


Say = Callable[[str, int, int], None]


def main() -> int:
    """Answer one request; the exit code is 0 whenever there was an answer."""
    out = _own_stdout()
    request: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    phase = ""

    def say(what: str, done: int = 0, total: int = 0) -> None:
        nonlocal phase
        phase = what
        _send(out, {"doing": what, "done": done, "total": total})

    try:
        if request["kind"] == "quality":
            from arte_edge.bench.accuracy import measure_request

            result = measure_request(request, say)
        else:
            result = measure_case(Case.model_validate(request["case"]), say)
    except MemoryError:
        reason = f"No memory left, in {phase or 'the start'}. Take a smaller type or context (-p, -n, -d)."
        result = {"status": "out-of-memory", "reason": reason}
    except ArteError as error:
        status = "crashed" if isinstance(error, EngineError) else "refused"
        result = {"status": status, "reason": f"{error.message}. {error.hint}".strip()}
    except Exception as error:  # whatever a runtime raises is a row, not the end of the sweep
        text = next(iter(str(error).splitlines()), "")
        result = {"status": "crashed", "reason": f"{type(error).__name__}: {text} (in {phase})"}
    _send(out, {"result": result})
    out.flush()
    os._exit(0)  # a runtime's clean-up at exit must not turn a result into a crash


def measure_case(case: Case, say: Say) -> dict[str, Any]:
    """Open the model, measure, and return the fields of a `SpeedRow` that only this process knows."""
    from arte_edge.bench.energy import EnergyMeter
    from arte_edge.bench.sensors import Sensors, judge, mapped_bytes, peak_rss_bytes
    from arte_edge.runtimes.loader import open_decoder, warm_import

    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    say("loading", 0, 0)
    warm_import(case.path, case.runtime)  # a library is loaded once, a model each time
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
        timed = measure(model, case, meter if meter.source else None, say)
    readings = sensors.readings()
    throttled, reason = judge(sensors.bits_before, readings, sensors.bits_after, sensors.limit_c)
    facts = model.facts
    return {
        **figures(case, timed),
        "runtime": facts.runtime,
        "build_commit": facts.build_commit,
        "build": facts.build,
        "n_batch": facts.n_batch,
        "n_ubatch": facts.n_ubatch,
        "type_k": facts.type_k,
        "type_v": facts.type_v,
        "flash_attn": facts.flash_attn,
        "use_mmap": facts.use_mmap,
        "test_time": test_time,
        "load_ms": round(load_ms, 3),
        "load_average": load_average,
        "peak_rss_bytes": peak_rss_bytes(),
        "mapped_bytes": mapped_bytes([case.path]),
        "temperature_c_max": max(
            (r.temperature_c for r in readings if r.temperature_c is not None), default=None
        ),
        "clock_mhz_min": min((r.clock_mhz for r in readings if r.clock_mhz is not None), default=None),
        "throttled": throttled,
        "throttle_reason": reason,
        "readings": [reading.model_dump() for reading in readings],
    }


def figures(case: Case, timed: Timed) -> dict[str, Any]:
    """Return rates, percentiles and trend of what was timed, as fields of a `SpeedRow`."""
    import statistics

    n_tokens = case.n_prompt or case.n_gen
    samples_ts = [n_tokens * 1e9 / max(ns, 1) for ns in timed.samples_ns]
    several = len(samples_ts) > 1
    found: dict[str, Any] = {
        "n_warmup": timed.n_warmup,
        "avg_ns": round(statistics.fmean(timed.samples_ns)),
        "stddev_ns": round(statistics.stdev(timed.samples_ns)) if several else 0,
        "avg_ts": statistics.fmean(samples_ts),
        "stddev_ts": statistics.stdev(samples_ts) if several else 0.0,
        "samples_ns": timed.samples_ns,
        "samples_ts": [round(rate, 4) for rate in samples_ts],
        "median_ts": statistics.median(samples_ts),
        "cv": spread(samples_ts),
        "energy_j": timed.energy_j,
        "energy_source": timed.energy_source,
    }
    if case.n_prompt:
        ttft_ms = [round(ns / 1e6, 6) for ns in timed.samples_ns]
        return found | {"ttft_ms": statistics.median(ttft_ms), "ttft_samples_ms": ttft_ms}
    itl_ms = [[(b - a) / 1e6 for a, b in pairwise(times)] for times in timed.token_ns]
    everything = [value for row in itl_ms for value in row]
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):
        found[f"itl_{name}_ms"] = percentile(everything, share)
    found["itl_samples_ms"] = [[round(value, 4) for value in row] for row in itl_ms]
    if (rates := pace(timed.token_ns)) is not None:
        found |= {"burst_ts": rates.burst_ts, "sustained_ts": rates.sustained_ts}
    if (moved := trend(timed.token_ns)) is not None:
        found |= {"slope_percent_per_min": moved.slope_percent_per_min, "slowed": moved.slowed}
    return found


def _own_stdout() -> IO[bytes]:
    """Return stdout for our answers alone, and let everything else that writes there write to stderr."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "wb")


def _send(out: IO[bytes], message: dict[str, Any]) -> None:
    out.write(json.dumps(message).encode() + b"\n")
    out.flush()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
