"""The work folder on a device: probing the device, making and removing the folder, uploading files into it.

The probe is one script and one round trip, and writes nothing. A file becomes ``<work>/blobs/<sha256>``;
until it is complete and its checksum is right it is ``<sha256>.part``, which the next attempt appends to.
Names are links made for one job (`place`), so two runs with the same weights under different names share a copy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from arte_edge.cache import sha256_file
from arte_edge.device.profiles import Profile, Remote
from arte_edge.device.ssh.connection import ConnectionLost, ReconnectPolicy, Ssh
from arte_edge.errors import ArteError, InputError
from arte_edge.files import json_loads, own_name

OLDEST_PYTHON = (3, 11)  # requires-python of pyproject.toml
_BUILD_TOOLS = (("cc", "gcc", "clang"), ("c++", "g++", "clang++"))
# Prints an interpreter's facts as one JSON object; must run on every Python that a device may have.
_PYTHON_FACTS = (
    "import json,sys,platform\n"
    "try:\n"
    " from importlib.util import find_spec as f\n"
    " h=f('llama_cpp') is not None\n"
    "except Exception:\n"
    " h=False\n"
    "print(json.dumps({'version':list(sys.version_info[:3]),'path':sys.executable,'llama_cpp':h,"
    "'bits':platform.architecture()[0]}))\n"
    f"sys.exit(sys.version_info < {OLDEST_PYTHON})"
)
# $1 work folder or empty, $2 Python code that prints its facts, $3 the preferred interpreter
_PROBE = r"""
LC_ALL=C; export LC_ALL
case $1 in
  '') w=${XDG_CACHE_HOME:-$HOME/.cache}/arte-edge-device;;
  '~/'*) w=$HOME/${1#'~/'};;
  /*) w=$1;;
  *) w=$HOME/$1;;
esac
echo "work=$w"
echo "system=$(uname -s)"
echo "machine=$(uname -m)"
echo "libc=$(getconf GNU_LIBC_VERSION 2>/dev/null)"
echo "darwin_memory=$(sysctl -n hw.memsize 2>/dev/null)"
for tool in cc gcc clang c++ g++ clang++; do
  command -v "$tool" >/dev/null 2>&1 && echo "tool=$tool"
done
for python in "$3" python3 python3.14 python3.13 python3.12 python3.11; do
  command -v "$python" >/dev/null 2>&1 || continue
  facts=$("$python" -c "$2" 2>/dev/null) && { echo "python=$facts"; break; }
  echo "python=$facts"
done
grep -E '^Mem(Total|Available):' /proc/meminfo 2>/dev/null
d=$w
while [ ! -d "$d" ]; do d=$(dirname "$d"); done
df -Pk "$d" | tail -n 1 | sed 's/^/df=/'
exit 0
"""


@dataclass(frozen=True)
class Python:
    """A Python interpreter on the device."""

    path: str
    version: tuple[int, int, int]
    has_llama_cpp: bool
    bits: int


@dataclass(frozen=True)
class Probe:
    """The facts of one device."""

    work: str  # absolute path of the work folder, which may not exist yet
    system: str
    machine: str
    glibc_minor: int
    pythons: tuple[Python, ...]  # in the order of preference, up to the first that is new enough
    can_compile: bool
    memory_bytes: int  # 0: unknown
    available_bytes: int  # 0: unknown
    free_bytes: int  # on the disk of the work folder

    @property
    def python(self) -> Python | None:
        """The first interpreter that is new enough."""
        return next((python for python in self.pythons if python.version >= OLDEST_PYTHON), None)


def probe(ssh: Ssh, remote: Remote) -> Probe:
    """Return the facts of the device behind `ssh`. Raises as `Ssh.run` does."""
    return parse(ssh.run(_PROBE, remote.workdir, _PYTHON_FACTS, remote.python))


def parse(text: str) -> Probe:
    """Return the facts in the script's output; unknown ones are empty or 0."""
    pairs = [line.partition("=")[::2] for line in text.splitlines() if "=" in line.split(" ", 1)[0]]
    one = dict(reversed(pairs))
    tools = {value for key, value in pairs if key == "tool"}
    memory = {key: int(value) * 1024 for key, value in re.findall(r"(?m)^(Mem\w+):\s+(\d+) kB", text)}
    libc = re.search(r"2\.(\d+)", one.get("libc", ""))
    found = [python for key, value in pairs if key == "python" and (python := _python(value))]
    return Probe(
        work=one.get("work", ""),
        system=one.get("system", ""),
        machine=one.get("machine", ""),
        glibc_minor=int(libc.group(1)) if libc else 0,
        pythons=tuple(python for i, python in enumerate(found) if python not in found[:i]),
        can_compile=all(tools & set(names) for names in _BUILD_TOOLS),
        memory_bytes=memory.get("MemTotal", 0) or int(one.get("darwin_memory", "") or 0),
        available_bytes=memory.get("MemAvailable", 0),
        free_bytes=_free(one.get("df", "")),
    )


def _free(line: str) -> int:
    """Return the fourth column of a line of ``df -Pk``, in bytes; the device's name may contain blanks."""
    found = re.search(r"\s(\d+)\s+(-?\d+)\s+(-?\d+)\s+(?:\d+%|-)\s", line)
    return max(0, int(found.group(3))) * 1024 if found else 0


def _python(text: str) -> Python | None:
    try:
        facts = json_loads(text)
        major, minor, micro = map(int, facts["version"])
        return Python(
            path=str(facts["path"]),
            version=(major, minor, micro),
            has_llama_cpp=bool(facts["llama_cpp"]),
            bits=32 if facts["bits"] == "32bit" else 64,
        )
    except (ValueError, KeyError, TypeError, IndexError):
        return None


_OURS = ".arte-edge-device"  # only a folder with this file in it is ever written to or removed
_PREPARE = r"""
umask 077
w=$1
if [ -L "$w" ]; then echo "$w is a link" >&2; exit 41; fi
if [ -d "$w" ] && [ ! -e "$w/$2" ] && [ -n "$(ls -A "$w")" ]; then
  echo "$w is not empty and was not made by arte-edge" >&2; exit 41
fi
mkdir -p "$w" && chmod 700 "$w" && : > "$w/$2" && mkdir -p "$w/blobs" "$w/jobs" "$w/home"
"""
_CLEAN = r"""
[ -d "$1" ] || exit 0
if [ -L "$1" ] || [ ! -e "$1/$2" ]; then echo "$1 was not made by arte-edge" >&2; exit 41; fi
rm -rf "$1"
"""


def reach(profile: Profile) -> Remote:
    """Return how the device is reached. Raises InputError for a shipped profile, which has no address."""
    if profile.remote is None:
        raise InputError(
            f"'{profile.name}' is a device type without an address",
            f"--device user@host, or once: arte-edge devices add NAME user@host --base {profile.name}",
        )
    return profile.remote


def prepare(ssh: Ssh, work: str) -> None:
    """Make the work folder, private to its owner; RemoteError: it is a link, or holds other files."""
    ssh.run(_PREPARE, work, _OURS)


def clean(profile: Profile) -> str:
    """Remove the work folder with its environments and models; return its path. RemoteError: it is not ours."""
    remote = reach(profile)
    with Ssh(remote.host, config=remote.ssh_config) as ssh:
        work = probe(ssh, remote).work
        ssh.run(_CLEAN, work, _OURS, timeout_s=600)
    return work


# Name of the file, bytes uploaded, bytes in total.
Tick = Callable[[str, int, int], None]
_CHUNK_BYTES = 1 << 18
_SETTLE_S = "0.5"
# $1 blobs folder, then checksums: prints the size of each file, complete (=) or partial (+)
_SIZES = r"""
d=$1; shift
for sum in "$@"; do
  if [ -f "$d/$sum" ]; then echo "= $(wc -c < "$d/$sum")"
  elif [ -f "$d/$sum.part" ]; then echo "+ $(wc -c < "$d/$sum.part")"
  else echo "+ 0"; fi
done
"""
# $1 partial file: waits until the data still in flight from an older, cut connection has arrived; prints its size
_SETTLED = r"""
[ -e "$1" ] || { echo 0; exit 0; }
a=-1; b=$(wc -c < "$1")
while [ "$a" != "$b" ]; do a=$b; sleep "$2"; b=$(wc -c < "$1"); done
echo "$b"
"""
# $1 partial file, $2 checksum, $3 complete file, $4 its size. A cut connection looks like the end of the input,
# so the size is compared before the checksum. sync: the data must be on the card before its final name is.
_APPEND = r"""
umask 077
mkdir -p "$(dirname "$1")" && cat >> "$1" || exit 1
if [ "$(wc -c < "$1")" -lt "$4" ]; then echo short; exit 0; fi
if command -v sha256sum >/dev/null 2>&1; then s=$(sha256sum < "$1"); else s=$(shasum -a 256 < "$1"); fi
if [ "${s%% *}" != "$2" ]; then rm -f "$1"; echo wrong; exit 0; fi
sync "$1" 2>/dev/null || sync
mv -f "$1" "$3" && echo right
"""
# $1 blobs folder, $2 folder to make, then pairs of checksum and name below it
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
    """One file to upload."""

    local: Path
    name: str  # its relative path on the device, with '/'
    sha256: str
    size_bytes: int


def blobs_of(path: Path) -> list[Blob]:
    """Return the file `path`, or the files of the folder `path` except hidden ones."""
    if path.is_file():
        names = {path: path.name}
    else:
        inside = {file: file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()}
        names = {
            file: f"{own_name(path)}/{name.as_posix()}"
            for file, name in inside.items()
            if not any(part.startswith(".") for part in name.parts)
        }
    return [Blob(file, name, sha256_file(file), file.stat().st_size) for file, name in names.items()]


def _there(ssh: Ssh, work: str, blobs: Sequence[Blob]) -> dict[str, int | None]:
    """Return for each checksum how many bytes are on the device; None: the complete, verified file."""
    lines = ssh.run(_SIZES, f"{work}/blobs", *(blob.sha256 for blob in blobs)).splitlines()
    pairs = zip(blobs, (line.split() for line in lines), strict=True)
    return {blob.sha256: None if state == "=" else int(size) for blob, (state, size) in pairs}


def missing_bytes(ssh: Ssh, work: str, blobs: Sequence[Blob]) -> int:
    """Return how many bytes of `blobs` have to be uploaded. Raises as `Ssh.run` does."""
    sizes = {blob.sha256: blob.size_bytes for blob in blobs}
    there = _there(ssh, work, blobs)
    return sum(max(0, sizes[key] - done) for key, done in there.items() if done is not None)


def send(ssh: Ssh, work: str, blobs: Sequence[Blob], *, policy: ReconnectPolicy, tick: Tick | None = None) -> None:
    """Upload the blobs that are not on the device yet, resuming after a cut connection.

    Raises:
        ConnectionLost: it did not come back in time; uploaded data is kept.
        RemoteError: the disk there is full, or a command failed.
        ArteError: the checksum was wrong twice.
    """
    there = policy.retry(partial(_there, ssh, work, blobs))
    for blob in blobs:
        tries_left = 2
        while there[blob.sha256] is not None:
            if policy.retry(partial(_send_one, ssh, work, blob, there, policy, tick)):
                there[blob.sha256] = None
                continue
            tries_left -= 1
            if not tries_left:
                raise ArteError(
                    f"Checksum mismatch after uploading {blob.name} to {ssh.host} (2 attempts)",
                    "The card or memory there may be failing, or the file changed during the upload.",
                )


def _send_one(
    ssh: Ssh, work: str, blob: Blob, there: dict[str, int | None], policy: ReconnectPolicy, tick: Tick | None
) -> bool:
    """Upload the rest of one file; False if its checksum was wrong, and the device has deleted it.

    `there`: bytes on the device, by checksum; at least 1 after an attempt that may have left some.
    """
    whole = f"{work}/blobs/{blob.sha256}"
    part = f"{whole}.part"
    done_bytes = there[blob.sha256] or 0
    if done_bytes:
        done_bytes = int(ssh.run(_SETTLED, part, _SETTLE_S))
    policy.reached(blob.sha256, done_bytes)
    there[blob.sha256] = max(1, done_bytes)
    with blob.local.open("rb") as file, ssh.open(_APPEND, part, blob.sha256, whole, str(blob.size_bytes)) as channel:
        file.seek(done_bytes)
        with suppress(BrokenPipeError):  # `finish` raises the reason
            while data := file.read(_CHUNK_BYTES):
                view = memoryview(data)
                while view:
                    view = view[channel.sent.write(view) :]
                done_bytes += len(data)
                if tick:
                    tick(blob.name, done_bytes, blob.size_bytes)
        answer = channel.finish().strip()
    if answer == "short":
        raise ConnectionLost(ssh.host, "the upload was cut short")
    there[blob.sha256] = 0
    return answer == "right"


def place(ssh: Ssh, work: str, folder: str, blobs: Sequence[Blob]) -> None:
    """Replace `folder` on the device by links to `blobs` under their names. Raises as `Ssh.run` does."""
    pairs = [part for blob in blobs for part in (blob.sha256, blob.name)]
    ssh.run(_LINK, f"{work}/blobs", folder, *pairs)
