"""A benchmark on a device over real ssh: refused before it copies, cut in the middle, continued, cleaned away."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import Make, Patch, quality_row, speed_row, student_file

from arte_edge.bench import remote as remote_module
from arte_edge.bench.remote import bench_remote
from arte_edge.bench.settings import BenchSettings, Reporter, Request
from arte_edge.cache import sha256_file
from arte_edge.device.profiles import Profile, Remote
from arte_edge.device.ssh.agent import state
from arte_edge.device.ssh.connection import ConnectionLost, RemoteError
from arte_edge.device.ssh.environment import check
from arte_edge.device.ssh.workdir import clean
from arte_edge.errors import ArteError, InputError
from arte_edge.results.rows import QualityRow, Row
from arte_edge.results.student_json import Asking, write_student

BUSY = {"contended": True, "contended_reason": "other work", "n_repeated": 3, "cpu": ({"wall_s": 1, "run_share": 0.5},)}
SPEED = speed_row("tg8", model_filename="X", model_size=1, **BUSY)
ANSWERS = tuple((f"{i:016x}", "on", i < 3) for i in range(4))
QUALITY = quality_row(3, model_filename="X", task="parity", n=4, answers=ANSWERS)
# Replaces the benchmark where a test is about the connection: prints a row per repetition.
STUB = """
import hashlib, json, sys, time, pathlib
request = json.loads(sys.argv[1])
model = pathlib.Path(request["source"])
assert model.exists(), model
own = {{"model_filename": model.name, "sha256": hashlib.sha256(model.read_bytes()).hexdigest()}}
row = json.loads({speed!r}) | own
for i in range(request["settings"]["repetitions"]):
    print(json.dumps(row | {{"test": "tg%d" % i}}), flush=True)
    print("test", i, "é[bold]", file=sys.stderr, flush=True)
    time.sleep(0.1)
if request["task"]:
    task = pathlib.Path(request["task"])
    assert (task / "task.toml").read_text() == "name = 'parity'"
    own |= {{"answer_tokens_mean": request["answer_tokens"], "quantization": model.stem[-3:]}}
    print(json.dumps(json.loads({quality!r}) | own), flush=True)
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
def stub(device: Any, monkeypatch: Patch, tmp_path: Path) -> Path:
    """The environment there is this one, and the verb prints rows without measuring."""
    script = tmp_path / "verb.py"
    script.write_text(STUB.format(speed=SPEED.model_dump_json(), quality=QUALITY.model_dump_json()))
    monkeypatch.setattr(remote_module, "install", lambda *args: sys.executable)
    monkeypatch.setattr(remote_module, "BENCH", (str(script),))
    return script


@pytest.fixture
def model(make_gguf: Make) -> Path:
    return make_gguf("student-Q8_0.gguf", rows=4000)


@pytest.fixture
def bench(profile: Profile, stub: Path, model: Path) -> Make:
    """Run the stub with `model` on the device: ``bench(repetitions=2, on_row=…)``."""

    def run(profile: Profile = profile, repetitions: int = 1, task: str | None = None, **options: Any) -> list[Any]:
        request = Request(settings=BenchSettings(repetitions=repetitions), task=task)
        return bench_remote(profile, [model], request, **{"reporter": Said()} | options)

    return run


def test_rows_come_back_verbatim_and_the_job_is_removed(device: Any, bench: Make, model: Path, tmp_path: Path) -> None:
    task = tmp_path / "parity task"
    task.mkdir()
    (task / "task.toml").write_text("name = 'parity'")
    said, seen = Said(), []
    rows = bench(repetitions=2, reporter=said, task=str(task), on_row=seen.append)
    own = {"model_filename": model.name, "sha256": sha256_file(model)}
    expected = [SPEED.model_copy(update=own | {"test": test}) for test in ("tg0", "tg1")]
    answered = QUALITY.model_copy(update=own | {"answer_tokens_mean": 0, "quantization": "8_0"})
    assert rows == [*expected, answered] == seen
    assert "GGUF runs on " in said.text and "é[bold]" in said.text
    assert list((device.work / "jobs").iterdir()) == []
    assert device.work.stat().st_mode & 0o777 == 0o700
    sent = device.proxy.sent_bytes
    bench()
    assert device.proxy.sent_bytes - sent < 200_000  # neither wheel nor model again


def test_files_of_one_name_and_links_are_measured_each_for_itself(
    profile: Profile, stub: Path, make_gguf: Make, tmp_path: Path
) -> None:
    for name in ("old", "new", "snapshot"):
        (tmp_path / name).mkdir()
    old, new = make_gguf("old/m.gguf", rows=8), make_gguf("new/m.gguf", rows=16)
    link = tmp_path / "snapshot" / "linked.gguf"  # as in the Hub's cache, where the target is called by its hash
    link.symlink_to(old.rename(tmp_path / "old" / "5eb63bbb"))
    old.symlink_to("5eb63bbb")
    request = Request(settings=BenchSettings(repetitions=1))
    rows = bench_remote(profile, [old, new, link], request, reporter=Said())
    expected = [(path.name, sha256_file(path)) for path in (old, new, link)]
    assert [(row.model_filename, row.sha256) for row in rows] == expected


def test_the_16_bit_file_answers_first_the_others_are_paired_with_it_and_budgets_are_those_noted_here(
    profile: Profile, stub: Path, make_gguf: Make, bench_gguf: Path, tmp_path: Path
) -> None:
    model, task = make_gguf("m-Q8_0.gguf"), tmp_path / "parity"
    task.mkdir()
    (task / "task.toml").write_text("name = 'parity'")
    asking = Asking(form="reasoning-first", instruction="Say it.", answer_tokens=250)
    write_student(tmp_path, student_file(asking=asking))
    request = Request(settings=BenchSettings(repetitions=1), task=str(task))
    seen: list[Row] = []
    rows = bench_remote(profile, [model, bench_gguf], request, reporter=Said(), on_row=seen.append)
    assert rows == seen
    first, second = (row for row in rows if isinstance(row, QualityRow))
    assert (first.model_filename, first.difference, first.answer_tokens_mean) == ("tiny-F16.gguf", None, 0)
    assert (second.reference, second.difference, second.answer_tokens_mean) == ("tiny-F16.gguf", 0, 250)


def test_a_cut_in_mid_benchmark_and_a_caller_that_left_lose_no_row(device: Any, bench: Make) -> None:
    seen: list[Any] = []

    def cut(row: Any) -> None:
        seen.append(row)
        if len(seen) == 3:
            device.proxy.cut()

    rows = bench(repetitions=6, on_row=cut)
    assert [row.test for row in rows] == [f"tg{i}" for i in range(6)] == [row.test for row in seen]

    def leave(row: Any) -> None:
        device.proxy.refuse = True
        device.proxy.cut()

    with pytest.raises(ConnectionLost, match="kitchen") as error:
        bench(repetitions=40, on_row=leave)
    assert "same command" in error.value.hint
    device.proxy.refuse = False
    assert len(bench(repetitions=40)) == 40


def test_ctrl_c_stops_the_benchmark_there(device: Any, bench: Make, stub: Path) -> None:
    def interrupt(row: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(repetitions=500, on_row=interrupt)
    (job,) = (device.work / "jobs").iterdir()
    assert state(job)["state"] == "idle"
    running = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not any(str(stub) in words for words in running), "its children end too"


@pytest.mark.parametrize(
    ("facts", "message", "hint"),
    [
        ({"free_bytes": 50_000_000}, "50.0 MB are free", "--clean"),
        ({"available_bytes": 40_000_000}, "student-Q8_0.gguf on kitchen does not fit", ""),
        ({"machine": "armv7l"}, "armv7l", ""),  # a system of 32 bits
    ],
)
def test_what_cannot_run_is_rejected_before_anything_is_copied(
    facts: dict[str, Any], message: str, hint: str, device: Any, bench: Make, monkeypatch: Patch
) -> None:
    probe = remote_module.probe
    monkeypatch.setattr(remote_module, "probe", lambda *a, **k: replace(probe(*a, **k), **facts))
    with pytest.raises(ArteError) as error:
        bench()
    assert message in error.value.message and hint in error.value.hint
    assert not device.work.exists() and device.proxy.sent_bytes < 60_000


def test_a_kind_of_device_is_not_a_device(profile: Profile, bench: Make) -> None:
    with pytest.raises(InputError, match="without an address"):
        bench(profile.model_copy(update={"remote": None}))


def test_a_folder_that_is_not_ours_is_neither_used_nor_removed(device: Any, profile: Profile, bench: Make) -> None:
    (device.home / "photos").mkdir()
    (device.home / "photos/cat.jpg").write_bytes(b"cat")
    other = profile.model_copy(update={"remote": profile.remote.model_copy(update={"workdir": "~/photos"})})
    for use in (bench, clean):
        with pytest.raises(RemoteError, match="not made by arte-edge"):
            use(other)
    assert (device.home / "photos/cat.jpg").read_bytes() == b"cat"


def test_cleaning_removes_the_work_folder(device: Any, profile: Profile, bench: Make) -> None:
    bench()
    for _ in range(2):  # twice is no error
        assert clean(profile) == str(device.work)
        assert not device.work.exists()


def test_checking_changes_nothing_and_finds_what_is_wrong(device: Any, profile: Profile) -> None:
    report = check(profile)
    assert "failed" not in [finding.state for finding in report.findings]
    found = {finding.what: finding for finding in report.findings}
    assert list(found) == ["ssh", "python", "GGUF runtime", "memory", "disk", "work folder"]
    assert "nothing" in found["work folder"].text
    assert list(device.home.iterdir()) == []
    device.knows("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ")
    (finding,) = check(profile).findings
    assert finding.state == "failed" and "host key" in finding.text and "ssh kitchen" in finding.hint


@pytest.mark.model
@pytest.mark.slow
def test_the_real_verb_measures_in_its_own_environment(device: Any, profile: Profile, smollm2: Any) -> None:
    """Nothing replaced: pip installs the device-side parts there, `arte-edge bench` measures, rows come back."""
    said = Said()
    # An interpreter that has no llama-cpp-python, as a fresh device's.
    plain = Remote(host="kitchen", ssh_config=device.config, python=sys._base_executable)
    mine = profile.model_copy(update={"remote": plain})
    settings = BenchSettings(n_prompt=(8,), n_gen=(8,), repetitions=1, threads=(1,), warmup=False)
    rows = bench_remote(mine, [smollm2.gguf], Request(settings=settings), reporter=said)
    assert [(row.test, row.status) for row in rows] == [("pp8", "ok"), ("tg8", "ok")]
    assert all(row.runtime.startswith("xllamacpp") and row.sha256 for row in rows)
    assert "xllamacpp, prebuilt" in said.text
    (env,) = device.work.glob("env-*")
    installed = {path.name.partition("-")[0] for path in env.glob("lib/python3*/site-packages/*.dist-info")}
    assert {"xllamacpp", "arte_edge", "numpy"} <= installed
    assert installed.isdisjoint({"torch", "transformers", "scipy", "llama_cpp_python"})


def test_a_sweep_over_cache_types_keeps_every_row() -> None:
    class Job:
        def run(self, take: Any, log: Any) -> None:
            for kind in ("f16", "q8_0", "q8_0"):  # the last again, as after a reconnect
                take(SPEED.model_copy(update={"type_k": kind}).model_dump_json())

        def remove(self) -> None:
            pass

    rows = remote_module._measure(Job(), print, None, {"X"})  # type: ignore[arg-type]
    assert [row.type_k for row in rows if hasattr(row, "type_k")] == ["f16", "q8_0"]
