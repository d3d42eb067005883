"""``bench --device``: a benchmark on another machine over ssh.

All preflight checks (disk, memory, Python) run before the first byte is copied. The device runs
``python -m arte_edge.bench.runner`` with the request as JSON, in an environment of its own and detached from
the connection, and writes its rows as JSON lines. Nothing needs root, and everything lies in one folder there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from arte_edge.bench.settings import Reporter, Request, describe
from arte_edge.cache import megabytes
from arte_edge.device.memory_estimate import does_not_fit, fit
from arte_edge.device.model_size import ModelSize
from arte_edge.device.profiles import Profile
from arte_edge.device.ssh.connection import ConnectionLost, JobFailed, ReconnectPolicy, RemoteJob, Ssh
from arte_edge.device.ssh.environment import Site, env_bytes_missing, install, own_wheel, plan, read_marker, send_wheel
from arte_edge.device.ssh.workdir import Probe, blobs_of, missing_bytes, place, prepare, probe, reach
from arte_edge.errors import ArteError
from arte_edge.files import json_loads, own_name
from arte_edge.results.rows import SIXTEEN_BITS, QualityRow, Row, SpeedRow, paired
from arte_edge.runtimes.loader import decoder_format
from arte_edge.store import content_key

# Size of the environment by extra, rounded up: 282 MB with xllamacpp, 527 MB with onnx beside it, measured with
# `du` on aarch64 (benchmarks/results/arm_emulation). Includes pip's packed wheels during the installation, and
# the object files of llama-cpp-python.
ENV_BYTES = {"": 180_000_000, "xllamacpp": 140_000_000, "gguf": 600_000_000, "onnx": 330_000_000}
_MARGIN_BYTES = 100_000_000
# Arguments of the device's interpreter before the `Request` as JSON; a test replaces them.
BENCH = ("-m", "arte_edge.bench.runner")


def check_disk(found: Probe, need_bytes: int, host: str) -> None:
    """Raise ArteError if `need_bytes` and a margin do not fit on the disk of the work folder."""
    if found.free_bytes < need_bytes + _MARGIN_BYTES:
        raise ArteError(
            f"{host}: not enough disk space: {megabytes(need_bytes)} would be copied, "
            f"{megabytes(found.free_bytes)} are free",
            f"Nothing was copied. Free some space; `arte-edge devices check … --clean` removes {found.work}.",
        )


def check_memory(found: Probe, models: Sequence[Path], tokens: int, host: str) -> None:
    """Raise InputError if a model with a cache of `tokens` tokens does not fit into the device's memory."""
    there = found.available_bytes or found.memory_bytes  # 0: unknown
    for size in (ModelSize.of(model) for model in models if there):
        needs = fit(size, there, tokens)
        if needs.verdict == "no":
            raise does_not_fit(size, needs, host)


def bench_remote(
    profile: Profile,
    models: Sequence[Path],
    request: Request,
    *,
    reporter: Reporter,
    compile_there: bool = False,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Benchmark `models` on the device and return its rows, with the differences of accuracy from a 16-bit file.

    After an interruption the same call resumes: files already there are not uploaded again, a running
    benchmark is joined, and finished models are not measured again.

    Args:
        request: its task is a folder, which is copied there.
        compile_there: compile llama-cpp-python on the device instead of installing a prebuilt runtime.
        on_row: called with each row as it arrives; a row of an interrupted run may arrive again.

    Raises:
        InputError: the device has no address, a path is not a model, or its format cannot run there.
        ArteError: rejected before anything is copied (32-bit, old Python, full disk, too little memory,
            host key), or failed there; the hint says whether the same command resumes.
        ConnectionLost: the device did not come back in time.
    """
    remote = reach(profile)
    formats = {model: decoder_format(model) for model in models}
    if request.task:  # the others are paired with its answers
        models = sorted(models, key=lambda model: describe(model).quantization not in SIXTEEN_BITS)
    files = [model for model in models if formats[model] != "null"]
    name = profile.name or remote.host

    def say(text: str) -> None:
        reporter.note(f"{name}: {text}")

    with Ssh(remote.host, config=remote.ssh_config) as ssh, TemporaryDirectory(prefix="arte-edge-") as scratch:
        found = probe(ssh, remote)
        needs = found, formats.values(), profile.runtimes, remote.host
        chosen = plan(*needs, compile_there=compile_there)
        marker = read_marker(ssh, f"{found.work}/{chosen.env_name}")
        chosen = plan(*needs, compile_there=compile_there, installed=marker.extras)
        check_memory(found, files, request.settings.context_tokens, remote.host)
        copies = [blobs_of(model) for model in files]
        blobs = [blob for copy in copies for blob in copy]
        inputs = blobs_of(Path(request.task)) if request.task else []
        missing = missing_bytes(ssh, found.work, [*blobs, *inputs])
        check_disk(found, missing + env_bytes_missing(marker, chosen, ENV_BYTES), remote.host)
        if chosen.why:
            say(f"GGUF runs on {chosen.why}")
        prepare(ssh, found.work)
        site = Site(ssh, found, ReconnectPolicy(say), say, reporter.transfer)
        wheel = own_wheel(Path(scratch))
        wheel_there = send_wheel(site, wheel)
        python = install(site, chosen, wheel, wheel_there)
        site.send([*blobs, *inputs])
        task = f"./task/{inputs[0].name.partition('/')[0]}" if inputs else None
        requests = [request.model_copy(update={"task": task} | _there(model, files, task)) for model in models]
        commands = [[python, *BENCH, one.model_dump_json()] for one in requests]
        key = content_key(commands, [(blob.name, blob.sha256) for blob in [*blobs, *inputs]])
        job = site.job(f"bench-{key[:12]}", chosen.python, wheel_there)
        if not job.is_prepared():
            for n, copy in enumerate(copies):  # two models may have one name
                place(ssh, found.work, f"{job.folder}/models/{n}", copy)
            place(ssh, found.work, f"{job.folder}/task", inputs)
            job.prepare(commands, keep_going=True)
        say("measuring")
        return _measure(job, say, on_row, {own_name(model) for model in models})


def _there(model: Path, files: Sequence[Path], task: str | None) -> dict[str, Any]:
    """Return what a request says of `model`: where it is on the device, and what its student.json here says."""
    if model not in files:
        return {"source": str(model)}
    source = f"./models/{files.index(model)}/{own_name(model)}"
    if task is None:
        return {"source": source}
    from arte_edge.verify.accuracy import noted_tokens

    return {"source": source, "answer_tokens": noted_tokens(model)}


def _measure(
    job: RemoteJob, say: Callable[[str], None], on_row: Callable[[Row], None] | None, models: set[str]
) -> list[Row]:
    """Follow the benchmark to its end; of a row that arrived both before and after a break the last one counts."""
    rows: dict[str, Row] = {}

    def take(line: str) -> None:
        try:
            value = json_loads(line)
            row = (QualityRow if "task" in value else SpeedRow).model_validate(value)
        except (ValueError, TypeError, ValidationError):
            say(f"not a result: {line[:200]}")
            return
        test = (row.test, row.type_k, row.type_v) if isinstance(row, SpeedRow) else (row.task, row.split)
        key = content_key(test, row.model_filename, row.sha256, row.n_threads)
        if isinstance(row, QualityRow):
            row = paired(row, [one for other, one in rows.items() if other != key])
        rows[key] = row
        if on_row:
            on_row(row)

    def log(text: str) -> None:
        for line in filter(str.strip, text.splitlines()):
            say(line)

    try:
        job.run(take, log)
    except JobFailed:
        # A test that was rejected or crashed is a row with its reason, and the caller reports it.
        if not models <= {row.model_filename for row in rows.values()}:
            raise
    except KeyboardInterrupt:
        with suppress(ArteError):
            job.stop()
        raise
    with suppress(ConnectionLost):
        job.remove()
    return list(rows.values())
