"""Makes a task of a labelled table: clean it, infer the answer kind, split it.

Tables come from the world, so a few bad rows are dropped and the task's `notes` say
which and why; many bad rows are an error, because then the columns or the answer kind
are wrong and not the rows.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arte_edge.errors import InputError
from arte_edge.tasks.infer import infer_answer
from arte_edge.tasks.problems import Problem
from arte_edge.tasks.rows import check_target
from arte_edge.tasks.split import split_examples
from arte_edge.tasks.task import SPLITS, Answer, Example, Task, WorkedExample, content_key, rows_sha256

__all__ = ["Record", "clean", "prose", "task_from_table"]

_MAX_BAD_SHARE = 0.05


@dataclass(frozen=True)
class Record:
    """An input and its target as found at `where`, not yet checked."""

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
    worked: tuple[WorkedExample, ...] = (),
) -> Task:
    """Return a task of `records`; what is not given is inferred or filled with general prompts.

    A worked example that stands in a split to be kept unseen is left out, with a note.

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
        notes.append(f"left out {len(worked) - len(shown)} worked examples that stand in a hidden split")
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

    An input that occurs with two different targets is dropped altogether: nobody can say which is right.
    """
    good: dict[str, Example] = {}
    disputed: set[str] = set()
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
                disputed.add(key)
        else:
            good[key] = Example(record.input, checked)
    if len(bad) > _MAX_BAD_SHARE * len(records):
        message = (
            f"{len(bad)} of {len(records)} rows do not fit the answer kind '{answer.kind}'; first: {bad[0]}"
        )
        raise InputError(message, "Check which columns hold input and target.")
    notes = [f"dropped {problem}" for problem in bad]
    if n_repeated:
        notes.append(f"dropped {n_repeated} repeated rows")
    if disputed:
        notes.append(f"dropped {len(disputed)} inputs that occur with two different targets")
    return [example for key, example in good.items() if key not in disputed], notes
