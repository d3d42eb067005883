"""A job outlives the connection that began it, has the device for itself, and goes on where it was stopped."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import Patch

from arte_edge.device.ssh import agent as job_module
from arte_edge.device.ssh.connection import JobFailed, ReconnectPolicy, RemoteJob, Ssh
from arte_edge.errors import ArteError

ROOT = Path(__file__).resolve().parents[3]


def rows(n: int, seconds: float = 0.0, code: int = 0) -> list[str]:
    """Return a command that writes `n` rows, one every `seconds`, and ends with `code`."""
    text = (
        f"import sys,time\nfor i in range({n}):\n print('{{\"row\": %d}}' % i, flush=True)\n"
        f" time.sleep({seconds})\nprint('done measuring', file=sys.stderr)\nsys.exit({code})"
    )
    return [sys.executable, "-c", text]


def make(device: Any, ssh: Ssh, commands: Sequence[Sequence[str]], name: str = "one") -> RemoteJob:
    folder = f"{device.work}/jobs/{name}"
    job = RemoteJob(ssh, folder, sys.executable, str(ROOT), ReconnectPolicy(quiet))
    job.prepare(commands)
    return job


def quiet(text: str) -> None: ...


def numbers(lines: Sequence[str]) -> list[int]:
    return [json.loads(line)["row"] for line in lines]


def test_a_failing_command_ends_the_job_with_its_last_words_and_is_run_again(device: Any) -> None:
    with device.ssh() as ssh:
        job = make(device, ssh, [rows(1), rows(1, code=3), rows(9)])
        got: list[str] = []
        with pytest.raises(JobFailed, match=r"done measuring \(exit code 3\)"):
            job.run(got.append, quiet)
        assert numbers(got) == [0, 0]
        job.prepare([rows(1), rows(2), rows(3)])
        again: list[str] = []
        job.run(again.append, quiet)
    assert numbers(again) == [0, 0, 0, 1, 0, 1, 2]  # kept: first command, failed one; then the rest


def test_a_benchmark_goes_on_with_the_next_model_when_one_failed(device: Any) -> None:
    got: list[str] = []
    with device.ssh() as ssh:
        job = make(device, ssh, [])
        job.prepare([rows(1, code=1), rows(2)], keep_going=True)
        with pytest.raises(JobFailed, match="exit code 1"):
            job.run(got.append, quiet)
    assert numbers(got) == [0, 0, 1]


def test_two_jobs_never_run_at_once(device: Any) -> None:
    with device.ssh() as ssh, device.ssh() as other:
        slow = make(device, ssh, [rows(500, 0.1)])

        def meanwhile(line: str) -> None:
            if line != '{"row": 0}':
                return
            with pytest.raises(ArteError, match="busy with another benchmark"):
                make(device, other, [rows(1)], "two").run(quiet, quiet)
            slow.stop()

        with pytest.raises(ArteError, match="killed there"):
            slow.run(meanwhile, quiet)
        make(device, other, [rows(1)], "two").run(quiet, quiet)


def test_a_reboot_is_noticed_and_the_finished_part_is_kept(tmp_path: Path, monkeypatch: Patch) -> None:
    folder = tmp_path / "jobs" / "one"
    folder.mkdir(parents=True)
    (folder / "commands.json").write_text(json.dumps({"commands": [rows(2), rows(1000, 0.05)]}))
    monkeypatch.chdir(ROOT)
    assert job_module.start(folder) == {"state": "running", "why": ""}
    seen: list[dict[str, Any]] = []
    for event in job_module.follow(folder, 0, 0):
        seen.append(event)
        if "".join(e.get("out", "") for e in seen).count("\n") > 4:
            break
    # A reboot: every process is gone at once, the card keeps what was flushed, and the boot has a new name.
    pid = json.loads((tmp_path / "owner.json").read_text())["pid"]
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with (folder / "out.jsonl").open("ab") as file:
        file.write(b'{"torn')
    monkeypatch.setattr(job_module, "boot_id", lambda: "another boot")
    assert job_module.state(folder) == {"state": "idle", "why": "reboot"}
    assert list(job_module.follow(folder, 10_000_000, 0))[-1]["end"]["why"] == "reboot"
    (folder / "commands.json").write_text(json.dumps({"commands": [rows(2), rows(3)]}))
    assert job_module.start(folder) == {"state": "running", "why": "reboot"}
    *_, last = job_module.follow(folder, 0, 0)
    assert last["end"] == {"state": "ended", "code": 0}
    lines = (folder / "out.jsonl").read_text().splitlines()
    assert numbers(lines[:2]) == [0, 1]
    assert numbers(lines[-3:]) == [0, 1, 2]
    assert "torn" not in "".join(lines)


def test_a_kill_from_outside_is_told_from_a_reboot(device: Any) -> None:
    def kill(line: str) -> None:
        pid = json.loads((device.work / "owner.json").read_text())["pid"]
        os.killpg(pid, signal.SIGKILL)

    with device.ssh() as ssh, pytest.raises(ArteError, match="killed there") as error:
        make(device, ssh, [rows(300, 0.1)]).run(kill, quiet)
    assert "run the same command again to resume" in error.value.hint
