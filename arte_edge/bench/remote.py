"""Preflight checks before anything is copied: free disk space and memory for the model on the device.

``bench --device``: a benchmark on another machine over ssh.

All preflight checks run before the first byte is copied. The device runs ``python -m arte_edge.bench``
with the request as JSON, in an environment of its own and detached from the connection, and writes
its rows as JSON lines. Nothing needs root, and everything lies in one folder there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from arte_edge.bench.settings import BenchSettings, Reporter, Request, Split
from arte_edge.cache import megabytes
from arte_edge.device.memory_estimate import fit, refuse
from arte_edge.device.model_size import ModelShape, model_format
from arte_edge.device.profiles import Profile
from arte_edge.device.ssh.connection import ConnectionLost, Patience, Ssh
from arte_edge.device.ssh.environment import (
    Plan,
    Site,
    env_bytes_missing,
    install,
    own_wheel,
    plan,
    read_marker,
    send_wheel,
)
from arte_edge.device.ssh.job import JobFailed, RemoteJob
from arte_edge.device.ssh.probe import Survey, survey
from arte_edge.device.ssh.upload import blobs_of, missing_bytes, place
from arte_edge.device.ssh.workdir import prepare, reach
from arte_edge.errors import ArteError
from arte_edge.results.rows import QualityRow, Row, SpeedRow
from arte_edge.store import content_key

__all__ = ["ENV_BYTES", "bench_remote", "check_disk", "check_memory"]

# What the environment takes, by part, rounded up: 282 MB with xllamacpp, 527 MB with onnx beside it,
# measured with `du` on aarch64 (benchmarks/results/arm_emulation); pip needs the packed wheels beside it for
# a moment, and llama-cpp-python its objects.
ENV_BYTES = {"": 180_000_000, "xllamacpp": 140_000_000, "gguf": 600_000_000, "onnx": 330_000_000}
_MARGIN_BYTES = 100_000_000


def check_disk(found: Survey, need_bytes: int, host: str) -> None:
    """Raise ArteError if `need_bytes` and a margin do not fit below the work folder there."""
    if found.free_bytes < need_bytes + _MARGIN_BYTES:
        raise ArteError(
            f"{host}: not enough disk space: {megabytes(need_bytes)} would be copied, "
            f"{megabytes(found.free_bytes)} are free",
            f"Nothing was copied. Free some space; `arte-edge devices check … --clean` removes {found.work}.",
        )


def check_memory(found: Survey, models: Sequence[Path], tokens: int, host: str) -> None:
    """Raise InputError if a model with a cache of `tokens` tokens cannot fit into the device's memory."""
    if not (there := found.available_bytes or found.memory_bytes):
        return  # unknown
    for model in models:
        shape = ModelShape.of(model)
        needs = fit(shape, there, tokens)
        if needs.verdict == "no":
            raise refuse(shape, needs, host)


# What the device's interpreter runs, followed by a `Request` as JSON; a test replaces it.
BENCH = ("-m", "arte_edge.bench")


def bench_remote(
    profile: Profile,
    models: Sequence[Path],
    settings: BenchSettings,
    *,
    reporter: Reporter,
    task: Path | None = None,
    split: Split = "test",
    limit: int = 0,
    speed: bool = True,
    compile_there: bool = False,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Benchmark `models` on the device and return its rows as it wrote them.

    After an interruption the same call resumes: files already there are not sent again, a benchmark
    that still runs is joined, and finished models are not measured again.

    Args:
        task: a task's folder, copied there.
        compile_there: compile llama-cpp-python on the device instead of installing a prebuilt runtime.
        on_row: gets every row as it arrives; a row of an interrupted run may arrive again.

    Raises:
        InputError: the device cannot be addressed, not a model, a format that cannot run there.
        ArteError: rejected before anything is copied (32-bit, old Python, full disk, too little memory,
            host key), or failed there; the hint says whether the same command resumes.
        ConnectionLost: the device did not come back in time.
    """
    remote = reach(profile)
    formats = [model_format(model) for model in models]
    name = profile.name or remote.host

    def say(text: str) -> None:
        reporter.note(f"{name}: {text}")

    with (
        Ssh(remote.host, config=remote.ssh_config) as ssh,
        TemporaryDirectory(prefix="arte-edge-") as scratch,
    ):
        found = survey(ssh, workdir=remote.workdir, python=remote.python)

        def choose(installed: Sequence[str] = ()) -> Plan:
            return plan(
                found,
                formats,
                profile.runtimes,
                remote.host,
                compile_there=compile_there,
                installed=installed,
            )

        chosen = choose()
        marker = read_marker(ssh, f"{found.work}/{chosen.env_name}")
        chosen = choose(marker.extras)
        check_memory(found, models, settings.context_tokens, remote.host)
        blobs = [blob for model in models for blob in blobs_of(model)]
        inputs = blobs_of(task) if task else []
        missing = missing_bytes(ssh, found.work, [*blobs, *inputs])
        check_disk(found, missing + env_bytes_missing(marker, chosen, ENV_BYTES), remote.host)
        if chosen.why:
            say(f"GGUF runs on {chosen.why}")
        prepare(ssh, found.work)
        site = Site(ssh, found, Patience(say), say, reporter.transfer)
        wheel = own_wheel(Path(scratch))
        wheel_there = send_wheel(site, wheel)
        python = install(site, chosen, wheel, wheel_there)
        site.send([*blobs, *inputs])
        common = Request(
            settings=settings,
            task=f"./task/{inputs[0].name.partition('/')[0]}" if inputs else None,
            split=split,
            limit=limit,
            speed=speed,
        )
        requests = [common.model_copy(update={"source": f"./models/{m.resolve().name}"}) for m in models]
        commands = [[python, *BENCH, request.model_dump_json()] for request in requests]
        key = content_key(commands, [(blob.name, blob.sha256) for blob in [*blobs, *inputs]])
        job = site.job(f"bench-{key[:12]}", chosen.python, wheel_there)
        if not job.is_laid_out():
            place(ssh, found.work, f"{job.folder}/models", blobs)
            place(ssh, found.work, f"{job.folder}/task", inputs)
            job.lay_out(commands, keep_going=True)
        say("measuring")
        return _measure(job, say, on_row, {model.resolve().name for model in models})


def _measure(
    job: RemoteJob, say: Callable[[str], None], on_row: Callable[[Row], None] | None, models: set[str]
) -> list[Row]:
    """Follow the benchmark to its end; of a row that came before and after a break the last one counts."""
    rows: dict[str, Row] = {}

    def take(line: str) -> None:
        try:
            value = json.loads(line)
            row = (QualityRow if "task" in value else SpeedRow).model_validate(value)
        except (ValueError, TypeError, ValidationError):
            say(f"not a result: {line[:200]}")
            return
        if isinstance(row, SpeedRow):
            key = content_key("speed", row.model_filename, row.sha256, row.test, row.n_threads)
        else:
            key = content_key("quality", row.model_filename, row.sha256, row.task, row.split, row.n_threads)
        rows[key] = row
        if on_row:
            on_row(row)

    def log(text: str) -> None:
        for line in text.splitlines():
            if line.strip():
                say(line)

    try:
        job.run(take, log)
    except JobFailed:
        # A test that was rejected or crashed is a row with its reason, and the caller reports it.
        if not models <= {row.model_filename for row in rows.values()}:
            raise
    except KeyboardInterrupt:
        say("stopping the job there")
        with suppress(ArteError):
            job.stop()
        raise
    with suppress(ConnectionLost):
        job.remove()
    return list(rows.values())
