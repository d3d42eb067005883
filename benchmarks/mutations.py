"""Mutated inputs: every reader of users' files answers with a result or an `ArteError`, soon, and leaves no torn file.

A reader is given a folder of valid files of which one was mutated: bytes flipped, cut, doubled or inserted, or a value
of a JSON document replaced by one of another type. `faults` returns what went wrong: another exception, more than
`LIMIT_S` seconds, or an output that exists although the writer failed or that its own reader refuses.

Everything follows from the seed. A thousandth of this runs with the tests (``tests/test_mutations.py``)::

    PYTHONPATH=tests .venv/bin/python benchmarks/mutations.py --inputs 100000 --seed 0
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge.errors import ArteError

__all__ = ["LIMIT_S", "READERS", "Fault", "faults"]

LIMIT_S = 10
MEMORY_BYTES = 6 << 30
DATA = Path(__file__).resolve().parents[1] / "tests" / "data" / "version_1"


@dataclass(frozen=True)
class Reader:
    """One way into the product: `make` writes valid files to a folder, `read` uses them as a user's.

    Attributes:
        files: pattern of the files to mutate.
        out: what `read` writes, below the folder; `check` reads it and raises if it is not whole.
    """

    name: str
    make: Callable[[Path], Any]
    files: str
    read: Callable[[Path], Any]
    out: str = ""
    check: Callable[[Path], Any] | None = None


@dataclass(frozen=True)
class Fault:
    reader: str
    number: int
    file: str
    what: str


# Making the valid files


def _task(folder: Path) -> None:
    from arte_edge.tasks.loaders import load_task
    from arte_edge.tasks.scaffold import write_task

    write_task(folder / "task", load_task("home_intents"))
    for name in ("validation.jsonl", "test.jsonl"):
        lines = (folder / "task" / name).read_bytes().splitlines(keepends=True)
        (folder / "task" / name).write_bytes(b"".join(lines[:20]))


def _run(folder: Path) -> None:
    shutil.copytree(DATA / "run", folder / "run")
    shutil.copytree(DATA / "export", folder / "run" / "export")


def _export(folder: Path) -> None:
    shutil.copytree(DATA / "export", folder / "export")


def _gguf(folder: Path) -> None:
    import tiny

    path = tiny.write_gguf(folder / "m.gguf")
    # The header alone: mutated tensor data is other weights, which no reader can know.
    from arte_edge.gguf.reader import read_header

    (folder / "header_bytes").write_text(str(read_header(path).data_offset_bytes))


def _checkpoint(folder: Path) -> None:
    import tiny

    tiny.write_student(folder / "model")


# Using them


def _read_task(folder: Path) -> None:
    from arte_edge.tasks.loaders import load_task

    load_task(str(folder / "task"))


def _report(folder: Path) -> None:
    from arte_edge.publish.report.page import report

    report(folder / "run", out=folder / "report.html")


def _load_run(folder: Path) -> None:
    import arte_edge as ae
    from arte_edge.distill.run_context import open_folder
    from arte_edge.store import CallLog
    from arte_edge.tasks.loaders import load_task

    run = ae.load_run(folder / "run")
    CallLog(folder / "run" / "calls.jsonl").close()
    config = run.config
    open_folder(config, folder / "run", load_task("home_intents"), update=True)
    if run.finished:
        str(run.table)


def _export_documents(folder: Path) -> None:
    import arte_edge as ae
    from arte_edge.publish.card.card import card
    from arte_edge.results.merge import merge_into
    from arte_edge.results.student_json import read_bench, read_export

    export = folder / "export"
    merge_into(read_export(export), read_bench(export))
    ae.recommend(export, device="generic-x86")
    card(export, gguf_keys=False)


def _card_is_whole(folder: Path) -> None:
    from arte_edge.publish.card.front_matter import read_head, split_card

    read_head(split_card((folder / "export" / "README.md").read_text("utf-8")))


def _read_gguf(folder: Path) -> None:
    from arte_edge.device.model_size import ModelSize
    from arte_edge.gguf.reader import UINT32, Field, read_header, read_model_header
    from arte_edge.gguf.writer import rewrite
    from arte_edge.models.artifact import checksums_of

    path = folder / "m.gguf"
    header = read_header(path)
    for use in (lambda: header.metadata, lambda: header.chat_template, lambda: header.context_tokens):
        use()
    read_model_header(path)
    ModelSize.of(path)
    checksums_of(path)
    rewrite(path, {"arte_edge.bench.count": Field(UINT32, 1)})


def _gguf_is_whole(folder: Path) -> None:
    from arte_edge.gguf.reader import read_header

    for path in folder.glob("*.gguf"):
        read_header(path)


def _convert(folder: Path) -> None:
    from arte_edge.device.model_size import ModelSize
    from arte_edge.export.chat import read_chat
    from arte_edge.gguf.convert import convert

    ModelSize.of(folder / "model")
    read_chat(folder / "model")
    convert(folder / "model", folder / "out.gguf")


def _settings(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from arte_edge import catalog

        name = sorted(catalog.names(kind))[0]
        shutil.copyfile(catalog.find(kind, name), folder / "given.toml")

    return make


def _read_preset(folder: Path) -> None:
    from arte_edge.api import plan_run

    plan_run(folder / "given.toml")


def _read_recipe(folder: Path) -> None:
    from arte_edge.export.recipe import load_recipe

    load_recipe(str(folder / "given.toml"))


def _read_suite(folder: Path) -> None:
    from arte_edge.bench.settings import load_suite, make_settings

    make_settings("given.toml", load_suite(str(folder / "given.toml")))


def _read_profile(folder: Path) -> None:
    from arte_edge.device.profiles import find_device

    find_device(str(folder / "given.toml"))


READERS: tuple[Reader, ...] = (
    Reader("task", _task, "task/*", _read_task),
    Reader("report", _run, "run/**/*", _report, "report.html"),
    Reader("run", _run, "run/*", _load_run),
    Reader("export folder", _export, "export/*", _export_documents, "export/README.md", _card_is_whole),
    Reader("gguf", _gguf, "m.gguf", _read_gguf, "m.gguf", _gguf_is_whole),
    Reader("checkpoint", _checkpoint, "model/*.json", _convert, "out.gguf", _gguf_is_whole),
    Reader("weights", _checkpoint, "model/*.safetensors", _convert, "out.gguf", _gguf_is_whole),
    Reader("preset", _settings("presets"), "given.toml", _read_preset),
    Reader("recipe", _settings("export"), "given.toml", _read_recipe),
    Reader("suite", _settings("suites"), "given.toml", _read_suite),
    Reader("profile", _settings("devices"), "given.toml", _read_profile),
)

# Mutating

_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1 << 62, 1 << 80, 1.5, float("nan"), float("inf"), 1e308, "", "x", "\ud800", "\x00",
    "1", [], [None], [[]], [{}], {}, {"x": 1}, [1, "a", None], "é" * 300, ["x"] * 50,
)  # fmt: skip


def _json_mutated(data: bytes, dice: random.Random) -> bytes | None:
    """Return a JSON document, or one line of JSONL, with one value replaced, removed, doubled or nested."""
    lines = data.split(b"\n")
    whole = _parsed(data)
    at = None
    if whole is None:
        at = dice.randrange(len(lines))
        whole = _parsed(lines[at])
    if not isinstance(whole, dict | list):
        return None
    places = list(_places(whole))
    if not places:
        return None
    holder, key = dice.choice(places)
    kind = dice.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(dice.choice(_VALUES))[:9]] = holder[key]
    elif kind == 2:
        holder[key] = {"x": holder[key]} if dice.random() < 0.5 else [holder[key]]
    else:
        holder[key] = dice.choice(_VALUES)
    text = json.dumps(whole).encode("ascii")
    if at is None:
        return text
    lines[at] = text
    return b"\n".join(lines)


def _parsed(data: bytes) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(data)
    return None


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of the values of a document; of long lists the first few."""
    if depth > 6:
        return
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value[:12]))
    for key, inner in items:
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner, depth + 1)


def _toml_mutated(data: bytes, dice: random.Random) -> bytes | None:
    """Return a TOML file with the value of one line replaced."""
    lines = data.split(b"\n")
    places = [i for i, line in enumerate(lines) if b"=" in line and not line.lstrip().startswith(b"#")]
    if not places:
        return None
    at = dice.choice(places)
    values = (b"-1", b"0", b"1e999", b"nan", b'""', b'"x"', b"[]", b"{}", b"true", b"[[1]]", b"9" * 30, b"1979-05-27",
              b'["", 1]', b'"~nobody/x"', b'"a/../../b"', b"[" * 400 + b"]" * 400)  # fmt: skip
    lines[at] = lines[at].split(b"=")[0] + b"= " + dice.choice(values)
    return b"\n".join(lines)


def _bytes_mutated(data: bytes, dice: random.Random, end: int) -> bytes:
    """Return bytes flipped, cut, doubled, inserted, overwritten or zeroed before `end`."""
    at = dice.randrange(max(1, end))
    n = dice.choice((1, 1, 2, 4, 8, 30))
    kind = dice.randrange(7)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + n :]
    if kind == 2:
        return data[:at] + data[at : at + n] * 2 + data[at + n :]
    if kind == 3:
        return data[:at] + dice.randbytes(n) + data[at:]
    if kind == 4:
        return data[:at] + dice.choice((b"\xff", b"\x00", b"\xff\xff\xff\x7f", b"\x80")) + data[at + 1 :]
    if kind == 5:
        return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :] if data else b"\x00"
    return data[:at] + dice.randbytes(n) + data[at + n :]


def mutated(path: Path, data: bytes, dice: random.Random, end: int | None = None) -> bytes:
    """Return the content of `path` with one to three mutations."""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        found = None
        if path.suffix in (".json", ".jsonl") and dice.random() < 0.6:
            found = _json_mutated(data, dice)
        elif path.suffix == ".toml" and dice.random() < 0.6:
            found = _toml_mutated(data, dice)
        data = _bytes_mutated(data, dice, min(len(data), end or len(data))) if found is None else found
    return data


# Judging


class _TooSlow(BaseException):
    """Not an Exception: no handler of the product may catch it."""


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooSlow

    # Processor time, so that a busy machine is no fault; and much more time on the clock, for what waits.
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, LIMIT_S), (signal.ITIMER_REAL, signal.SIGALRM, 6 * LIMIT_S))
    before = [signal.signal(number, stop) for _, number, _ in timers]
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def _header_end(folder: Path, path: Path) -> int | None:
    """Return how many first bytes of a file of weights are its header."""
    if path.suffix == ".safetensors":
        return 8 + int.from_bytes(path.read_bytes()[:8], "little")
    note = folder / "header_bytes"
    return int(note.read_text()) if note.is_file() else None


def faults(reader: Reader, n_input: int, seed: int, work: Path) -> Iterator[Fault | None]:
    """Yield, for each of `n_input` mutated inputs, its fault or None."""
    pristine = work / "pristine"
    pristine.mkdir(parents=True)
    reader.make(pristine)
    shutil.copytree(pristine, work / "valid")
    if what := _judged(reader, work / "valid", refusable=False):
        raise AssertionError(f"{reader.name}: the valid files are refused: {what}")
    files = sorted(path for path in pristine.glob(reader.files) if path.is_file())
    for number in range(n_input):
        dice = random.Random(f"{seed}/{reader.name}/{number}")
        path = dice.choice(files)
        name = path.relative_to(pristine)
        content = mutated(path, path.read_bytes(), dice, _header_end(pristine, path))
        folder = work / "given"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pristine, folder)
        (folder / name).write_bytes(content)
        what = _judged(reader, folder)
        yield Fault(reader.name, number, str(name), what) if what else None


def _judged(reader: Reader, folder: Path, *, refusable: bool = True) -> str:
    """Return what is wrong with the answer to the files of a folder; empty if nothing is."""
    out = folder / reader.out
    before = out.read_bytes() if reader.out and out.is_file() else None
    try:
        with _limited():
            reader.read(folder)
    except ArteError as error:
        if not refusable:
            return str(error)
        if reader.out and (out.read_bytes() if out.is_file() else None) not in (None, before):
            return "wrote its output although it failed"
        return ""
    except _TooSlow:
        return f"took more than {LIMIT_S} s"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "arte_edge" in frame.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "outside"
        return f"{type(error).__name__} at {where} ({Path(place.filename).name}:{place.lineno}): {str(error)[:90]!r}"
    if reader.check is not None:
        try:
            reader.check(folder)
        except Exception as error:
            return f"its own reader refuses what it wrote: {type(error).__name__}: {str(error)[:90]!r}"
    return ""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="one reader")
    parser.add_argument("--show", type=int, default=60, help="kinds of faults to print")
    given = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    readers = [reader for reader in READERS if given.only in ("", reader.name)]
    kinds: Counter[str] = Counter()
    first: dict[str, Fault] = {}
    began, n_done = time.monotonic(), 0
    for reader in readers:
        n_reader, n_fault, started = given.inputs // len(readers), 0, time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            for fault in faults(reader, n_reader, given.seed, Path(work)):
                n_done += 1
                if fault is not None:
                    n_fault += 1
                    kind = f"{fault.reader}: {fault.what.split(': ')[0]}"
                    kinds[kind] += 1
                    first.setdefault(kind, fault)
        print(f"{reader.name}: {n_reader} inputs, {n_fault} faults, {time.monotonic() - started:.0f} s", flush=True)
    for kind, count in kinds.most_common(given.show):
        one = first[kind]
        print(f"{count:6} {kind}\n       first: input {one.number}, {one.file}: {one.what}")
    print(f"{n_done} inputs, {kinds.total()} faults of {len(kinds)} kinds, {time.monotonic() - began:.0f} s")
    return min(1, len(kinds))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
