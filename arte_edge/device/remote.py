"""A benchmark on somebody's own device over ssh: looked at, prepared, copied to, run there, brought back.

Everything that can be refused is refused before the first byte is copied. What runs there is
``arte-edge bench`` itself, in an environment of its own and detached from the connection; its rows
come back as it wrote them. Nothing needs root, and everything lies in one folder there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from pydantic import ValidationError
from rich.markup import escape

from arte_edge.bench.result import QualityRow, SpeedRow
from arte_edge.device.copy import Blob, blobs_of, missing_bytes, place
from arte_edge.device.install import Site, env_bytes_missing, install, read_marker, send_wheel
from arte_edge.device.patience import Patience
from arte_edge.device.profile import Profile
from arte_edge.device.remote_env import Plan, plan
from arte_edge.device.remote_job import JobFailed, RemoteJob
from arte_edge.device.space import ENV_BYTES, check_disk, check_memory, context_tokens
from arte_edge.device.ssh import Ssh
from arte_edge.device.ssh_errors import ConnectionLost
from arte_edge.device.survey import survey
from arte_edge.device.transfer import transfer_bar
from arte_edge.device.wheels import own_wheel
from arte_edge.device.work_folder import prepare, reach
from arte_edge.errors import ArteError, InputError
from arte_edge.store import content_key

__all__ = ["Reporter", "Row", "bench_remote", "model_format"]

Row = SpeedRow | QualityRow

# The verb that runs there; a test replaces it.
BENCH = ("-m", "arte_edge", "bench")


class Reporter(Protocol):
    """What says how far things are, on stderr; texts are rich markup."""

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


def model_format(path: Path) -> str:
    """Return gguf, onnx-genai, onnx or safetensors. Raises InputError if `path` is none of them."""
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    if path.is_dir():
        if (path / "genai_config.json").is_file():
            return "onnx-genai"
        if any(path.rglob("*.onnx")):
            return "onnx"
        if any(path.glob("*.safetensors")):
            return "safetensors"
    what = "is no model that a device can run" if path.exists() else "does not exist"
    raise InputError(f"{path} {what}", "Give a .gguf file or a folder that arte-edge export wrote.")


def bench_remote(
    profile: Profile,
    models: Sequence[Path],
    argv: Sequence[str],
    *,
    reporter: Reporter,
    task: Path | None = None,
    compile_there: bool = False,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Run ``arte-edge bench MODELS ARGV`` on the device and return its rows as it wrote them.

    A try that was cut short is continued by the same call: files that are there are not sent again,
    a benchmark that still runs is joined, and models that were finished are not measured again.

    Args:
        argv: further words of the verb; ``-o jsonl --no-save`` is added, ``--task`` too if `task` is given.
        task: a task's folder, copied there.
        compile_there: compile llama-cpp-python on the device rather than take a prebuilt runtime.
        on_row: gets every row as it arrives; a row of an interrupted try may come again.

    Raises:
        InputError: no way to reach it, not a model, a format that cannot run there.
        ArteError: refused before anything is copied (32-bit, old Python, full disk, too little memory,
            host key), or ended there; says whether the same command goes on.
        ConnectionLost: it did not come back in time.
    """
    remote = reach(profile)
    formats = [model_format(model) for model in models]
    name = escape(profile.name or remote.host)

    def say(text: str) -> None:
        reporter.say(f"[dim]{name}:[/] {escape(text)}")

    with (
        Ssh(remote.host, config=remote.ssh_config) as ssh,
        TemporaryDirectory(prefix="arte-edge-") as scratch,
    ):
        found = survey(ssh, workdir=remote.workdir, python=remote.python)

        def choose(installed: Sequence[str] = ()) -> Plan:
            return plan(
                *(found, formats, profile.runtimes, remote.host),
                compile_there=compile_there,
                installed=installed,
            )

        chosen = choose()
        marker = read_marker(ssh, f"{found.work}/{chosen.env_name}")
        chosen = choose(marker.extras)
        check_memory(found, models, context_tokens(argv), remote.host)
        blobs = [blob for model in models for blob in blobs_of(model)]
        inputs = blobs_of(task) if task else []
        missing = missing_bytes(ssh, found.work, [*blobs, *inputs])
        check_disk(found, missing + env_bytes_missing(marker, chosen, ENV_BYTES), remote.host)
        if chosen.why:
            say(f"GGUF runs on {chosen.why}")
        prepare(ssh, found.work)
        with transfer_bar(say) as tick:
            site = Site(ssh, found, Patience(say), say, tick)
            wheel = own_wheel(Path(scratch))
            wheel_there = send_wheel(site, wheel)
            python = install(site, chosen, wheel, wheel_there)
            site.send([*blobs, *inputs])
        words = [*argv, *(["--task", f"./task/{_top(inputs)}"] if task else []), "-o", "jsonl", "--no-save"]
        commands = [[python, *BENCH, f"./models/{model.resolve().name}", *words] for model in models]
        key = content_key(commands, [(blob.name, blob.sha256) for blob in [*blobs, *inputs]])
        job = site.job(f"bench-{key[:12]}", chosen.python, wheel_there)
        if not job.is_laid_out():
            place(ssh, found.work, f"{job.folder}/models", blobs)
            place(ssh, found.work, f"{job.folder}/task", inputs)
            job.lay_out(commands, keep_going=True)
        say("measuring")
        return _measure(job, say, on_row, {model.resolve().name for model in models})


def _top(blobs: Sequence[Blob]) -> str:
    return blobs[0].name.partition("/")[0]


def _measure(
    job: RemoteJob, say: Callable[[str], None], on_row: Callable[[Row], None] | None, wanted: set[str]
) -> list[Row]:
    """Follow the benchmark to its end; a row that came twice, before and after a break, counts as it came last."""
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

    def told(text: str) -> None:
        for line in text.splitlines():
            if line.strip():
                say(line)

    try:
        job.run(take, told)
    except JobFailed:
        # A test that was refused or died is a row with its reason, and the verb says so with its exit code.
        if not wanted <= {row.model_filename for row in rows.values()}:
            raise
    except KeyboardInterrupt:
        say("stopping it there")
        with suppress(ArteError):
            job.stop()
        raise
    with suppress(ConnectionLost):
        job.remove()
    return list(rows.values())
