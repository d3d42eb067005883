"""One connection to a device: arguments arrive as they left, host keys hold, a cut is told from a refusal."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Patch

from arte_edge.device.ssh.connection import ConnectionLost, ReconnectPolicy, RemoteError, Ssh, connection_error
from arte_edge.errors import ArteError, InputError


def test_what_runs_there_says_what_it_printed_and_not_what_a_login_script_says(device: Any) -> None:
    session = device.folder / "session"
    kept = session.read_text()
    session.write_text(kept.replace("#!/bin/sh\n", "#!/bin/sh\necho welcome to your Pi\n"))
    try:
        with device.ssh() as ssh:
            assert ssh.run("echo out; echo err >&2; pwd") == f"out\n{device.home}\n"
    finally:
        session.write_text(kept)


WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


def test_arguments_arrive_as_they_left(device: Any) -> None:
    @settings(max_examples=12)
    @given(st.lists(WORDS, max_size=4))
    def check(words: list[str]) -> None:
        printed = ssh.run('for word in "$@"; do printf "%s\\001" "$word"; done', *words)
        assert printed == "".join(f"{word}\1" for word in words)

    with device.ssh() as ssh:
        check()
        nasty = "'; touch pwned; echo $(id) `id` \\ \" * ~ é\n-rf"
        assert ssh.run('printf %s "$1"', nasty) == nasty
    assert not (device.home / "pwned").exists()


def test_a_failing_command_says_its_reason_and_code(device: Any) -> None:
    with device.ssh() as ssh, pytest.raises(RemoteError, match="kitchen: no such thing") as error:
        ssh.run("echo no such thing >&2; exit 7")
    assert error.value.code == 7


def test_one_connection_carries_all_commands_and_nothing_of_it_stays(device: Any) -> None:
    with device.ssh() as ssh:
        ssh.run("true")
        ssh.run("true")
        assert len(device.proxy._open) == 2  # one connection, two ends
        folder, master = ssh._folder, ssh._master
    assert not folder.exists()
    assert master.poll() is not None


def test_a_caller_that_is_killed_leaves_no_connection_behind(device: Any) -> None:
    code = (
        "import sys, time\nfrom arte_edge.device.ssh.connection import Ssh\n"
        "with Ssh('kitchen', config=sys.argv[1]) as ssh:\n"
        " ssh.run('true')\n print(ssh._master.pid, flush=True)\n time.sleep(60)"
    )
    words = [sys.executable, "-c", code, device.config]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parents[3]) as caller:
        assert caller.stdout is not None
        pid = int(caller.stdout.readline())
        caller.kill()
    status = Path(f"/proc/{pid}/status")
    until = time.monotonic() + 10
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert not status.exists() or "State:\tZ" in status.read_text()


@pytest.mark.parametrize("host", ["", "-oProxyCommand=touch pwned", "pi@kitchen x", "pi\n", "\x1b[2J"])
def test_a_host_that_ssh_would_read_as_something_else_is_refused(host: str) -> None:
    with pytest.raises(InputError, match="user@host"):
        Ssh(host)


OTHER_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ"


@pytest.mark.parametrize(
    ("file", "text", "message", "hint"),
    [
        ("known_hosts", f"kitchen {OTHER_KEY}\n", "host key changed", r"ssh-keygen .*-R.*ssh kitchen$"),
        ("known_hosts", "", "unknown host key", "ssh kitchen"),
        ("authorized_keys", "", "login rejected", "ssh-copy-id kitchen"),
    ],
)
def test_a_wrong_key_is_an_error_that_says_what_to_do(
    device: Any, file: str, text: str, message: str, hint: str
) -> None:
    path = device.folder / file
    kept = path.read_bytes()
    path.write_text(text)
    try:
        with device.ssh() as ssh, pytest.raises(ArteError, match=message) as error:
            ssh.run("true")
        assert path.read_text() == text, "no key is accepted by itself"
    finally:
        path.write_bytes(kept)
    assert not isinstance(error.value, ConnectionLost)
    assert re.search(hint, error.value.hint) and device.proxy.sent_bytes < 20_000


def test_a_name_that_nobody_has_is_no_lost_connection(tmp_path: Path) -> None:
    ssh = Ssh("nobody.invalid", config=os.devnull)
    with ssh, pytest.raises(ArteError, match="unknown host") as error:
        ssh.run("true")
    assert not isinstance(error.value, ConnectionLost)


def test_after_a_silent_command_or_a_cut_the_next_one_connects_anew(device: Any) -> None:
    with device.ssh() as ssh:
        with pytest.raises(ConnectionLost, match="no answer in 0 s"):
            ssh.run("sleep 5", timeout_s=0.3)
        assert ssh.run("echo again") == "again\n"
        device.proxy.cut()
        time.sleep(0.2)
        assert ssh.run("echo back") == "back\n"


def test_progress_restores_the_patience(monkeypatch: Patch) -> None:
    patience, calls = ReconnectPolicy(lambda text: None), 0

    def step() -> str:
        nonlocal calls
        calls += 1
        patience.reached("file", calls // 5)  # every fifth try gets further
        if calls < 23:
            raise ConnectionLost("kitchen", "cut")
        return "done"

    monkeypatch.setattr("arte_edge.device.ssh.connection.WAITS_S", (0.0,) * 5)
    assert patience.retry(step) == "done"


@pytest.mark.parametrize("text", ["", "client_loop: send disconnect: Broken pipe", "Connection timed out"])
def test_what_is_not_known_to_be_final_may_be_tried_again(text: str) -> None:
    assert isinstance(connection_error("kitchen", text), ConnectionLost)
