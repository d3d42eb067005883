"""Make a task from a labelled table: clean it, infer the answer kind, split it.

A few bad rows are dropped and listed in the task's `notes`; many are an error, because then the columns or the
answer kind are wrong.

A hash of its input and the split seed determines the split of a row: independent of the Python version and of
the order of the file. Splits of closed answer sets are stratified.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arte_edge.errors import InputError
from arte_edge.tasks.folder import check_target
from arte_edge.tasks.normalize import canonical_number, fold_label
from arte_edge.tasks.task import SPLITS, Answer, Example, FewShotExample, Task, content_key, rows_sha256
from arte_edge.tasks.validation import Problem

__all__ = [
    "MIN_TABLE",
    "Record",
    "clean",
    "infer_answer",
    "prose",
    "split_examples",
    "split_sizes",
    "task_from_table",
]

# Published data sets have a few broken rows, which must not turn a multiple-choice task into free text.
_ALMOST_ALL = 0.95
_MAX_LABELS = 12
_MIN_ROWS_A_LABEL = 5
_LETTER = re.compile(r"\([A-Z]\)")


def infer_answer(targets: Sequence[str]) -> Answer:
    """Return the answer kind of `targets`.

    Letters like ``(A)`` are a choice of letters; True and False a boolean; numbers a number; at most 12 labels
    that occur five times on average a closed set, in alphabetical order; anything else is text.
    """
    if not targets:
        return Answer(kind="text")
    letters = sum(bool(_LETTER.fullmatch(target.strip())) for target in targets)
    if letters >= _ALMOST_ALL * len(targets):
        return Answer(kind="choice")
    labels = Counter(fold_label(target) for target in targets)
    if set(labels) <= {"true", "false"}:
        return Answer(kind="boolean")
    if all(canonical_number(target) is not None and target.strip()[-1].isdigit() for target in targets):
        return Answer(kind="number")
    if (
        2 <= len(labels) <= _MAX_LABELS
        and "" not in labels
        and len(targets) >= _MIN_ROWS_A_LABEL * len(labels)
    ):
        spelling = {fold_label(target): target.strip() for target in reversed(targets)}
        return Answer(kind="choice", choices=tuple(spelling[label] for label in sorted(labels)))
    return Answer(kind="text")


# With fewer rows the validation split has less than the 20 that later stages need.
MIN_TABLE = 50


def split_sizes(n_rows: int) -> dict[str, int]:
    """Return rows per split: 40 seed and up to 100 validation; smaller tables are split 28 : 42 : 30.

    Raises:
        InputError: fewer than `MIN_TABLE` rows.
    """
    if n_rows < MIN_TABLE:
        raise InputError(
            f"{n_rows} usable rows cannot be split: at least {MIN_TABLE} are needed",
            "That is 14 for the teacher, 20 for validation and the rest for the test.",
        )
    n_seed = min(40, n_rows * 28 // 100)
    n_validation = min(100, max(20, n_rows * 42 // 100))
    return {"seed": n_seed, "validation": n_validation, "test": n_rows - n_seed - n_validation}


def split_examples(
    examples: Sequence[Example], answer: Answer, split_seed: int, max_rows: int | None = None
) -> dict[str, tuple[Example, ...]]:
    """Split up to `max_rows` of the distinct `examples` by `split_seed`."""

    def rank(example: Example) -> str:
        return hashlib.sha256(f"{split_seed}:{example.key}".encode()).hexdigest()

    # Order within a split by another hash: at the border of a split one answer has more of the lowest ranks,
    # and stages use the first n rows of a split.
    def place(example: Example) -> str:
        return hashlib.sha256(f"{split_seed}:place:{example.key}".encode()).hexdigest()

    ordered = sorted(examples, key=rank)
    if answer.closed:
        ordered = _interleave(ordered, split_seed)
    ordered = ordered[:max_rows]
    splits: dict[str, tuple[Example, ...]] = {}
    start = 0
    for split, n_rows in split_sizes(len(ordered)).items():
        splits[split] = tuple(sorted(ordered[start : start + n_rows], key=place))
        start += n_rows
    return splits


def _interleave(ordered: Sequence[Example], split_seed: int) -> list[Example]:
    """Spread each answer evenly over the sequence, so that any part has the proportions of the whole."""
    by_target: dict[str, list[Example]] = defaultdict(list)
    for example in ordered:
        by_target[example.target].append(example)
    placed: list[tuple[float, str, Example]] = []
    for target, group in by_target.items():
        digest = hashlib.sha256(f"{split_seed}:{target}".encode()).digest()
        offset = int.from_bytes(digest[:4], "big") / 2**32
        placed += [((index + offset) / len(group), target, example) for index, example in enumerate(group)]
    return [example for _, _, example in sorted(placed, key=lambda item: item[:2])]


_MAX_BAD_SHARE = 0.05


@dataclass(frozen=True)
class Record:
    """An input and its target, read from `where`, not checked yet."""

    where: str
    input: str
    target: str


def prose(file: str) -> dict[str, dict[str, object]]:
    """Return a shipped file of descriptions and technique prompts: ``bbh`` or ``generic``."""
    path = Path(__file__).parent / "prose" / f"{file}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def task_from_table(
    name: str,
    records: Sequence[Record],
    *,
    split_seed: int = 0,
    max_rows: int | None = None,
    answer: Answer | None = None,
    description: str = "",
    techniques: tuple[str, ...] = (),
    worked: tuple[FewShotExample, ...] = (),
) -> Task:
    """Return a task made from `records`; missing parts are inferred, or general prompts.

    Few-shot examples that are in the validation or test split are left out, with a note.

    Raises:
        InputError: too few rows, or more than one in twenty does not fit the answer kind.
    """
    answer = answer or infer_answer([record.target for record in records])
    examples, notes = clean(records, answer)
    splits = split_examples(examples, answer, split_seed, max_rows)
    test = splits["test"]
    hidden = {example.key for split in SPLITS[1:] for example in splits[split]}
    shown = tuple(example for example in worked if content_key(example.input) not in hidden)
    if len(shown) < len(worked):
        notes.append(f"left out {len(worked) - len(shown)} few-shot examples of the validation or test split")
    generic = prose("generic")
    kind = "label" if answer.choices else answer.kind
    return Task(
        name=name,
        description=description
        or str(generic[kind]["description"]).format(choices=", ".join(answer.choices)),
        answer=answer,
        techniques=techniques or _strings(generic[kind]["techniques"]),
        seed=splits["seed"],
        validation=splits["validation"],
        worked=shown,
        split_seed=split_seed,
        notes=tuple(notes),
        test_inputs=frozenset(example.key for example in test),
        test_sha256=rows_sha256(test),
        test_loader=lambda: test,
    )


def _strings(value: object) -> tuple[str, ...]:
    return tuple(str(item) for item in value) if isinstance(value, list) else ()


def clean(records: Sequence[Record], answer: Answer) -> tuple[list[Example], list[str]]:
    """Return the usable rows of `records`, each input once, and notes on what was dropped.

    An input with two different targets is dropped.
    """
    good: dict[str, Example] = {}
    ambiguous: set[str] = set()
    n_repeated = 0
    bad: list[Problem] = []
    for record in records:
        checked = check_target(record.where, record.input, record.target, answer)
        if isinstance(checked, Problem):
            bad.append(checked)
            continue
        key = content_key(record.input)
        if key in good:
            n_repeated += 1
            if good[key].target != checked:
                ambiguous.add(key)
        else:
            good[key] = Example(record.input, checked)
    if len(bad) > _MAX_BAD_SHARE * len(records):
        message = (
            f"{len(bad)} of {len(records)} rows do not fit the answer kind '{answer.kind}'; first: {bad[0]}"
        )
        raise InputError(message, "Check which columns contain input and target.")
    notes = [f"dropped {problem}" for problem in bad]
    if n_repeated:
        notes.append(f"dropped {n_repeated} repeated rows")
    if ambiguous:
        notes.append(f"dropped {len(ambiguous)} inputs with two different targets")
    return [example for key, example in good.items() if key not in ambiguous], notes
