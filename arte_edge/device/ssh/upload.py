"""Files to the device: by content, resumed where they broke off, checked by sha256, sent once.

A file becomes ``<work>/blobs/<sha256>`` there; until it is whole and its sum is right it is
``<sha256>.part``, which the next attempt appends to. Names are links made for one job
(`place`), so that two runs with the same weights under different names keep one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from arte_edge.cache import sha256_file
from arte_edge.device.ssh.connection import ConnectionLost, Patience, Ssh
from arte_edge.errors import ArteError

__all__ = ["Blob", "Tick", "blobs_of", "missing_bytes", "place", "put_text", "send"]

# Name of the file, bytes there, bytes in all.
Tick = Callable[[str, int, int], None]
_CHUNK_BYTES = 1 << 18
_SETTLE_S = "0.5"
# $1 blobs folder, then sums: prints the size of each that is there, whole (=) or in part (+)
_SIZES = r"""
d=$1; shift
for sum in "$@"; do
  if [ -f "$d/$sum" ]; then echo "= $(wc -c < "$d/$sum")"
  elif [ -f "$d/$sum.part" ]; then echo "+ $(wc -c < "$d/$sum.part")"
  else echo "+ 0"; fi
done
"""
# $1 part file: wait until what an older, cut connection still delivers has arrived; its size
_SETTLED = r"""
[ -e "$1" ] || { echo 0; exit 0; }
a=-1; b=$(wc -c < "$1")
while [ "$a" != "$b" ]; do a=$b; sleep "$2"; b=$(wc -c < "$1"); done
echo "$b"
"""
# $1 part file, $2 sum, $3 whole file, $4 its size. A cut connection looks like the end of the input, so
# the size comes before the sum. sync: a name on the card must never stand for bytes that are not.
_APPEND = r"""
umask 077
mkdir -p "$(dirname "$1")" && cat >> "$1" || exit 1
if [ "$(wc -c < "$1")" -lt "$4" ]; then echo short; exit 0; fi
if command -v sha256sum >/dev/null 2>&1; then s=$(sha256sum < "$1"); else s=$(shasum -a 256 < "$1"); fi
if [ "${s%% *}" != "$2" ]; then rm -f "$1"; echo wrong; exit 0; fi
sync "$1" 2>/dev/null || sync
mv -f "$1" "$3" && echo right
"""
# $1 blobs folder, $2 folder to make, then pairs of sum and name below it
_LINK = r"""
umask 077
b=$1; d=$2; shift 2
rm -rf "$d"
while [ $# -gt 0 ]; do
  mkdir -p "$(dirname "$d/$2")" || exit 1
  ln -f "$b/$1" "$d/$2" 2>/dev/null || cp "$b/$1" "$d/$2" || exit 1
  shift 2
done
"""


@dataclass(frozen=True)
class Blob:
    """One file to send."""

    local: Path
    name: str  # relative path it gets there, with '/'
    sha256: str
    size_bytes: int


def blobs_of(path: Path) -> list[Blob]:
    """Return the file `path`, or the files of the folder `path` without hidden ones, as they are named in it."""
    if path.is_file():
        return [_blob(path, path.name)]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    inside = [(file, file.relative_to(path)) for file in files]
    return [
        _blob(file, f"{path.resolve().name}/{name.as_posix()}")
        for file, name in inside
        if not any(part.startswith(".") for part in name.parts)
    ]


def _blob(path: Path, name: str) -> Blob:
    return Blob(path, name, sha256_file(path), path.stat().st_size)


def _there(ssh: Ssh, work: str, blobs: Sequence[Blob]) -> dict[str, int | None]:
    """Return for every sum how many bytes of it are there; None: all of it, checked."""
    lines = ssh.run(_SIZES, f"{work}/blobs", *(blob.sha256 for blob in blobs)).splitlines()
    pairs = zip(blobs, (line.split() for line in lines), strict=True)
    return {blob.sha256: None if state == "=" else int(size) for blob, (state, size) in pairs}


def missing_bytes(ssh: Ssh, work: str, blobs: Sequence[Blob]) -> int:
    """Return how many bytes of `blobs` are not there yet. Raises as `Ssh.run` does."""
    sizes = {blob.sha256: blob.size_bytes for blob in blobs}
    there = _there(ssh, work, blobs)
    return sum(max(0, sizes[key] - done) for key, done in there.items() if done is not None)


def send(ssh: Ssh, work: str, blobs: Sequence[Blob], *, patience: Patience, tick: Tick | None = None) -> None:
    """Bring every blob there. What is there already is not sent again; a cut connection is resumed.

    Raises:
        ConnectionLost: it did not come back in time; what arrived stays.
        RemoteError: the disk there is full, or a command failed.
        ArteError: the bytes arrive damaged twice.
    """
    there = patience.keep_trying(partial(_there, ssh, work, blobs))
    for blob in blobs:
        tries_left = 2
        while there[blob.sha256] is not None:
            if patience.keep_trying(partial(_send_one, ssh, work, blob, there, patience, tick)):
                there[blob.sha256] = None
                continue
            tries_left -= 1
            if not tries_left:
                raise ArteError(
                    f"Checksum mismatch after uploading {blob.name} to {ssh.host} (2 attempts)",
                    "The card or memory there may be failing, or the file changed during the upload.",
                )


def _send_one(
    ssh: Ssh, work: str, blob: Blob, there: dict[str, int | None], patience: Patience, tick: Tick | None
) -> bool:
    """Send what is missing of one file; False if its sum was wrong, and then nothing of it is left there.

    Args:
        there: bytes that are there, by sum; 0 after a try that may have left some.
    """
    whole = f"{work}/blobs/{blob.sha256}"
    part = f"{whole}.part"
    done_bytes = there[blob.sha256] or 0
    if done_bytes:
        done_bytes = int(ssh.run(_SETTLED, part, _SETTLE_S))
    patience.reached(blob.sha256, done_bytes)
    there[blob.sha256] = max(1, done_bytes)  # from here on some may be there
    with (
        blob.local.open("rb") as file,
        ssh.open(_APPEND, part, blob.sha256, whole, str(blob.size_bytes)) as channel,
    ):
        file.seek(done_bytes)
        with suppress(BrokenPipeError):  # whatever ended it, `finish` says why
            while data := file.read(_CHUNK_BYTES):
                view = memoryview(data)
                while view:
                    view = view[channel.sent.write(view) :]
                done_bytes += len(data)
                if tick:
                    tick(blob.name, done_bytes, blob.size_bytes)
        answer = channel.finish().strip()
    if answer == "short":
        raise ConnectionLost(ssh.host, "it ended before the file did")
    there[blob.sha256] = 0
    return answer == "right"


def place(ssh: Ssh, work: str, folder: str, blobs: Sequence[Blob]) -> None:
    """Make `folder` there anew with `blobs` under their names. Raises as `Ssh.run` does."""
    pairs = [word for blob in blobs for word in (blob.sha256, blob.name)]
    ssh.run(_LINK, f"{work}/blobs", folder, *pairs)


def put_text(ssh: Ssh, path: str, text: str) -> None:
    """Write a small file there, whole or not at all."""
    script = 'umask 077; mkdir -p "$(dirname "$1")" && printf %s "$2" > "$1.tmp" && mv -f "$1.tmp" "$1"'
    ssh.run(script, path, text)
