"""Write task folders: a skeleton with explaining comments, or a labelled table.

`propose_techniques`: in the ARTE paper technique prompts are written by hand for each task. A teacher with the
description and a few seeds writes usable ones if its answer is prefilled and unusable ones are regenerated.
"""

from __future__ import annotations

import gc
import json
import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

import tomlkit
from tomlkit.items import Array

from arte_edge.errors import ArteError, InputError
from arte_edge.runtimes.completion import Engine, Request, Sampling
from arte_edge.runtimes.prompt_render import render
from arte_edge.tasks.folder import write_rows
from arte_edge.tasks.from_table import SPLIT, Split, prose, recur, task_from_table
from arte_edge.tasks.loaders import load_table, task_name
from arte_edge.tasks.normalize import fold_label
from arte_edge.tasks.tables import GUESSED, Columns, Table
from arte_edge.tasks.task import SPLITS, Answer, Example, Task


def write_skeleton(folder: Path, name: str, description: str = "") -> None:
    """Write a task folder to fill in; `arte-edge tasks check` lists what is missing.

    Raises InputError: `folder` exists and is not empty.
    """
    _write(folder, name, description, Answer(kind="text"), (), dict.fromkeys(SPLITS, ()))


def write_task(folder: Path, task: Task) -> dict[str, dict[str, int]]:
    """Write `task`, made from a labelled table, as a task folder with fixed splits.

    Returns:
        How many rows of each split have each answer, the most frequent first; empty unless answers recur.

    Raises InputError: `folder` exists and is not empty.
    """
    splits = {"seed": task.seed, "validation": task.validation, "test": task.test_loader()}
    _write(folder, task.name, task.description, task.answer, task.techniques, splits)
    counts = {split: Counter(row.target for row in rows) for split, rows in splits.items()}
    everywhere = sum(counts.values(), Counter[str]())
    if not recur(everywhere):
        return {}
    order = sorted(everywhere, key=lambda label: (-everywhere[label], label))
    return {label: {split: counts[split][label] for split in SPLITS} for label in order}


class NewTask(NamedTuple):
    """A task folder that was written, what it was read from, and the spread of its answers (`write_task`)."""

    task: Task
    table: Table
    spread: dict[str, dict[str, int]]


def new_task(
    folder: Path, ref: str, columns: Columns = GUESSED, split: Split = SPLIT, description: str = ""
) -> NewTask:
    """Write a task folder from the table `ref`: a labelled file, or ``hub:org/name``, with options as in `load_task`.

    Raises InputError: `folder` is not empty, or the table cannot be used.
    """
    check_empty(folder)
    collecting = gc.isenabled()
    gc.disable()  # it finds nothing in a million rows, and takes a fifth of the time
    try:
        table, told = load_table(ref, columns)
        split = Split(told.seed or split.seed, told.rows or split.rows)
        task = task_from_table(task_name(folder.resolve().name), table, split, description=description)
        return NewTask(task, table, write_task(folder, task))
    finally:
        if collecting:
            gc.enable()


def check_empty(folder: Path) -> None:
    """Raise `InputError` if `folder` exists and is not an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already", "Choose a new folder; nothing is overwritten.")


def _write(
    folder: Path,
    name: str,
    description: str,
    answer: Answer,
    techniques: Sequence[str],
    splits: dict[str, tuple[Example, ...]],
) -> None:
    check_empty(folder)
    document = tomlkit.parse((Path(__file__).parent / "prose" / "skeleton.toml").read_text(encoding="utf-8"))
    document["name"] = name
    if description:
        document["description"] = tomlkit.string(f"{description}\n", multiline=True)
    document["techniques"] = _array(techniques)
    table = tomlkit.table()
    table.update(answer.model_dump(exclude_defaults=True, exclude={"json_schema"}))
    document["answer"] = table
    folder.mkdir(parents=True, exist_ok=True)
    if answer.json_schema:
        table["schema"] = "answer.schema.json"
        schema = json.dumps(json.loads(answer.json_schema), ensure_ascii=False, indent=2)
        (folder / "answer.schema.json").write_text(f"{schema}\n", encoding="utf-8", newline="\n")
    (folder / "task.toml").write_text(tomlkit.dumps(document), encoding="utf-8", newline="\n")
    for split, rows in splits.items():
        write_rows(folder / f"{split}.jsonl", rows, as_json=answer.kind == "json")


def set_techniques(folder: Path, techniques: Sequence[str]) -> None:
    """Replace the technique prompts of the task in `folder`; comments and other keys are unchanged."""
    path = folder / "task.toml"
    document = tomlkit.parse(path.read_text(encoding="utf-8-sig"))
    document["techniques"] = _array(techniques)
    path.write_text(tomlkit.dumps(document), encoding="utf-8", newline="\n")


def _array(texts: Sequence[str]) -> Array:
    array = tomlkit.array()
    array.extend(texts)
    return array.multiline(bool(texts))


N_TECHNIQUES = 4
_MAX_CALLS = 8
_N_SEEDS = 3
_CHARACTERS = (30, 600)
_MAX_SIMILARITY = 0.8
_START = "<Technique_1>"
_TAGGED = re.compile(r"<Technique_(\d+)>(.*?)</Technique_\1>", re.DOTALL)
_BRIEF = "Use one to three short sentences."


def propose_techniques(engine: Engine, task_description: str, seeds: Sequence[Example]) -> tuple[str, ...]:
    """Return four different technique prompts that `engine` writes for a task.

    Up to eight calls, each with the next three seeds.

    Raises ArteError: the calls failed, or gave fewer than four usable prompts.
    """
    text = prose("propose")
    usable: list[str] = []
    failure = ""
    for call in range(_MAX_CALLS):
        shown = [seeds[(call * _N_SEEDS + i) % len(seeds)] for i in range(min(_N_SEEDS, len(seeds)))]
        examples = "\n\n".join(f"Input: {seed.input}\nAnswer: {seed.target}" for seed in shown)
        # Without a one-shot example, a small model solves the examples instead of writing instructions.
        messages = [
            {"role": "user", "content": text["prompt"].format(**text["example"])},
            {"role": "assistant", "content": _tagged(text["example"]["techniques"])},
            {"role": "user", "content": text["prompt"].format(description=task_description, examples=examples)},
        ]
        prompt = render(engine, messages, _START)
        # The first answer is greedy; the others must differ from it.
        sampling = Sampling(temperature=0.8 if call else 0.0, max_tokens=500, stop=("</Technique_4>",))
        completion = engine.complete([Request(prompt, sample=call)], sampling)[0]
        failure = completion.error or failure
        known = [*text["example"]["techniques"], *usable]
        usable += _usable(parse_techniques(completion.text), known, [seed.input for seed in shown])
        if len(usable) >= N_TECHNIQUES:
            return tuple(usable[:N_TECHNIQUES])
    reason = f" (last error: {failure})" if failure else ""
    raise ArteError(
        f"The teacher wrote {len(usable)} usable technique prompts, {N_TECHNIQUES} are needed{reason}",
        "Write them by hand under `techniques` in task.toml, or use a larger teacher.",
    )


def _tagged(techniques: Sequence[str]) -> str:
    lines = (f"<Technique_{n}>{text}</Technique_{n}>" for n, text in enumerate(techniques, start=1))
    return "\n".join(lines)


def parse_techniques(text: str) -> list[str]:
    """Return the tagged techniques in `text`, which may or may not repeat its prefilled tag."""
    started = text if text.lstrip().startswith(_START) else _START + text
    return [" ".join(body.split()) for _, body in _TAGGED.findall(started)]


def _usable(proposed: Sequence[str], earlier: Sequence[str], shown: Sequence[str]) -> list[str]:
    """Return proposals of fair length, without tags or examples, and not similar to others."""
    new: list[str] = []
    for text in proposed:
        fits = _CHARACTERS[0] <= len(text) <= _CHARACTERS[1] and "<" not in text and "..." not in text
        quotes = any(fold_label(example) in fold_label(text) for example in shown)
        if fits and not quotes and not any(_similar(text, other) for other in [*earlier, *new]):
            new.append(text)
    return [text if "sentence" in text.lower() else f"{text} {_BRIEF}" for text in new]


def _similar(one: str, other: str) -> bool:
    a, b = (fold_label(text.removesuffix(_BRIEF)) for text in (one, other))
    return SequenceMatcher(None, a, b, autojunk=False).ratio() > _MAX_SIMILARITY
