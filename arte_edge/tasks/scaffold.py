"""Write task folders: a skeleton with explaining comments, or a labelled table.

`propose_techniques`: in the ARTE paper technique prompts are written by hand for each task. A teacher with the
description and a few seeds writes usable ones if its answer is prefilled and unusable ones are regenerated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

import tomlkit
from tomlkit.items import Array

from arte_edge.errors import ArteError, InputError
from arte_edge.runtimes.completion import Engine, Request, Sampling
from arte_edge.runtimes.prompt_render import render
from arte_edge.tasks.folder import write_rows
from arte_edge.tasks.normalize import fold_label
from arte_edge.tasks.task import SPLITS, Answer, Example, Task

__all__ = [
    "N_TECHNIQUES",
    "check_empty",
    "parse_techniques",
    "propose_techniques",
    "set_techniques",
    "write_skeleton",
    "write_task",
]

_ABOUT_DESCRIPTION = """\
Two or three sentences for the teacher and the student: what goes in, what comes out, the rules."""
_ABOUT_TECHNIQUES = """\
Four ways of thinking about an input, as instructions; ask for one to three short sentences.
A teacher can propose them: arte-edge tasks new DIR --teacher MODEL"""
_ABOUT_ANSWER = """\
kind: choice, boolean, number or text. A choice has fixed labels (choices = ["yes", "no"]),
or none if every input lists its options in lines like "(A) circle"."""
_ABOUT_SPLITS = """\
Beside this file: seed.jsonl (shown to the teacher; 40 is good), validation.jsonl (chooses questions and
rationales; at least 20, better 100) and test.jsonl (read by the final evaluation alone), one row a line:
{"input": "...", "target": "..."}
Then: arte-edge tasks check DIR"""


def write_skeleton(folder: Path, name: str, description: str = "") -> None:
    """Write a task folder to fill in; `arte-edge tasks check` lists what is missing.

    Raises:
        InputError: `folder` exists and is not empty.
    """
    _write(folder, name, description, Answer(kind="text"), (), dict.fromkeys(SPLITS, ()))


def write_task(folder: Path, task: Task) -> None:
    """Write `task`, made from a labelled table, as a task folder with fixed splits.

    Raises:
        InputError: `folder` exists and is not empty.
    """
    splits = {"seed": task.seed, "validation": task.validation, "test": task.load_test()}
    _write(folder, task.name, task.description, task.answer, task.techniques, splits)


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
    document = tomlkit.document()
    _comment(document, _ABOUT_SPLITS)
    document.add(tomlkit.nl())
    document["name"] = name
    document.add(tomlkit.nl())
    _comment(document, _ABOUT_DESCRIPTION)
    document["description"] = tomlkit.string(
        f"{description}\n" if description else "", multiline=bool(description)
    )
    document.add(tomlkit.nl())
    _comment(document, _ABOUT_TECHNIQUES)
    document["techniques"] = _array(techniques)
    document.add(tomlkit.nl())
    _comment(document, _ABOUT_ANSWER)
    table = tomlkit.table()
    table["kind"] = answer.kind
    if answer.choices:
        table["choices"] = list(answer.choices)
    document["answer"] = table
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.toml").write_text(tomlkit.dumps(document), encoding="utf-8", newline="\n")
    for split, rows in splits.items():
        write_rows(folder / f"{split}.jsonl", rows)


def set_techniques(folder: Path, techniques: Sequence[str]) -> None:
    """Replace the technique prompts of the task in `folder`; comments and other keys are unchanged."""
    path = folder / "task.toml"
    document = tomlkit.parse(path.read_text(encoding="utf-8"))
    document["techniques"] = _array(techniques)
    path.write_text(tomlkit.dumps(document), encoding="utf-8", newline="\n")


def _comment(document: tomlkit.TOMLDocument, text: str) -> None:
    for line in text.split("\n"):
        document.add(tomlkit.comment(line))


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
_PROMPT = """\
Here is a task and some of its examples.

Task: {description}

{examples}

Write four different instructions for a person who has to solve this task, one for each way of thinking: \
going step by step, recalling the rule, eliminating wrong answers, restating the input. \
Each is one or two sentences, fits this task and holds for every input. \
Do not solve or mention an example."""
# Without a one-shot example, a small model solves the examples instead of writing instructions.
_EXAMPLE_PROMPT = _PROMPT.format(
    description="Sort a list of words in alphabetical order. The answer is the sorted words.",
    examples="Input: plum, apple, pear\nAnswer: apple, pear, plum",
)
_EXAMPLE_TECHNIQUES = (
    "Go through the alphabet from the first letter on and write down each word when its letter comes.",
    "Recall that words with the same first letter are ordered by the next one, then compare word by word.",
    "Cross out every word that cannot come next because another one comes before it, and repeat.",
    "Rewrite the list with the first two letters of each word in capitals, then order those letters.",
)


def propose_techniques(engine: Engine, task_description: str, seeds: Sequence[Example]) -> tuple[str, ...]:
    """Return four different technique prompts that `engine` writes for a task.

    Up to eight calls, each with the next three seeds.

    Raises:
        ArteError: the calls failed, or gave fewer than four usable prompts.
    """
    usable: list[str] = []
    failure = ""
    for call in range(_MAX_CALLS):
        shown = [seeds[(call * _N_SEEDS + i) % len(seeds)] for i in range(min(_N_SEEDS, len(seeds)))]
        examples = "\n\n".join(f"Input: {seed.input}\nAnswer: {seed.target}" for seed in shown)
        question = _PROMPT.format(description=task_description, examples=examples)
        messages = [
            {"role": "user", "content": _EXAMPLE_PROMPT},
            {"role": "assistant", "content": _tagged(_EXAMPLE_TECHNIQUES)},
            {"role": "user", "content": question},
        ]
        prompt = render(engine, messages, _START)
        # The first answer is greedy; the others must differ from it.
        sampling = Sampling(temperature=0.8 if call else 0.0, max_tokens=500, stop=("</Technique_4>",))
        completion = engine.complete([Request(prompt, sample=call)], sampling)[0]
        failure = completion.error or failure
        usable += _usable(parse_techniques(completion.text), usable, [seed.input for seed in shown])
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
        if (
            fits
            and not quotes
            and not any(_similar(text, other) for other in [*_EXAMPLE_TECHNIQUES, *earlier, *new])
        ):
            new.append(text)
    return [text if "sentence" in text.lower() else f"{text} {_BRIEF}" for text in new]


def _similar(one: str, other: str) -> bool:
    a, b = (fold_label(text.removesuffix(_BRIEF)) for text in (one, other))
    return SequenceMatcher(None, a, b, autojunk=False).ratio() > _MAX_SIMILARITY
