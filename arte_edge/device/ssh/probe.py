"""What a device says of itself over ssh before anything is copied: system, Python, memory, free space, compilers.

One script, one round trip, nothing written there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from arte_edge.device.ssh.connection import Ssh

__all__ = ["OLDEST_PYTHON", "Python", "Survey", "survey"]

OLDEST_PYTHON = (3, 11)  # requires-python of pyproject.toml
_BUILD_TOOLS = (("cc", "gcc", "clang"), ("c++", "g++", "clang++"))
# What it says of itself, one JSON object; must run on every Python that a device may have.
_ASK_PYTHON = (
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
# $1 work folder or empty, $2 what to ask Python, $3 the preferred interpreter
_SCRIPT = r"""
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
echo "boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)"
echo "libc=$(getconf GNU_LIBC_VERSION 2>/dev/null)"
echo "darwin_memory=$(sysctl -n hw.memsize 2>/dev/null)"
for tool in cc gcc clang c++ g++ clang++; do
  command -v "$tool" >/dev/null 2>&1 && echo "tool=$tool"
done
for python in "$3" python3 python3.14 python3.13 python3.12 python3.11; do
  command -v "$python" >/dev/null 2>&1 || continue
  told=$("$python" -c "$2" 2>/dev/null) && { echo "python=$told"; break; }
  echo "python=$told"
done
grep -E '^Mem(Total|Available):' /proc/meminfo 2>/dev/null
d=$w
while [ ! -d "$d" ]; do d=$(dirname "$d"); done
df -Pk "$d" | tail -n 1 | sed 's/^/df=/'
exit 0
"""


@dataclass(frozen=True)
class Python:
    """An interpreter there."""

    path: str
    version: tuple[int, int, int]
    has_llama_cpp: bool
    bits: int


@dataclass(frozen=True)
class Survey:
    """One device as it stands."""

    work: str  # absolute path of the work folder there, made or not
    system: str
    machine: str
    boot_id: str
    glibc_minor: int
    pythons: tuple[Python, ...]  # in the order asked, up to the first that is new enough
    can_compile: bool
    memory_bytes: int  # 0: not told
    available_bytes: int  # 0: not told
    free_bytes: int  # on the disk of the work folder

    @property
    def python(self) -> Python | None:
        """The first interpreter that is new enough."""
        return next((python for python in self.pythons if python.version >= OLDEST_PYTHON), None)


def survey(ssh: Ssh, *, workdir: str = "", python: str = "python3") -> Survey:
    """Ask the device. Raises as `Ssh.run` does.

    Args:
        workdir: as in the device's profile; empty, absolute, ``~/x`` or relative to the home folder.
        python: the interpreter to ask first.
    """
    return parse(ssh.run(_SCRIPT, workdir, _ASK_PYTHON, python))


def parse(text: str) -> Survey:
    """Return what the script's output says; what is not told is empty or 0."""
    pairs = [line.partition("=")[::2] for line in text.splitlines() if "=" in line.split(" ", 1)[0]]
    one = dict(reversed(pairs))
    tools = {value for key, value in pairs if key == "tool"}
    memory = {key: int(value) * 1024 for key, value in re.findall(r"(?m)^(Mem\w+):\s+(\d+) kB", text)}
    libc = re.search(r"2\.(\d+)", one.get("libc", ""))
    found = [python for key, value in pairs if key == "python" and (python := _python(value))]
    return Survey(
        work=one.get("work", ""),
        system=one.get("system", ""),
        machine=one.get("machine", ""),
        boot_id=one.get("boot", ""),
        glibc_minor=int(libc.group(1)) if libc else 0,
        pythons=tuple(python for i, python in enumerate(found) if python not in found[:i]),
        can_compile=all(tools & set(names) for names in _BUILD_TOOLS),
        memory_bytes=memory.get("MemTotal", 0) or _number(one.get("darwin_memory", "")),
        available_bytes=memory.get("MemAvailable", 0),
        free_bytes=_free(one.get("df", "")),
    )


def _number(text: str) -> int:
    return int(text) if text.strip().isdigit() else 0


def _free(line: str) -> int:
    """Return the fourth column of a line of ``df -Pk``, in bytes; the device's name may hold blanks."""
    found = re.search(r"\s(\d+)\s+(-?\d+)\s+(-?\d+)\s+(?:\d+%|-)\s", line)
    return max(0, int(found.group(3))) * 1024 if found else 0


def _python(text: str) -> Python | None:
    try:
        told = json.loads(text)
        version = told["version"]
        return Python(
            path=str(told["path"]),
            version=(int(version[0]), int(version[1]), int(version[2])),
            has_llama_cpp=bool(told["llama_cpp"]),
            bits=32 if told["bits"] == "32bit" else 64,
        )
    except (ValueError, KeyError, TypeError, IndexError):
        return None
