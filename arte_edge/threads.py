"""How many threads a runtime uses: the caller's number, else ``ARTE_EDGE_THREADS``, else this process' cores."""

from __future__ import annotations

import os

from arte_edge.errors import InputError

_VARIABLE = "ARTE_EDGE_THREADS"


def thread_count(threads: int | None = None) -> int:
    """Return `threads` if given, else ``ARTE_EDGE_THREADS``, else the cores this process may use.

    Raises InputError: ``ARTE_EDGE_THREADS`` is not a positive number.
    """
    return threads or threads_from_environment() or available_cores()


def threads_from_environment() -> int | None:
    """Return ``ARTE_EDGE_THREADS``, None if it is not set. Raises InputError: it is not a positive number."""
    text = os.environ.get(_VARIABLE, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise InputError(f"{_VARIABLE}={text}: not a number of threads", "For example 4.")
    return int(text)


def environment_for(threads: int) -> dict[str, str]:
    """Return the variables that hold another process to so many threads, torch's too."""
    return dict.fromkeys((_VARIABLE, "OMP_NUM_THREADS"), str(threads))


def available_cores() -> int:
    """Return the cores this process may use; containers often grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
