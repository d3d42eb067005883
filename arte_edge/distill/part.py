"""Which part of a run one command makes: up to a stage, from a stage on, or a share of one stage's calls.

A queue of batch jobs gives each stage the machine that it needs: ``--until prefer`` on one with a teacher's memory,
then the same command without it, or with another ``--until``, elsewhere. `PartDone` ends such a command: nothing
failed, so it is no error.

One stage's calls can be made by several processes without a scheduler between them: ``--shard 2/4`` is the second of
four. The calls of a stage travel in groups of fixed composition (`cached_calls`). Shard i of n makes every n-th group
and writes it to a file of its own in the run's folder, ``calls-i-of-n.jsonl``, so that each file has one writer. It
reads the others' files as they grow: where a later call of the stage depends on theirs it waits while they work, and
ends if they do not. What several processes make is a stage's calls, nothing else: the stage is finished, and models are
trained, by the next plain command, which takes the rows of the files into ``calls.jsonl``.

Groups, and so the texts, are those of one process: batches decide the last bits of a logit.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge.cache import write_atomic
from arte_edge.distill.config import RunConfig
from arte_edge.errors import InputError
from arte_edge.store import CallLog, Stage, read_groups

_MARK = ".from"  # the stage from which a command is making the folder again
_FILE = re.compile(r"calls-(\d+)-of-(\d+)\.jsonl")
_BRIEF_S = 10.0  # another process looks whether a lock is held, has rows to read before it works again, or starts
_PROBE_S = 1.0  # a lock that is held for longer is held by a worker, not by another that looks
_POLL_S = 0.3


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


class ShardStage(Stage):
    """A stage of which a shard makes calls alone; its files and its manifest are the plain command's."""

    def write(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        raise PartDone(
            f"All calls of {self.folder.name} that a shard can make are there: the same command without --shard "
            "finishes the stage."
        )


class ShardLog(CallLog):
    """The store of a shard: its own file is written, the run's and the other shards' are read.

    `failed` are the rows of calls that failed in another shard, or in this one since it began, by key: a shard takes
    them as they are, unless the server was gone. Who made them makes them again when it is started again.
    """

    def __init__(self, folder: Path, share: Share) -> None:
        self.failed: dict[str, dict[str, Any]] = {}
        self.share, self._folder, self._held = share, folder, ExitStack()
        self._held.enter_context(locked(_lock(folder, share.number, share.of), _BRIEF_S))
        super().__init__(folder / f"calls-{share.number}-of-{share.of}.jsonl")
        try:
            with locked(folder / ".lock", _BRIEF_S):  # no plain run works here; one that comes sees our lock
                pass
            self._work = self._held.enter_context(ExitStack())
            self._begin_work()
        except BaseException:
            self.close()
            raise
        paths = [folder / "calls.jsonl"]
        paths += [folder / f"calls-{i}-of-{share.of}.jsonl" for i in range(1, share.of + 1) if i != share.number]
        for path in set(folder.glob("calls-*-of-*.jsonl")) - {self.path, *paths}:  # of another number of shards
            for row in read_groups(path)[0]:
                self._remember(row)
        self.failed.clear()  # this shard's of an earlier time, and of shards that nobody runs: they are made again
        self._read = dict.fromkeys(paths, 0)  # bytes
        self.refresh()

    def close(self) -> None:
        super().close()
        self._held.close()

    def refresh(self) -> None:
        """Read what the other shards have written since the last time."""
        for path, start in self._read.items():
            if path.is_file():
                rows, self._read[path] = read_groups(path, start)
                for row in rows:
                    self._remember(row)

    def share_out(
        self,
        groups: Sequence[Sequence[int]],
        keys: Sequence[str],
        known: Callable[[int], bool],
        make: Callable[[list[int]], None],
        what: str,
    ) -> None:
        """Make the groups of this shard, and wait for the others while they work.

        Args:
            groups: places in `keys`, in the groups in which one process would make them.
            known: whether the call at a place is stored, or has failed.
            make: makes the calls at some places of one group, and stores them.
            what: the name of these calls.

        Raises PartDone: calls of shards that do not work are missing.
        """
        owner: dict[str, int] = {}  # the group that one process would make a call in, the first that has it
        for number, group in enumerate(groups):
            first = sorted({keys[i]: i for i in reversed(group) if keys[i] not in owner}.values())
            owner |= {keys[i]: number for i in first}
            todo = [i for i in first if not known(i)]
            if todo and self.share.owns(number):
                make(todo)
        quiet_since = None
        while True:
            self.refresh()
            lacking = {owner[keys[i]] % self.share.of + 1 for group in groups for i in group if not known(i)}
            if not lacking:
                self._begin_work()
                return
            self._work.close()  # who waits does not work: two that wait for each other both end
            working = any(self._works(i) for i in sorted(lacking))
            quiet_since = None if working else quiet_since or time.monotonic()
            if quiet_since and time.monotonic() - quiet_since > _BRIEF_S:
                others = ", ".join(f"{i}/{self.share.of}" for i in sorted(lacking))
                raise PartDone(
                    f"Shard {self.share} has made its share of '{what}'; that of {others} is missing: run those "
                    "shards, or the same command without --shard, which makes what is missing."
                )
            time.sleep(_POLL_S)

    def _remember(self, row: dict[str, Any]) -> None:
        if row.get("status") == "error" and row.get("fault") != "server":
            self.failed[row["key"]] = row
        super()._remember(row)

    def _begin_work(self) -> None:
        self._work.close()
        self._work.enter_context(locked(_lock(self._folder, self.share.number, self.share.of, "work"), _BRIEF_S))

    def _works(self, number: int) -> bool:
        return number != self.share.number and _held(_lock(self._folder, number, self.share.of, "work"))


def merge_shards(folder: Path, log: CallLog) -> int:
    """Take the finished calls of all shards into the run's own store, and remove their files; return how many.

    Raises InputError: a shard still works in the folder.
    """
    merged = 0
    for path in sorted(folder.glob("calls-*-of-*.jsonl")):
        if (found := _FILE.fullmatch(path.name)) is None:
            continue
        try:
            with locked(_lock(folder, int(found[1]), int(found[2]))):
                rows = [row for row in read_groups(path)[0] if row.get("status") != "error"]
                fresh = {row["key"]: row for row in rows if log.get(row["key"]) is None}
                log.append(list(fresh.values()))
                path.unlink()
                merged += len(fresh)
        except InputError as error:
            raise InputError(f"{folder}: shard {found[1]}/{found[2]} works in this folder", error.hint) from error
    return merged


@contextmanager
def locked(path: Path, timeout_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`. Raises InputError: another process does, for longer than `timeout_s` seconds."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout as error:
        raise InputError(
            f"{path.parent}: another process works in this folder", "Wait for it, or give this run another --name."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _lock(folder: Path, number: int, of: int, kind: str = "shard") -> Path:
    return folder / f".{kind}-{number}-of-{of}.lock"


def _held(path: Path) -> bool:
    try:
        with locked(path, _PROBE_S):
            return False
    except InputError:
        return True
