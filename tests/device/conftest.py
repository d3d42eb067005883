"""A real OpenSSH server on loopback: its own host key, its own logins, and a home folder that is nobody's.

No PAM, no root, a free port. ``ssh -F`` gives the client its own configuration, so that nothing of
the developer's own is read or written.
"""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tiny import Folders, Patch, free_port

from arte_edge.device.ssh.connection import Ssh


class Proxy:
    """A port in front of the server that closes a connection after so many bytes towards it, as a bad link does."""

    def __init__(self, port: int) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._behind = port
        self._open: list[socket.socket] = []
        self.cut_after_bytes: int | None = None
        self.refuse = False
        self.cuts = 0
        self.sent_bytes = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            if self.refuse:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._behind))
            self._open += [client, server]
            for ends in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_up: bool) -> None:
        with suppress(OSError):
            while data := source.recv(32768):
                if is_up:
                    self.sent_bytes += len(data)
                    if self.cut_after_bytes is not None:
                        self.cut_after_bytes -= len(data)
                        if self.cut_after_bytes <= 0:
                            self.cut_after_bytes = None
                            self.cut()
                            return
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Close every connection now."""
        self.cuts += 1
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def close(self) -> None:
        self.cut()
        self._server.close()


@dataclass
class Device:
    """The machine behind the loopback server, as a test sees it."""

    folder: Path
    home: Path
    proxy: Proxy
    host: str = "kitchen"
    extra: list[str] = field(default_factory=list)

    @property
    def config(self) -> str:
        return str(self.folder / "ssh_config")

    @property
    def work(self) -> Path:
        return self.home / ".cache/arte-edge-device"

    def ssh(self) -> Ssh:
        return Ssh(self.host, config=self.config)

    def knows(self, key: str) -> None:
        """Write what the client believes to be the server's host key."""
        (self.folder / "known_hosts").write_text(f"kitchen {key}\n", encoding="ascii")

    @property
    def key(self) -> str:
        return " ".join((self.folder / "host_key.pub").read_text(encoding="ascii").split()[:2])


def keygen(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as probe:
        return probe.recv(4) == b"SSH-"
    return False


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: Folders) -> Iterator[tuple[Path, int]]:
    """The folder of a running server's keys, and its port. Its sessions find their home in ``<folder>/home``."""
    binary = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if binary is None or shutil.which("ssh-keygen") is None:
        pytest.skip("no OpenSSH server on this machine: apt-get install openssh-server")
    folder = tmp_path_factory.mktemp("sshd")
    folder.chmod(0o700)
    keygen(folder / "host_key")
    keygen(folder / "login")
    shutil.copy(folder / "login.pub", folder / "authorized_keys")
    (folder / "home").mkdir()
    # The account's real home stays untouched: every session begins with another HOME, and with a PATH
    # in front of which a test can put programs of its own.
    home = folder / "home"
    start = f'HOME={home}; PATH={home}/bin:$PATH; export HOME PATH; cd; exec sh -c "$SSH_ORIGINAL_COMMAND"'
    (folder / "session").write_text(f"#!/bin/sh\nunset XDG_CACHE_HOME\n{start}\n", encoding="ascii")
    (folder / "session").chmod(0o755)
    port = free_port()
    lines = [
        *(f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {folder}/host_key", "PidFile none"),
        *(f"AuthorizedKeysFile {folder}/authorized_keys", "StrictModes no", "UsePAM no"),
        *("PasswordAuthentication no", "KbdInteractiveAuthentication no", "PermitRootLogin yes"),
        *("MaxStartups 100", f"ForceCommand {folder}/session"),
    ]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n", encoding="ascii")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd separates its privileges
    server = subprocess.Popen(
        [binary, "-D", "-e", "-f", str(folder / "sshd_config")],
        stdin=subprocess.DEVNULL,
        stderr=(folder / "log").open("wb"),
    )
    until = time.monotonic() + 10
    while not answers(port):
        if server.poll() is not None or time.monotonic() > until:
            pytest.skip(f"sshd does not start here: {(folder / 'log').read_text()[-300:]}")
        time.sleep(0.05)
    yield folder, port
    server.terminate()
    server.wait()


@pytest.fixture
def device(sshd: tuple[Path, int], monkeypatch: Patch) -> Iterator[Device]:
    """A device named ``kitchen`` with an empty home, behind a link that a test can cut."""
    from arte_edge.device.ssh import connection, workdir

    monkeypatch.setattr(connection, "WAITS_S", (0.05,) * 6)
    monkeypatch.setattr(workdir, "_SETTLE_S", "0.05")
    folder, port = sshd
    proxy = Proxy(port)
    home = folder / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    found = Device(folder, home, proxy)
    found.knows(found.key)
    lines = [
        *("Host kitchen", "HostName 127.0.0.1", f"Port {proxy.port}", "HostKeyAlias kitchen"),
        *(f"IdentityFile {folder}/login", "IdentitiesOnly yes", "IdentityAgent none"),
        *(f"UserKnownHostsFile {folder}/known_hosts", "GlobalKnownHostsFile none"),
    ]
    (folder / "ssh_config").write_text("\n".join(lines) + "\n", encoding="ascii")
    yield found
    proxy.close()


@pytest.fixture
def program(device: Device) -> Callable[[str, str], Path]:
    """Put a shell script of this name first on the device's PATH: ``program("python3", "exit 1")``."""

    def write(name: str, text: str) -> Path:
        path = device.home / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    return write
