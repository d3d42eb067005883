"""``python -m arte_edge.bench.child``: one case, measured in a process that does nothing else.

Reads one line of JSON from stdin (see `isolate`), answers in lines of JSON on what was stdout when it
began; whatever a runtime prints goes to stderr. It ends itself when its parent is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from typing import IO, Any

from arte_edge.bench.case import Case
from arte_edge.bench.steady import pace, percentile, spread, trend
from arte_edge.bench.timing import Timed, measure
from arte_edge.errors import ArteError, EngineError

__all__ = ["figures", "main", "measure_case"]

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
            from arte_edge.bench.answers import measure_request

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
    from arte_edge.bench.memory import mapped_bytes, peak_rss_bytes
    from arte_edge.bench.runtimes import open_speed_model, warm_import
    from arte_edge.bench.sensors import Sensors
    from arte_edge.bench.throttle import judge

    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    say("loading", 0, 0)
    warm_import(case.path, case.runtime)  # a library is loaded once, a model each time
    start = time.perf_counter_ns()
    model = open_speed_model(
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
