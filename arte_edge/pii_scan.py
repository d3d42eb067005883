"""Find personal data in files that will be published: names of people and hosts, addresses, paths, secrets.

An export checks that no file holds a path of this machine; a push scans every text that it would send.
A finding names the file and the key, and never shows a secret in full.
"""

from __future__ import annotations

import contextlib
import getpass
import ipaddress
import mmap
import os
import re
import socket
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Names that many machines share, or that are common words: they identify nobody.
_COMMON = re.compile(
    "root|user|admin|ubuntu|debian|pi|runner|nobody|guest|test|build|docker|localhost|localdomain|local|raspberrypi|"
    "jetson|home|work|model|main|default",
    re.IGNORECASE,
)
_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|"
    r"\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----|\bxox[abpr]-[\w-]{10,}|"
    r"\b[a-z]+://[^\s/:@]*:[^\s/@]+@"
)
# Folders of people's files and of a system's temporary ones; a path of a URL has a letter before its slash.
_PATH = re.compile(
    r"(?<![\w.:/~-])(?:/(?:home|Users|root|tmp|mnt|media|opt|srv|var|private|Volumes|data|workspace|work)/[\w.@~+/-]+"
    r"|~/[\w.@+/-]+|[A-Za-z]:[\\/]+Users[\\/]+[^\\/\s\"']+|file:///?\S+)"
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:.])")
_MAC = re.compile(r"(?<![\w:-])[0-9A-Fa-f]{2}(?:([:-])[0-9A-Fa-f]{2})(?:\1[0-9A-Fa-f]{2}){4}(?![\w:-])")
_MAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b")
_SHOWN = 60  # characters of what was found
_RARE = 6  # bytes of a text that does not occur in weights by chance


@dataclass(frozen=True)
class Finding:
    """One piece of personal data: its place, its kind and its text, which is cut if it is a secret."""

    file: str
    key: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.key}: {self.kind}: {self.text}"


@dataclass(frozen=True)
class Machine:
    """What identifies this machine and the person at it."""

    names: frozenset[str]  # of the person and of machines
    folders: tuple[str, ...]  # longest first
    secrets: frozenset[str] = frozenset()

    def private_paths(self, *more: Path) -> list[str]:
        """Return the texts that no published file may hold: `more`, and any path below `folders`.

        They are searched for in gigabytes of weights, where a short text such as "/tmp/" occurs by chance.
        """
        texts = {text for path in more for text in (str(path), os.path.realpath(path))}
        texts |= {f"{folder.rstrip(os.sep)}{os.sep}" for folder in self.folders}
        return sorted((text for text in texts if len(text) >= _RARE), key=len, reverse=True)

    def findings(
        self, text: str, file: str, key: str, *, allow: Collection[str] = (), names: bool = True, mail: bool = True
    ) -> Iterator[Finding]:
        """Yield the personal data in `text`.

        Args:
            allow: texts that are no finding.
            names: look for names and addresses too, not only for secrets and folders.
            mail: an e-mail address is a finding.
        """
        for kind, found in self._all(text, names, mail):
            if kind == "a secret":
                yield Finding(file, key, kind, f"{found[:6]}…")
            elif found not in allow:
                yield Finding(file, key, kind, found if len(found) <= _SHOWN else f"{found[:_SHOWN]}…")

    def _all(self, text: str, names: bool, mail: bool) -> Iterator[tuple[str, str]]:
        secrets = [s for s in self.secrets if s in text and not _SECRET.search(s)]
        yield from (("a secret", found) for found in [*_matches(_SECRET, text), *secrets])
        paths = _matches(_PATH, text) if names else []
        for folder in self.folders:  # longest first; a folder inside a path that was found is not repeated
            inside = any(path.startswith(folder) for path in paths)
            if not inside and re.search(rf"{re.escape(folder)}(?![\w.-])", text):
                paths.append(folder)
        yield from (("a path", path) for path in paths)
        if not names:
            return
        for name in sorted(self.names):
            if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text):
                yield "a name of this machine or its user", name
        numbers = filter(_is_address, [*_matches(_IPV4, text), *_matches(_IPV6, text)])
        yield from (("an address", found) for found in [*numbers, *_matches(_MAC, text)])
        yield from (("an e-mail address", found) for found in (_matches(_MAIL, text) if mail else ()))


def this_machine(more: Iterable[str] = (), secrets: Iterable[str] = ()) -> Machine:
    """Return what identifies this machine; `more`: hosts that it reaches over ssh, `secrets`: tokens in use."""
    names = {socket.gethostname(), socket.gethostname().partition(".")[0], *more}
    with contextlib.suppress(OSError, KeyError):  # a container may not know its own user
        names.add(getpass.getuser())
    names |= {os.environ.get(key, "") for key in ("USER", "LOGNAME", "USERNAME", "SUDO_USER", "HOSTNAME")}
    folders = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), Path(sys.prefix)}
    texts = {text for folder in folders for text in (str(folder), os.path.realpath(folder))}
    return Machine(
        frozenset(name for name in names if len(name) >= 3 and not _COMMON.fullmatch(name)),
        tuple(sorted((text for text in texts if len(text) > 3), key=len, reverse=True)),
        frozenset(secret for secret in secrets if len(secret) >= 8),
    )


def first_held(path: Path, texts: Sequence[str]) -> str:
    """Return the first of `texts` that a file holds anywhere in its bytes; empty if it holds none."""
    if not path.stat().st_size:
        return ""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return next((text for text in texts if data.find(text.encode()) >= 0), "")


def _is_address(text: str) -> bool:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return False
    if found.is_loopback or found.is_unspecified or found.is_multicast:
        return False
    # "::" joins names in code and "1::" is no host; a version has small numbers and begins with 0 or 1.
    return len(text) > 6 if found.version == 6 else not text.startswith("0.")


def _matches(pattern: re.Pattern[str], text: str) -> list[str]:
    """Return the different texts that `pattern` finds, in order."""
    return list(dict.fromkeys(match.group() for match in pattern.finditer(text)))
