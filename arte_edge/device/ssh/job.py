"""A job on the device, seen from here: begun, followed through every lost connection, ended.

The other half is `arte_edge.device.ssh.agent`, which runs there from our wheel.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from arte_edge.device.ssh.connection import ConnectionLost, Patience, Ssh
from arte_edge.device.ssh.upload import put_text
from arte_edge.errors import ArteError

__all__ = ["JobFailed", "RemoteJob"]

_KEPT_WORDS = 4000  # of what a job says, for the message if it fails
# $1 interpreter, $2 our wheel, $3… words for the module
_JOB = (
    'py=$1; PYTHONPATH=$2; export PYTHONPATH; shift 2; cd / && exec "$py" -m arte_edge.device.ssh.agent "$@"'
)


class JobFailed(ArteError):
    """A command of the job ended with another code than 0."""

    def __init__(self, host: str, code: int, said: str) -> None:
        last = [line.strip() for line in said.splitlines() if line.strip()]
        shown = last[-1] if last else "no error output"
        cause = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        super().__init__(
            f"{host}: {shown} ({cause})",
            "Finished measurements are kept there; run the same command again to resume.",
        )
        self.code = code
        self.said = said


@dataclass
class RemoteJob:
    """One job's place on a device."""

    ssh: Ssh
    folder: str  # <work>/jobs/<name>
    python: str
    wheel: str
    patience: Patience

    def is_laid_out(self) -> bool:
        """True if an earlier try prepared this very job there."""
        return self.ssh.run('[ -e "$1/commands.json" ] && echo yes; exit 0', self.folder).strip() == "yes"

    def lay_out(self, commands: Sequence[Sequence[str]], *, keep_going: bool = False) -> None:
        """Write down what the job is to run; with `keep_going` the next command follows a failed one too."""
        order = {"commands": [list(words) for words in commands], "keep_going": keep_going}
        put_text(self.ssh, f"{self.folder}/commands.json", json.dumps(order))

    def run(self, on_line: Callable[[str], None], on_said: Callable[[str], None]) -> None:
        """Begin the job or go on with it, and follow it to its end.

        Args:
            on_line: gets every line of output, those of earlier tries included.
            on_said: gets what it says beside that, as it comes.

        Raises:
            ArteError: another job has the device; the device restarted or killed the job.
            JobFailed: a command failed.
            ConnectionLost: the device did not come back in time; the job continues there.
        """
        state = self.patience.keep_trying(lambda: self._tell("start"))
        if state["state"] == "busy":
            raise ArteError(
                f"{self.ssh.host} is busy with another benchmark; two at once would disturb each other",
                "Wait until it has finished and run the same command again.",
            )
        if state["state"] == "failed":
            raise ArteError(f"{self.ssh.host}: the job did not start", f"See {self.folder}/job.log there.")
        if why := state.get("why"):
            on_said(f"resuming after {'a reboot' if why == 'reboot' else 'the job was killed'}\n")
        at = [0, 0]
        said = ""

        def read() -> dict[str, Any]:
            nonlocal at, said
            words = ("follow", self.folder, str(at[0]), str(at[1]))
            with self.ssh.open(_JOB, self.python, self.wheel, *words) as channel:
                lines = io.BufferedReader(channel.got)  # type: ignore[type-var]
                for line in lines:
                    event = _event(line)
                    if event is None:
                        continue
                    for row in event.get("out", "").split("\n"):
                        if row:
                            on_line(row)
                    if text := event.get("err", ""):
                        said = (said + text)[-_KEPT_WORDS:]
                        on_said(text)
                    at = event.get("at", at)
                    self.patience.reached(self.folder, sum(at))
                    if "end" in event:
                        return dict(event["end"])
                channel.finish()
            raise ConnectionLost(self.ssh.host, "the stream ended early")

        end = self.patience.keep_trying(read)
        if end["state"] != "ended":
            raise ArteError(
                f"{self.ssh.host} restarted during the benchmark"
                if end.get("why") == "reboot"
                else f"{self.ssh.host}: the job was killed there, perhaps out of memory",
                "Finished measurements are kept there; run the same command again to resume.",
            )
        if (code := int(end.get("code", 1))) != 0:
            raise JobFailed(self.ssh.host, code, said)

    def stop(self) -> None:
        """End the job there, with all it started."""
        self._tell("stop")

    def remove(self) -> None:
        """Remove the job's folder."""
        if PurePosixPath(self.folder).parent.name == "jobs":
            self.ssh.run('rm -rf "$1"', self.folder)

    def _tell(self, verb: str) -> dict[str, Any]:
        for line in self.ssh.run(_JOB, self.python, self.wheel, verb, self.folder).splitlines():
            if (event := _event(line.encode())) is not None:
                return event
        raise ArteError(
            f"{self.ssh.host}: no answer from arte-edge's agent there",
            "`arte-edge devices check … --clean` resets it.",
        )


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
