"""What ssh's last words mean: gone for now, or a reason that trying again does not mend."""

from __future__ import annotations

import re

from arte_edge.errors import ArteError

__all__ = ["ConnectionLost", "RemoteError", "last_words", "say_failure"]

_SENSELESS = re.compile(r"^\s*$|^@+$|^(mux_client|Shared connection to|Connection to .* closed\.|Warning: )")
# "write error: No space left on device", "Disk quota exceeded", a limit on the size of a file
_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large", re.IGNORECASE)


def last_words(text: str, lines: int = 1) -> str:
    """Return the last `lines` lines that say something."""
    said = [line.strip() for line in text.splitlines() if not _SENSELESS.search(line)]
    return "\n".join(said[-lines:])


class ConnectionLost(ArteError):
    """The device cannot be reached now; it may be back in a moment."""

    def __init__(self, host: str, why: str) -> None:
        super().__init__(
            f"{host}: no connection ({why or 'ssh said nothing'})",
            "What is there already is kept: when the device answers again, the same command goes on.",
        )


class RemoteError(ArteError):
    """A command there ended badly."""

    def __init__(self, host: str, code: int, errors: str, hint: str = "") -> None:
        said = last_words(errors) or f"exit code {code}"
        self.code = code
        self.errors = errors
        self.is_full = _FULL.search(errors) is not None
        if self.is_full:
            super().__init__(
                f"{host}: the disk there is full",
                "Free some space there (`arte-edge devices check … --clean` removes our own folder); "
                "the same command goes on.",
            )
        else:
            super().__init__(f"{host}: {said}", hint)


def say_failure(host: str, errors: str) -> ArteError:
    """Return the error for ssh's exit code 255; `ConnectionLost` only where trying again may help."""
    by_hand = f"ssh {host}"
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in errors or "host key has just been changed" in errors:
        found = re.search(r"ssh-keygen .*-R .*", errors)
        forget = found.group().strip() if found else f"ssh-keygen -R {host.rpartition('@')[2]}"
        return ArteError(
            f"{host}: its host key is not the one that is known; somebody may be in between",
            f"If the device was set up anew: {forget} and then, by hand, once: {by_hand}",
        )
    if "Host key verification failed" in errors:
        return ArteError(
            f"{host}: its host key is not known here",
            f"Connect once by hand and compare the fingerprint: {by_hand}",
        )
    if "Permission denied" in errors or "Too many authentication failures" in errors:
        return ArteError(
            f"{host}: the login is refused; a password cannot be asked for here",
            f"Give it your key once: ssh-copy-id {host}; {by_hand} must work without a question.",
        )
    if "Could not resolve hostname" in errors:
        return ArteError(
            f"{host}: no machine of that name is known",
            f"Is the device on, in this network, and does `{by_hand}` work?",
        )
    if found := re.search(
        r"(?m)^.*(?:Bad (?:configuration|owner)|terminating, \d+ bad|Can't open user).*$", errors
    ):
        return ArteError(f"{host}: ssh's configuration is not usable: {found.group().strip()}")
    return ConnectionLost(host, last_words(errors))
