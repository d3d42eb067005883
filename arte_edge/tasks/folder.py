"""Read and write a task folder: ``task.toml`` and three splits of ``{"input", "target"}`` rows.

All checks are part of loading, because a task that overlaps with its own test split must never load.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from json.encoder import encode_basestring as _quoted
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arte_edge.errors import InputError, nearest
from arte_edge.files import problems as key_problems
from arte_edge.files import read_toml
from arte_edge.tasks import structured
from arte_edge.tasks.answers import canonical
from arte_edge.tasks.tables import json_rows, text_problem
from arte_edge.tasks.task import (
    ANSWER_TAG,
    SPLITS,
    Answer,
    Example,
    FewShotExample,
    Problem,
    Task,
    raise_first,
    rows_sha256,
)

_COLUMNS = ("input", "target")


class _Row(NamedTuple):
    where: str  # ``file:line``
    example: Example


def _read_rows(path: Path, answer: Answer) -> tuple[list[_Row], list[Problem]]:
    """Read a split: its valid rows with canonical targets, and the problems of the others."""
    rows: list[_Row] = []
    if problem := text_problem(path):
        return [], [problem]
    problems: list[Problem] = []
    for number, value in json_rows(path):
        where = f"{path.name}:{number}"
        example = value if isinstance(value, Problem) else _check_row(where, value, answer)
        if isinstance(example, Problem):
            problems.append(example)
        else:
            rows.append(_Row(where, example))
    return rows, problems


def _check_row(where: str, value: dict[str, object], answer: Answer) -> Example | Problem:
    for key in _COLUMNS:
        if key not in value:
            return Problem(where, f"no '{key}'", f"It has: {', '.join(value) or 'nothing'}.")
        if key == "target" and answer.kind == "json" and isinstance(value[key], dict):
            value = {**value, key: json.dumps(value[key], ensure_ascii=False)}
        if not isinstance(value[key], str) or not str(value[key]).strip():
            return Problem(where, f"'{key}' must be a string that is not empty")
    for key in value:
        if key not in _COLUMNS:
            return Problem(where, f"unknown key '{key}'", nearest(key, _COLUMNS))
    text, target = str(value["input"]), str(value["target"])
    checked = check_target(where, text, target, answer)
    return checked if isinstance(checked, Problem) else Example(text, checked)


def check_target(where: str, text: str, target: str, answer: Answer) -> str | Problem:
    """Return `target` as written, of closed kinds as an option, of JSON as the student is to write it.

    Or why it is not an answer to the input `text`.
    """
    if ANSWER_TAG.search(target):
        return Problem(where, f"target {target!r} holds <ans> or </ans>, the marks around an answer")
    if answer.kind == "json":
        try:
            return structured.compact(structured.parse(target, answer.json_schema), answer.json_schema)
        except ValueError as error:
            hint = "Correct the target, or the schema beside task.toml."
            return Problem(where, f"target {target!r:.80} does not fit the schema: {error}", hint)
    form = canonical(target, answer)
    if form is None:
        hint = nearest(target, answer.choices) or "Correct the target, or the answer kind in task.toml."
        return Problem(where, f"target {target!r} is not {_expected(answer)}", hint)
    if answer.letters:
        options = answer.options(text)
        if not options:
            return Problem(where, "the input lists no options", 'List them in lines like "(A) circle".')
        if form not in options:
            return Problem(where, f"target {form} is not among the options {options[0]} to {options[-1]}")
    return form if answer.closed else target.strip()


def _expected(answer: Answer) -> str:
    if answer.choices:
        return f"one of {', '.join(answer.choices)}"
    names = {"choice": "the letter of an option", "boolean": "True or False", "number": "one number"}
    return names.get(answer.kind, "a text with a letter or digit")


def write_rows(path: Path, rows: Iterable[Example], *, as_json: bool = False) -> None:
    """Write a split, its targets as texts or, if they are JSON, `as_json`; the bytes are the same on every system."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        pairs = ((_quoted(row.input), row.target if as_json else _quoted(row.target)) for row in rows)
        lines = (f'{{"input": {text}, "target": {target}}}\n' for text, target in pairs)
        while block := "".join(islice(lines, 10_000)):
            file.write(block)


# Three seeds fill one question prompt; IRT and preference scores mean nothing below 20 questions.
MIN_ROWS = {"seed": 3, "validation": 20, "test": 1}
_PURPOSE = {
    "seed": "the teacher sees three at a time",
    "validation": "fewer cannot rank questions or rationales",
    "test": "the final evaluation reads it",
}


class TaskFile(BaseModel):
    """The keys of ``task.toml``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="lower case, digits, _ and -")
    description: str = Field(description="what the task is; part of the prompts for teacher and student")
    answer: Answer = Field(description="form of the answers")
    techniques: tuple[str, ...] = Field(description="reasoning-technique prompts, usually four")
    worked: tuple[FewShotExample, ...] = Field(
        default=(), description="few-shot examples with reasoning, for the teacher"
    )


def load_folder(folder: Path, *, techniques_required: bool = True) -> Task:
    """Load the task in `folder`; it may lack techniques if a teacher is going to propose them.

    Raises InputError: its first problem, with file and line.
    """
    task, problems = read_folder(folder, techniques_required=techniques_required)
    raise_first(problems, str(folder))
    assert task is not None  # without problems there is a task
    return task


def read_folder(folder: Path, *, techniques_required: bool = True) -> tuple[Task | None, list[Problem]]:
    """Return the task in `folder` if it is valid, and all its problems."""
    file, problems = _read_task_file(folder / "task.toml")
    if file is None:
        return None, problems
    if techniques_required:
        problems += _check_techniques(file.techniques)
    splits: dict[str, list[_Row]] = {}
    for split in SPLITS:
        splits[split], bad = _read_rows(folder / f"{split}.jsonl", file.answer)
        problems += bad
        if not bad:
            problems += _check_sizes(split, len(splits[split]), f"{split}.jsonl")
    problems += _overlaps(splits)
    problems += _check_few_shot(file, splits)
    if problems:
        return None, problems
    examples = {split: tuple(row.example for row in rows) for split, rows in splits.items()}

    def read_test() -> tuple[Example, ...]:
        rows, bad = _read_rows(folder / "test.jsonl", file.answer)
        raise_first(bad, str(folder))
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


def _check_sizes(split: str, n_rows: int, where: str) -> list[Problem]:
    """Return a problem if a split is too small."""
    needed = MIN_ROWS[split]
    if n_rows >= needed:
        return []
    rows = "row" if n_rows == 1 else "rows"
    return [Problem(where, f"{n_rows} {rows}, at least {needed} are needed: {_PURPOSE[split]}")]


def _read_task_file(path: Path) -> tuple[TaskFile | None, list[Problem]]:
    if not path.is_file():
        hint = "A task folder contains task.toml and three splits; `arte-edge tasks new DIR` creates one."
        return None, [Problem(path.name, f"this file is missing in {path.parent}", hint)]
    if problem := text_problem(path):
        return None, [problem]
    try:
        document = read_toml(path)
        if problem := _read_schema(path.parent, document.get("answer")):
            return None, [problem]
        file = TaskFile.model_validate(document)
    except InputError as error:
        return None, [Problem(path.name, error.message.removeprefix(f"{path}: "))]
    except ValidationError as error:
        return None, [Problem(path.name, *found) for found in key_problems(error, TaskFile)]
    problems = []
    if not file.description.strip():
        hint = "Two or three sentences: what goes in, what comes out, the rules."
        problems.append(Problem(f"{path.name}: description", "is empty", hint))
    return file, problems


def _read_schema(folder: Path, answer: Any) -> Problem | None:
    """Put the schema that `answer` names in its place; return what is wrong with its file."""
    named = [key for key in ("schema", "tools") if isinstance(answer, dict) and key in answer]
    if not named:
        return None
    name = answer.pop(named[0])
    where = f"task.toml: answer.{named[0]}"
    if named[1:]:
        return Problem(where, "and tools exclude each other")
    if not isinstance(name, str) or not name or Path(name).name != name:
        return Problem(where, f"{name!r:.60} is not the name of a JSON file beside task.toml")
    if problem := text_problem(folder / name):
        return problem
    try:
        schema = json.loads((folder / name).read_text(encoding="utf-8-sig"))
        answer["json_schema"] = structured.schema_text(
            structured.tools_schema(schema) if named == ["tools"] else schema
        )
    except (ValueError, RecursionError) as error:
        return Problem(name, str(error), "docs/tasks.md shows one.")
    return None


def _check_techniques(techniques: tuple[str, ...]) -> list[Problem]:
    # Rationales are compared with each other, so at least two are necessary.
    if len(techniques) >= 2 and all(technique.strip() for technique in techniques):
        return []
    hint = "Write four, or let a teacher propose them: `arte-edge tasks new DIR --teacher MODEL`."
    return [Problem("task.toml: techniques", "at least two prompts are needed, none of them empty", hint)]


def _check_few_shot(file: TaskFile, splits: dict[str, list[_Row]]) -> list[Problem]:
    """Return the problems of few-shot examples: not an answer of the task, or in a split that must stay unseen."""
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
                Problem(where, f"the same input as {row}", "The teacher must not see it: use a seed example.")
            )
    return problems


def _overlaps(splits: dict[str, list[_Row]]) -> list[Problem]:
    """Return the rows whose input was there before, in the same split or another, compared by `content_key`."""
    problems: list[Problem] = []
    seen: dict[str, _Row] = {}
    for rows in splits.values():
        for row in rows:
            if (first := seen.setdefault(row.example.key, row)) is not row:
                hint = "Keep it once: splits that overlap give wrong results."
                problems.append(Problem(row.where, f"the same input as {first.where}", hint))
    return problems
