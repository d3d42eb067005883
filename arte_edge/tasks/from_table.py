"""Make a task from a labelled table: clean it, infer the answer kind, split it.

Answers stay as written: none is merged with another, and none typed. A few bad rows are dropped and listed in the
task's `notes`; many are an error, because then the columns or the answer kind are wrong.

A hash of its input and the split seed determines the split of a row: independent of the Python version and of
the order of the file. Splits are stratified where answers recur.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arte_edge.errors import InputError
from arte_edge.tasks import structured
from arte_edge.tasks.answers import canonical
from arte_edge.tasks.folder import check_target
from arte_edge.tasks.normalize import canonical_number, fold_label, fold_text
from arte_edge.tasks.tables import Record, Table, noted
from arte_edge.tasks.task import (
    ANSWER_TAG,
    BOOLEANS,
    SPLITS,
    Answer,
    Example,
    FewShotExample,
    Problem,
    Task,
    content_key,
    listed_letters,
    rows_sha256,
)

# Published data sets have a few broken rows, which must not turn a multiple-choice task into free text.
_ALMOST_ALL = 0.95
_MAX_LABELS = 12
_MIN_ROWS_A_LABEL = 5
_LONGEST_LABEL = 100  # characters
_LETTER = re.compile(r"\([A-Z]\)")
_BARE_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?")
_LOOKS_MISSING = {"nan", "none", "null", "na", "n/a"}


class Split(NamedTuple):
    """The seed of a split of a table, and how many rows it takes at most."""

    seed: int = 0
    rows: int | None = None


SPLIT = Split()


def infer_answer(records: Sequence[Record]) -> Answer:
    """Return the answer kind of `records`, one in which no two different answers count as the same.

    Letters like ``(A)`` that the inputs list are a choice of letters; True and False a boolean; bare numbers a number,
    unless two are equal (3.1 and 3.10) or one starts with zeros (007); at most 12 labels that occur five times on
    average a closed set, in alphabetical order; JSON objects are JSON of a schema made from them (`infer_schema`);
    anything else is text, compared as written (`Answer.exact`) if two
    answers differ only in what the usual comparison ignores, such as case.
    """
    counts = Counter(target for _, _, target in records)
    for label in filter(ANSWER_TAG.search, list(counts)):  # no answer; `clean` says so
        del counts[label]
    if not counts:
        return Answer(kind="text")
    if objects := _objects(counts):
        schema = structured.infer_schema([value for value, n in objects for _ in range(n)])
        return Answer(kind="json", json_schema=json.dumps(schema))
    # "(A)" beside "A" would become the same option.
    letters = Answer(kind="choice")
    if all(canonical(label, letters) in (None, label) for label in counts):
        named = ((text, target) for _, text, target in records if _LETTER.fullmatch(target))
        if sum(target in listed_letters(text) for text, target in named) >= _ALMOST_ALL * len(records):
            return letters
    if set(counts) <= set(BOOLEANS):
        return Answer(kind="boolean")
    if all(map(_BARE_NUMBER.fullmatch, counts)) and len(set(map(canonical_number, counts))) == len(counts):
        return Answer(kind="number")
    if 2 <= len(counts) <= _MAX_LABELS and recur(counts) and max(map(len, counts)) <= _LONGEST_LABEL:
        in_order = sorted(counts, key=lambda label: (fold_label(label), label))
        return Answer(kind="choice", choices=tuple(in_order))
    folded = set(map(fold_text, counts))
    return Answer(kind="text", exact=len(folded) < len(counts) or "" in folded)


def _objects(counts: Counter[str]) -> list[tuple[dict[str, Any], int]]:
    """Return the JSON objects among answers and how often each is there, none unless almost all are."""
    if sum(n for text, n in counts.items() if text[:1] == "{") < _ALMOST_ALL * counts.total():
        return []
    found = []
    for text, n in counts.items():
        with suppress(ValueError):
            found.append((structured.parse(text, "{}"), n))
    return found if sum(n for _, n in found) >= _ALMOST_ALL * counts.total() else []


# With fewer rows the validation split has less than the 20 that later stages need.
MIN_TABLE = 50


def split_sizes(n_rows: int) -> dict[str, int]:
    """Return rows per split: 28, 42 and 30 %, at most 40 seed and 100 validation; `InputError` under `MIN_TABLE`."""
    if n_rows < MIN_TABLE:
        what = f"{n_rows} usable rows cannot be split: at least {MIN_TABLE} are needed"
        raise InputError(what, "That is 14 for the teacher, 20 for validation and the rest for the test.")
    n_seed = min(40, n_rows * 28 // 100)
    n_validation = min(100, max(20, n_rows * 42 // 100))
    return {"seed": n_seed, "validation": n_validation, "test": n_rows - n_seed - n_validation}


def split_examples(
    examples: Sequence[Example], answer: Answer, split_seed: int, max_rows: int | None = None
) -> dict[str, tuple[Example, ...]]:
    """Split up to `max_rows` of the distinct `examples` by `split_seed`.

    Closed answers are spread in proportion, and each label is in every split if it has enough rows.
    """
    sizes = split_sizes(min(len(examples), max_rows or len(examples)))
    ordered = _by_hash(examples, f"{split_seed}")
    if answer.closed:
        ordered = _interleave(ordered, split_seed)
    splits: dict[str, list[Example]] = {}
    start = 0
    for split, size in sizes.items():
        splits[split] = ordered[start : start + size]
        start += size
    counts = Counter(example.target for example in examples)
    if answer.choices or (answer.kind == "text" and recur(counts)):
        _cover(splits, sorted(counts))
    # Order within a split by another hash: at the border of a split one answer has more of the lowest ranks,
    # and stages use the first n rows of a split.
    return {split: tuple(_by_hash(rows, f"{split_seed}:place")) for split, rows in splits.items()}


def _by_hash(examples: Sequence[Example], salt: str) -> list[Example]:
    """Return `examples` in the order of a hash of `salt` and their inputs."""
    sha256 = hashlib.sha256
    digests = b"".join([sha256(f"{salt}:{example.key}".encode()).digest() for example in examples])
    first_bytes = np.frombuffer(digests, dtype=">u8")[::4]  # 64 bits of each are enough for an order
    return [examples[i] for i in np.argsort(first_bytes, kind="stable").tolist()]


def _cover(splits: dict[str, list[Example]], labels: Sequence[str]) -> None:
    """Exchange rows, in place, until every label is in validation, then in the other splits if it has more rows."""
    counts = {split: Counter(row.target for row in rows) for split, rows in splits.items()}
    for needy in ("validation", "seed", "test"):
        for label in labels if len(labels) <= len(splits[needy]) else ():
            donor = max(SPLITS, key=lambda split: counts[split][label])
            plenty = counts[needy].most_common(1)[0][0]
            if counts[needy][label] or counts[donor][label] <= (needy != "validation"):
                continue
            for split, out, into in ((donor, label, plenty), (needy, plenty, label)):
                counts[split][out] -= 1
                counts[split][into] += 1
            take, give = (
                max(i for i, row in enumerate(splits[split]) if row.target == target)
                for split, target in ((donor, label), (needy, plenty))
            )
            splits[donor][take], splits[needy][give] = splits[needy][give], splits[donor][take]


def recur(counts: Counter[str]) -> bool:
    """Return whether answers with these counts are labels, each of which is in several rows."""
    return counts.total() >= _MIN_ROWS_A_LABEL * len(counts)


def _interleave(ordered: Sequence[Example], split_seed: int) -> list[Example]:
    """Spread each answer evenly over the sequence, so that any part has the proportions of the whole."""
    sizes = Counter(example.target for example in ordered)
    code = {target: number for number, target in enumerate(sorted(sizes))}
    first = [hashlib.sha256(f"{split_seed}:{target}".encode()).digest()[:4] for target in code]
    offset = np.array([int.from_bytes(digest, "big") / 2**32 for digest in first])
    size = np.array([sizes[target] for target in code])
    codes = np.fromiter((code[example.target] for example in ordered), np.int64, len(ordered))
    by_code = np.argsort(codes, kind="stable")
    index = np.empty_like(codes)  # of each row among those with its answer
    index[by_code] = np.arange(len(codes)) - np.repeat(np.cumsum(size) - size, size)
    return [ordered[i] for i in np.lexsort((codes, (index + offset[codes]) / size[codes])).tolist()]


_MAX_BAD_SHARE = 0.05


def prose(file: str) -> dict[str, Any]:
    """Return a shipped file of descriptions and technique prompts: ``bbh`` or ``generic``."""
    path = Path(__file__).parent / "prose" / f"{file}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def task_from_table(
    name: str,
    table: Table,
    split: Split = SPLIT,
    *,
    answer: Answer | None = None,
    description: str = "",
    techniques: tuple[str, ...] = (),
    worked: tuple[FewShotExample, ...] = (),
) -> Task:
    """Return a task made from `table`; missing parts are inferred, or general prompts.

    Few-shot examples that are in the validation or test split are left out, with a note.

    Raises InputError: too few rows, or more than one in twenty is unusable.
    """
    answer = answer or infer_answer(table.records)
    examples, notes = clean(table, answer)
    try:
        splits = split_examples(examples, answer, split.seed, split.rows)
    except InputError as error:
        raise InputError(f"{table.name}: {error.message}", f"{error.hint} {'; '.join(notes)}") from error
    test = splits["test"]
    test_inputs = frozenset(example.key for example in test)
    hidden = (test_inputs, {example.key for example in splits["validation"]})
    shown = tuple(one for one in worked if not any(content_key(one.input) in keys for keys in hidden))
    if len(shown) < len(worked):
        notes.append(f"left out {len(worked) - len(shown)} few-shot examples of the validation or test split")
    generic = prose("generic")
    kind = "label" if answer.choices else answer.kind
    return Task(
        name=name,
        description=description or generic[kind]["description"].format(choices=_listed(answer.choices)),
        answer=answer,
        techniques=techniques or tuple(generic[kind]["techniques"]),
        seed=splits["seed"],
        validation=splits["validation"],
        worked=shown,
        split_seed=split.seed,
        notes=tuple(notes),
        test_inputs=test_inputs,
        test_sha256=rows_sha256(test),
        test_loader=lambda: test,
    )


def _listed(choices: Sequence[str]) -> str:
    quoted = any(re.search(r"[,\n]|\.$", choice) for choice in choices)
    return ", ".join(json.dumps(choice, ensure_ascii=False) if quoted else choice for choice in choices)


def clean(table: Table, answer: Answer) -> tuple[list[Example], list[str]]:
    """Return the usable rows of `table`, each input once, and notes on what was dropped.

    An input with two different targets is dropped.

    Raises InputError: more than one row in twenty does not fit `answer`.
    """
    good: dict[str, Example] = {}
    conflicting: set[str] = set()
    repeated: list[int] = []
    bad = list(table.bad)
    fixed = not answer.letters  # whether a letter is an option depends on the input
    known: dict[str, str] = {}  # targets that were checked
    for line, text, target in table.records:
        form = known.get(target) or check_target(table.where(line), text, target, answer)
        if isinstance(form, Problem):
            bad.append(form)
            continue
        if fixed:
            known[target] = form
        example = Example(text, form)
        first = good.setdefault(example.key, example)
        if first.target != form:
            conflicting.add(example.key)
        elif first is not example:
            repeated.append(line)
    if len(bad) > _MAX_BAD_SHARE * (len(table.records) + len(table.bad)):
        message = f"{len(bad):,} of {table.n_rows:,} rows cannot be used; first: {bad[0]}"
        raise InputError(message, "Check which columns hold input and answer.")
    notes = [*table.notes, *(f"dropped {problem}" for problem in bad[:5])]
    notes += [f"dropped {len(bad) - 5:,} more that cannot be used"] if len(bad) > 5 else []
    notes += noted("dropped", repeated, table.by_line, "already seen ")
    if conflicting:
        shown = next(good[key].input for key in good if key in conflicting)
        notes.append(f"inputs with different answers dropped: {len(conflicting):,}, such as {shown!r:.60}")
    examples = [example for key, example in good.items() if key not in conflicting]
    labels = Counter(target for _, _, target in table.records)
    alike: dict[str, list[str]] = defaultdict(list)
    for label in sorted(labels) if answer.choices else ():
        alike[fold_label(label)].append(label)
    groups = [", ".join(map(repr, group)) for group in alike.values() if group[1:]]
    notes += [f"kept apart, though nearly the same: {group}" for group in groups]
    if answer.exact:
        notes.append("answers are compared as written, because some differ only in case, blanks or punctuation")
    none = [f"{label!r} ({labels[label]:,} rows)" for label in labels if label.casefold() in _LOOKS_MISSING]
    notes += [f"an answer like any other: {one}; empty its cells if it means none" for one in none]
    return examples, notes
