"""Which part of a run one command makes: up to a stage, from a stage on, or a share of one stage's calls.

A queue of batch jobs gives each stage the machine that it needs: ``--until prefer`` on one with a teacher's memory,
then the same command without it, or with another ``--until``, elsewhere. `PartDone` ends such a command: nothing
failed, so it is no error. What a share is: `arte_edge.distill.shards`.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from arte_edge.cache import write_atomic
from arte_edge.distill.config import RunConfig
from arte_edge.errors import InputError

_MARK = ".from"  # the stage from which a command is making the folder again


class PartDone(Exception):
    """The part of a run that was wanted is done; the text says what it was and how to go on."""


@dataclass(frozen=True)
class Share:
    """Share `number` (from 1) of `of` equal ones."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """Read ``2/4``. Raises InputError: not two such numbers."""
        found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text.strip())
        share = cls(int(found[1]), int(found[2])) if found else cls(0, 0)
        if not 1 <= share.number <= share.of:
            raise InputError(
                f"--shard {text}: not a share of several",
                "Give its number, from 1, and how many there are: --shard 1/4 to --shard 4/4.",
            )
        return share

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def owns(self, group: int) -> bool:
        """Return whether group number `group` of a stage's calls, from 0, belongs to this share."""
        return group % self.of == self.number - 1


def stages_of(config: RunConfig) -> list[str]:
    """Return the folders of a run's stages, in order; `target` may be left out where nothing has to be found out."""
    names = ["check", "target"]
    if config.aligned:
        names += ["elicit", "calibrate", "prefer", "align"]
    elif config.data == "best-of-n":
        names += ["calibrate"]
    if config.rounds == 1:
        return [*names, "tailor", "tune", "evaluate"]
    for number in range(1, config.rounds + 1):
        again = "" if number == 1 else f"-{number}"
        names += [f"tailor{again}", f"tune-{number}", f"validate{again}"]
    return [*names, "evaluate"]


class Part:
    """The part that was wanted of a run: all of it unless `until`, `from_` or `share` say less."""

    def __init__(self, config: RunConfig, *, until: str = "", from_: str = "", share: Share | None = None) -> None:
        self._order = stages_of(config)
        for flag, name in (("--until", until), ("--from", from_)):
            if name and name not in self._order:
                raise InputError(f"{flag} {name}: this run has no such stage", f"Its stages: {', '.join(self._order)}.")
        if share and from_:
            raise InputError("--shard and --from exclude each other", "A shard makes calls of one stage.")
        if until and from_ and self._order.index(from_) > self._order.index(until):
            raise InputError(f"--from {from_} is a later stage than --until {until}", "Exchange them.")
        self.until, self.from_, self.share = until, from_, share

    @property
    def is_whole(self) -> bool:
        return not (self.until or self.from_ or self.share)

    def enter(self, stage: str, folder: Path) -> None:
        """Begin `stage` of the run in `folder`.

        Raises PartDone: it comes after the last wanted one.
        """
        if self.until and self._order.index(stage) > self._order.index(self.until):
            self.leave(folder)
            raise PartDone(f"Stopped after {self.until} (--until): the same command without it continues with {stage}.")
        mark = folder / _MARK
        if not self.from_ or self._order.index(stage) < self._order.index(self.from_):
            return
        # Killed and started again, the same command resumes: what it has made since stays.
        if not mark.is_file() or mark.read_text("utf-8") != self.from_:
            again = self._order[self._order.index(self.from_) :]
            if any(name.startswith("tune-") for name in again):
                again.append("tune")  # of several rounds the kept one's folder
            for name in again:
                shutil.rmtree(folder / name, ignore_errors=True)
            write_atomic(mark, self.from_.encode())
        self.from_ = ""

    def refuse_unfinished(self, stage: str) -> None:
        """Raise if `stage`, which is not done from the same inputs, has to be.

        Raises InputError: it comes before the stage from which the run is made again.
        """
        if self.from_:
            raise InputError(
                f"--from {self.from_}: the stage {stage} before it is not done from the same inputs",
                f"Run the same command without --from, or with --from {stage}.",
            )
        if self.share and stage == "check":
            raise InputError(
                f"--shard {self.share}: the check of this run is not done",
                "It decides what the shards do: run the same command with --until check in place of --shard.",
            )

    def leave(self, folder: Path) -> None:
        """End the command: all that was wanted is done."""
        (folder / _MARK).unlink(missing_ok=True)
