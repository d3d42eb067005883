"""Reads a task folder: ``task.toml`` and the three splits, with every check on the way.

The checks stand here and not in a linter of their own, because a task that overlaps
with its own test split must never load at all.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arte_edge.tasks.problems import Problem, explain_validation, refuse
from arte_edge.tasks.rows import Row, check_target, read_rows
from arte_edge.tasks.task import SPLITS, Answer, Example, Task, WorkedExample, rows_sha256

__all__ = ["MIN_ROWS", "TaskFile", "check_sizes", "load_folder", "read_folder"]

# Three seeds fill one question prompt; IRT and preference scores say nothing below 20 questions.
MIN_ROWS = {"seed": 3, "validation": 20, "test": 1}
_WHAT_FOR = {
    "seed": "the teacher sees three at a time",
    "validation": "fewer cannot rank questions or rationales",
    "test": "the final evaluation reads it",
}


class TaskFile(BaseModel):
    """The keys of ``task.toml``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="lower case, digits, _ and -")
    description: str = Field(description="what the task is, as told to the teacher and the student")
    answer: Answer = Field(description="what answers look like")
    techniques: tuple[str, ...] = Field(description="reasoning-technique prompts, four by habit")
    worked: tuple[WorkedExample, ...] = Field(
        default=(), description="examples with reasoning, for a teacher that needs to be shown how"
    )


def load_folder(folder: Path, *, techniques_required: bool = True) -> Task:
    """Load the task in `folder`; a teacher that is to propose techniques takes it without them.

    Raises:
        InputError: the first thing that is wrong with it, with file and line.
    """
    task, problems = read_folder(folder, techniques_required=techniques_required)
    refuse(problems, str(folder))
    assert task is not None  # without problems there is a task
    return task


def read_folder(folder: Path, *, techniques_required: bool = True) -> tuple[Task | None, list[Problem]]:
    """Return the task in `folder` if it is sound, and everything that is wrong with it."""
    file, problems = _read_task_file(folder / "task.toml")
    if file is None:
        return None, problems
    if techniques_required:
        problems += _check_techniques(file.techniques)
    splits: dict[str, list[Row]] = {}
    for split in SPLITS:
        splits[split], bad = read_rows(folder / f"{split}.jsonl", file.answer)
        problems += bad
        if not bad:
            problems += check_sizes(split, len(splits[split]), f"{split}.jsonl")
    problems += _overlaps(splits)
    problems += _check_worked(file, splits)
    if problems:
        return None, problems
    examples = {split: tuple(row.example for row in rows) for split, rows in splits.items()}

    def read_test() -> tuple[Example, ...]:
        rows, bad = read_rows(folder / "test.jsonl", file.answer)
        refuse(bad, str(folder))
        return tuple(row.example for row in rows)

    task = Task(
        name=file.name,
        description=file.description.strip(),
        answer=file.answer,
        techniques=tuple(technique.strip() for technique in file.techniques),
        seed=examples["seed"],
        validation=examples["validation"],
        worked=file.worked,
        folder=folder,
        test_inputs=frozenset(example.key for example in examples["test"]),
        test_sha256=rows_sha256(examples["test"]),
        test_loader=read_test,
    )
    return task, []


def check_sizes(split: str, n_rows: int, where: str) -> list[Problem]:
    """Return a problem if a split is too small to be of use."""
    needed = MIN_ROWS[split]
    if n_rows >= needed:
        return []
    rows = "row" if n_rows == 1 else "rows"
    return [Problem(where, f"{n_rows} {rows}, at least {needed} are needed: {_WHAT_FOR[split]}")]


def _read_task_file(path: Path) -> tuple[TaskFile | None, list[Problem]]:
    if not path.is_file():
        hint = "A task folder holds task.toml and three splits; `arte-edge tasks new DIR` starts one."
        return None, [Problem(path.name, f"this file is missing in {path.parent}", hint)]
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        file = TaskFile.model_validate(values)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        return None, [Problem(path.name, f"not TOML ({error})")]
    except ValidationError as error:
        return None, list(explain_validation(error, TaskFile, path.name))
    problems = []
    if not file.description.strip():
        hint = "Two or three sentences: what goes in, what comes out, the rules."
        problems.append(Problem(f"{path.name}: description", "is empty", hint))
    return file, problems


def _check_techniques(techniques: tuple[str, ...]) -> list[Problem]:
    # Rationales are compared with each other, so one technique is as good as none.
    if len(techniques) >= 2 and all(technique.strip() for technique in techniques):
        return []
    hint = "Write four, or let a teacher propose them: `arte-edge tasks new DIR --teacher MODEL`."
    return [Problem("task.toml: techniques", "at least two prompts are needed, none of them empty", hint)]


def _check_worked(file: TaskFile, splits: dict[str, list[Row]]) -> list[Problem]:
    """Return what is wrong with the worked examples: no answer of the task, or a row to be kept unseen."""
    problems: list[Problem] = []
    hidden = {row.example.key: row.where for split in SPLITS[1:] for row in splits[split]}
    for number, worked in enumerate(file.worked, 1):
        where = f"task.toml: worked {number}"
        checked = check_target(where, worked.input, worked.target, file.answer)
        if isinstance(checked, Problem):
            problems.append(checked)
        if not worked.reasoning.strip():
            problems.append(Problem(where, "reasoning is empty", "One to three short sentences."))
        if row := hidden.get(Example(worked.input, worked.target).key):
            problems.append(
                Problem(where, f"the same input as {row}", "The teacher must not see it: take a seed.")
            )
    return problems


def _overlaps(splits: dict[str, list[Row]]) -> list[Problem]:
    """Return the rows whose input stands in an earlier split too, told by content and not by bytes."""
    problems: list[Problem] = []
    seen: dict[str, Row] = {}
    for rows in splits.values():
        for row in rows:
            if (first := seen.setdefault(row.example.key, row)) is not row:
                hint = "Splits must not overlap, or the figures lie: keep it in one of them."
                problems.append(Problem(row.where, f"the same input as {first.where}", hint))
    return problems
