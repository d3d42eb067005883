"""A benchmark on a device over real ssh: refused before it copies, cut in the middle, continued, cleaned away."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Make, Patch

from arte_edge.bench import remote as remote_module
from arte_edge.bench.remote import bench_remote
from arte_edge.bench.settings import BenchSettings, Reporter
from arte_edge.device.profiles import Profile, Remote
from arte_edge.device.ssh.connection import ConnectionLost, RemoteError
from arte_edge.device.ssh.probe import Survey
from arte_edge.device.ssh.workdir import check, clean
from arte_edge.errors import ArteError, InputError
from arte_edge.results.rows import DeviceFacts, QualityRow, SpeedRow

FACTS = DeviceFacts(fingerprint="0" * 16, cpu="Cortex-A76", arch="aarch64", cores=4, memory_bytes=8 << 30)
SPEED = SpeedRow(
    test="tg8",
    model_filename="X",
    model_size=1,
    format="gguf",
    n_threads=1,
    n_prompt=0,
    n_gen=8,
    device=FACTS,
)
QUALITY = QualityRow(
    model_filename="X", format="gguf", n_threads=1, task="parity", split="test", n=4, right=3, low=0.3, high=0.9,
    device=FACTS,
)  # fmt: skip
# Replaces the benchmark where a test is about the connection: prints a row per repetition.
STUB = """
import json, sys, time, pathlib
request = json.loads(sys.argv[1])
model = pathlib.Path(request["source"])
assert model.exists(), model
row = json.loads({speed!r}) | {{"model_filename": model.name, "model_size": 7}}
for i in range(request["settings"]["repetitions"]):
    print(json.dumps(row | {{"test": "tg%d" % i}}), flush=True)
    print("test", i, "é[bold]", file=sys.stderr, flush=True)
    time.sleep(0.1)
if request["task"]:
    task = pathlib.Path(request["task"])
    assert (task / "task.toml").read_text() == "name = 'parity'"
    print(json.dumps(json.loads({quality!r}) | {{"model_filename": model.name}}), flush=True)
"""


class Said(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture
def profile(device: Any) -> Profile:
    remote = Remote(host="kitchen", ssh_config=device.config, python=sys.executable)
    return Profile(name="my-pi", title="mine", cores=4, memory_bytes=(8 << 30,), remote=remote)


@pytest.fixture
def stub(device: Any, monkeypatch: Patch, tmp_path: Path) -> None:
    """The environment there is this one, and the verb prints rows without measuring."""
    script = tmp_path / "verb.py"
    script.write_text(STUB.format(speed=SPEED.model_dump_json(), quality=QUALITY.model_dump_json()))
    monkeypatch.setattr(remote_module, "install", lambda *args: sys.executable)
    monkeypatch.setattr(remote_module, "BENCH", (str(script),))


@pytest.fixture
def model(make_gguf: Make) -> Path:
    return make_gguf("student-Q8_0.gguf", rows=4000)


def names(rows: list[Any]) -> list[str]:
    return [row.test for row in rows]


def test_rows_come_back_verbatim_and_the_job_is_removed(
    device: Any, profile: Profile, stub: None, model: Path, tmp_path: Path
) -> None:
    task = tmp_path / "parity task"
    task.mkdir()
    (task / "task.toml").write_text("name = 'parity'")
    said, seen = Said(), []
    rows = bench_remote(
        profile, [model], BenchSettings(repetitions=2), reporter=said, task=task, on_row=seen.append
    )
    expected = [
        SPEED.model_copy(update={"model_filename": model.name, "model_size": 7, "test": t})
        for t in ("tg0", "tg1")
    ]
    assert rows == [*expected, QUALITY.model_copy(update={"model_filename": model.name})] == seen
    assert "GGUF runs on " in said.text and "é[bold]" in said.text
    assert list((device.work / "jobs").iterdir()) == []
    assert device.work.stat().st_mode & 0o777 == 0o700
    sent = device.proxy.sent_bytes
    bench_remote(profile, [model], BenchSettings(repetitions=1), reporter=said)
    assert device.proxy.sent_bytes - sent < 200_000  # neither wheel nor model again


def test_a_cut_in_mid_benchmark_and_a_caller_that_left_lose_no_row(
    device: Any, profile: Profile, stub: None, model: Path
) -> None:
    seen: list[Any] = []

    def cut(row: Any) -> None:
        seen.append(row)
        if len(seen) == 3:
            device.proxy.cut()

    rows = bench_remote(profile, [model], BenchSettings(repetitions=9), reporter=Said(), on_row=cut)
    assert names(rows) == [f"tg{i}" for i in range(9)] == names(seen)

    def leave(row: Any) -> None:
        device.proxy.refuse = True
        device.proxy.cut()

    with pytest.raises(ConnectionLost, match="kitchen") as error:
        bench_remote(profile, [model], BenchSettings(repetitions=12), reporter=Said(), on_row=leave)
    assert "run the same command again to resume" in error.value.hint
    device.proxy.refuse = False
    assert len(bench_remote(profile, [model], BenchSettings(repetitions=12), reporter=Said())) == 12


def test_ctrl_c_here_stops_the_benchmark_there(
    device: Any, profile: Profile, stub: None, model: Path
) -> None:
    def interrupt(row: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench_remote(profile, [model], BenchSettings(repetitions=500), reporter=Said(), on_row=interrupt)
    from arte_edge.device.ssh.agent import standing

    (job,) = (device.work / "jobs").iterdir()
    assert standing(job)["state"] == "idle"


def refused(monkeypatch: Patch, device: Any, profile: Profile, model: Path, **facts: Any) -> ArteError:
    """Return the error that a device of these facts ends in; nothing may have been written there."""
    asked = remote_module.survey

    def with_facts(*args: Any, **words: Any) -> Survey:
        return Survey(**{**asked(*args, **words).__dict__, **facts})

    monkeypatch.setattr(remote_module, "survey", with_facts)
    with pytest.raises(ArteError) as error:
        bench_remote(profile, [model], BenchSettings(), reporter=Said())
    assert not device.work.exists()
    assert device.proxy.sent_bytes < 60_000
    return error.value


def test_a_full_disk_is_refused_before_anything_is_copied(
    device: Any, profile: Profile, stub: None, model: Path, monkeypatch: Patch
) -> None:
    error = refused(monkeypatch, device, profile, model, free_bytes=50_000_000)
    assert "50.0 MB are free" in error.message and "--clean" in error.hint


def test_a_model_that_does_not_fit_is_refused_before_anything_is_copied(
    device: Any, profile: Profile, stub: None, model: Path, monkeypatch: Patch
) -> None:
    error = refused(monkeypatch, device, profile, model, available_bytes=40_000_000)
    assert "student-Q8_0.gguf on kitchen does not fit" in error.message and error.exit_code == 2


def test_a_32_bit_system_is_refused(
    device: Any, profile: Profile, stub: None, model: Path, monkeypatch: Patch
) -> None:
    assert "armv7l" in refused(monkeypatch, device, profile, model, machine="armv7l").message


def test_a_device_without_python_or_with_an_old_one_is_told_what_it_needs(
    device: Any, profile: Profile, stub: None, model: Path, program: Callable[[str, str], Path]
) -> None:
    told = {"version": [3, 9, 2], "path": "/usr/bin/python3", "llama_cpp": False, "bits": "64bit"}
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        program(name, f"echo '{json.dumps(told)}'")
    no_path = profile.model_copy(update={"remote": profile.remote.model_copy(update={"python": "python3"})})
    with pytest.raises(ArteError, match=r"kitchen has Python 3\.9\.2; arte-edge needs 3\.11") as error:
        bench_remote(no_path, [model], BenchSettings(), reporter=Said())
    assert "uv python install" in error.value.hint
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        program(name, "exit 1")
    with pytest.raises(ArteError, match="kitchen has no Python"):
        bench_remote(no_path, [model], BenchSettings(), reporter=Said())


def test_a_checkpoint_is_refused_since_torch_never_goes_there(
    device: Any, profile: Profile, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="never installed on a device"):
        bench_remote(profile, [folder], BenchSettings(), reporter=Said())


def test_a_kind_of_device_is_not_a_device(profile: Profile, model: Path) -> None:
    with pytest.raises(InputError, match="without an address"):
        bench_remote(profile.model_copy(update={"remote": None}), [model], BenchSettings(), reporter=Said())


def test_a_folder_that_is_not_ours_is_neither_used_nor_removed(
    device: Any, profile: Profile, stub: None, model: Path
) -> None:
    (device.home / "photos").mkdir()
    (device.home / "photos/cat.jpg").write_bytes(b"cat")
    other = profile.model_copy(update={"remote": profile.remote.model_copy(update={"workdir": "~/photos"})})
    with pytest.raises(RemoteError, match="not made by arte-edge"):
        bench_remote(other, [model], BenchSettings(), reporter=Said())
    with pytest.raises(RemoteError, match="not made by arte-edge"):
        clean(other)
    assert (device.home / "photos/cat.jpg").read_bytes() == b"cat"


def test_cleaning_removes_the_work_folder(device: Any, profile: Profile, stub: None, model: Path) -> None:
    bench_remote(profile, [model], BenchSettings(repetitions=1), reporter=Said())
    assert clean(profile) == str(device.work)
    assert not device.work.exists()
    assert clean(profile) == str(device.work)  # twice is no error


def test_checking_changes_nothing_and_finds_what_is_wrong(
    device: Any, profile: Profile, program: Callable[[str, str], Path]
) -> None:
    report = check(profile)
    assert report.ok
    found = {finding.what: finding for finding in report.findings}
    assert list(found) == ["ssh", "python", "GGUF runtime", "memory", "disk", "work folder"]
    assert "nothing" in found["work folder"].text
    assert list(device.home.iterdir()) == []
    device.knows("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ")
    (finding,) = check(profile).findings
    assert finding.state == "failed" and "host key" in finding.text and "ssh kitchen" in finding.hint


@pytest.mark.model
@pytest.mark.slow
def test_the_real_verb_measures_there_in_an_environment_of_its_own(
    device: Any, profile: Profile, smollm2: Any
) -> None:
    """Nothing replaced: pip installs the device-side parts there, `arte-edge bench` measures, rows come back."""
    said = Said()
    # An interpreter that has no llama-cpp-python, as a fresh device's.
    plain = Remote(host="kitchen", ssh_config=device.config, python=sys._base_executable)
    mine = profile.model_copy(update={"remote": plain})
    settings = BenchSettings(n_prompt=(8,), n_gen=(8,), repetitions=1, threads=(1,), warmup=False)
    rows = bench_remote(mine, [smollm2.gguf], settings, reporter=said)
    assert [(row.test, row.status) for row in rows] == [("pp8", "ok"), ("tg8", "ok")]
    assert all(row.runtime.startswith("xllamacpp") and row.sha256 for row in rows)
    assert "xllamacpp, prebuilt" in said.text
    (env,) = device.work.glob("env-*")
    installed = {path.name.partition("-")[0] for path in env.glob("lib/python3*/site-packages/*.dist-info")}
    assert {"xllamacpp", "arte_edge", "numpy"} <= installed
    assert installed.isdisjoint({"torch", "transformers", "scipy", "llama_cpp_python"})
