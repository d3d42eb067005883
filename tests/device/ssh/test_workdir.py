"""Files reach the device whole, resumed where a cut left them, and once."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from arte_edge.device.ssh.connection import ConnectionLost, ReconnectPolicy, RemoteError
from arte_edge.device.ssh.workdir import blobs_of, missing_bytes, place, send

SIZE = 6_000_000


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "student Q8 'quoted'.gguf"
    path.write_bytes(os.urandom(SIZE))
    return path


def put(device: Any, path: Path, tick: Any = None, said: list[str] | None = None) -> None:
    patience = ReconnectPolicy((said if said is not None else []).append)
    with device.ssh() as ssh:
        send(ssh, str(device.work), blobs_of(path), policy=patience, tick=tick)


def arrived(device: Any, path: Path) -> bool:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    there = device.work / "blobs" / digest
    return there.is_file() and hashlib.sha256(there.read_bytes()).hexdigest() == digest


def test_a_file_arrives_private_and_whole_and_is_not_sent_again(device: Any, model: Path) -> None:
    ticks: list[tuple[str, int, int]] = []
    put(device, model, lambda *tick: ticks.append(tick))
    assert arrived(device, model)
    assert ticks[-1] == (model.name, SIZE, SIZE)
    assert [done for _, done, _ in ticks] == sorted(done for _, done, _ in ticks)
    (there,) = (device.work / "blobs").iterdir()
    assert there.stat().st_mode & 0o077 == 0
    before = device.proxy.sent_bytes
    put(device, model)
    assert device.proxy.sent_bytes - before < 50_000


def test_a_connection_cut_at_half_of_the_copy_goes_on_from_there(device: Any, model: Path) -> None:
    device.proxy.cut_after_bytes = SIZE // 2
    said: list[str] = []
    put(device, model, said=said)
    assert device.proxy.cuts == 1
    assert len(said) == 1 and "no connection" in said[0]
    assert arrived(device, model)
    # What was sent in both tries is little more than the file: the first half was kept. What the
    # cut swallowed on the way is sent again, at most what the buffers of both sides hold.
    assert device.proxy.sent_bytes < 1.4 * SIZE


def test_a_link_that_stays_away_ends_in_an_error_and_the_next_try_goes_on(device: Any, model: Path) -> None:
    device.proxy.cut_after_bytes = SIZE // 2
    cut = device.proxy.cut

    def cut_for_good() -> None:
        device.proxy.refuse = True
        cut()

    device.proxy.cut = cut_for_good
    with pytest.raises(ConnectionLost) as error:
        put(device, model)
    assert "run the same command again to resume" in error.value.hint
    (part,) = (device.work / "blobs").iterdir()
    kept = part.stat().st_size
    assert part.suffix == ".part" and 0 < kept < SIZE
    device.proxy.refuse = False
    before = device.proxy.sent_bytes
    with device.ssh() as ssh:
        assert missing_bytes(ssh, str(device.work), blobs_of(model)) == SIZE - kept
    put(device, model)
    assert arrived(device, model)
    assert device.proxy.sent_bytes - before < SIZE - kept + 200_000


def test_damaged_bytes_there_are_found_and_sent_again(device: Any, model: Path) -> None:
    (blob,) = blobs_of(model)
    part = device.work / "blobs" / f"{blob.sha256}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\0" * (SIZE // 3))
    put(device, model)
    assert arrived(device, model)


def test_a_full_disk_there_is_said_and_what_arrived_is_kept(device: Any, model: Path) -> None:
    session = device.folder / "session"
    kept = session.read_text()
    # No file of a session may grow beyond 2 MiB: the kernel's refusal as a full card gives it, without
    # root. SIGXFSZ ignored, the program sees the error (EFBIG) instead of dying.
    limit = "trap '' XFSZ; ulimit -f 4096\n"
    session.write_text(kept.replace("#!/bin/sh\n", f"#!/bin/sh\n{limit}"))
    try:
        with pytest.raises(RemoteError, match="kitchen: the disk there is full") as error:
            put(device, model)
    finally:
        session.write_text(kept)
    assert "run the same command again to resume" in error.value.hint
    (part,) = (device.work / "blobs").iterdir()
    assert part.stat().st_size == 2 << 20
    put(device, model)
    assert arrived(device, model)


def test_a_folder_keeps_its_names_and_shares_equal_files(device: Any, tmp_path: Path) -> None:
    folder = tmp_path / "onnx int4"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.onnx.data").write_bytes(b"weights" * 1000)
    (folder / "sub" / "copy").write_bytes(b"weights" * 1000)
    (folder / ".cache").write_text("not sent")
    blobs = blobs_of(folder)
    assert [blob.name for blob in blobs] == ["onnx int4/model.onnx.data", "onnx int4/sub/copy"]
    with device.ssh() as ssh:
        assert missing_bytes(ssh, str(device.work), blobs) == 7000
        send(ssh, str(device.work), blobs, policy=ReconnectPolicy(print))
        target = f"{device.work}/jobs/a b/models"
        place(ssh, str(device.work), target, blobs)
        place(ssh, str(device.work), target, blobs)
    placed = Path(target) / "onnx int4"
    assert sorted(p.name for p in placed.rglob("*")) == ["copy", "model.onnx.data", "sub"]
    assert (placed / "sub/copy").read_bytes() == (folder / "sub/copy").read_bytes()
    assert (placed / "sub/copy").stat().st_ino == (placed / "model.onnx.data").stat().st_ino
    assert len(list((device.work / "blobs").iterdir())) == 1
