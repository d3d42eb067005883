"""Writes task folders: a skeleton, a labelled table, the shipped tasks' data, proposed techniques.

The comments that a person needs while filling a skeleton in are written into the file itself.

``python -m arte_edge.tasks.scaffold [NAME ...]`` writes the data of the shipped tasks; a test compares
the files in the repository with its output byte by byte. Their descriptions and technique prompts are
prose, written by hand in each ``task.toml``.

The ARTE paper writes technique prompts by hand for each task, which is its stated limit. A teacher that
sees the description and a few seeds writes usable ones, if the format is started for it and unusable
ones are discarded and generated again.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path

import tomlkit
from tomlkit.items import Array, String

from arte_edge import catalog
from arte_edge.errors import ArteError, InputError
from arte_edge.runtimes.completion import Engine, Request, Sampling
from arte_edge.runtimes.prompt_render import render
from arte_edge.tasks.folder import write_rows
from arte_edge.tasks.generators import boolean_expressions, date_understanding, home, object_counting
from arte_edge.tasks.normalize import fold_label
from arte_edge.tasks.task import SPLITS, Answer, Example, Task

__all__ = [
    "GENERATORS",
    "N_TECHNIQUES",
    "check_vacant",
    "parse_techniques",
    "propose_techniques",
    "set_techniques",
    "write_data",
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
    """Write a task folder to fill in; `arte-edge tasks check` says what is still to be done.

    Raises:
        InputError: `folder` exists and is not empty.
    """
    _write(folder, name, description, Answer(kind="text"), (), dict.fromkeys(SPLITS, ()))


def write_task(folder: Path, task: Task) -> None:
    """Write `task`, as made of a labelled table, as a task folder: its splits are then fixed files.

    Raises:
        InputError: `folder` exists and is not empty.
    """
    splits = {"seed": task.seed, "validation": task.validation, "test": task.load_test()}
    _write(folder, task.name, task.description, task.answer, task.techniques, splits)


def check_vacant(folder: Path) -> None:
    """Raise unless `folder` can be written without touching anything that is there.

    Raises:
        InputError: it exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already", "Name a new folder; nothing is ever overwritten.")


def _write(
    folder: Path,
    name: str,
    description: str,
    answer: Answer,
    techniques: Sequence[str],
    splits: dict[str, tuple[Example, ...]],
) -> None:
    check_vacant(folder)
    document = tomlkit.document()
    _comment(document, _ABOUT_SPLITS)
    document.add(tomlkit.nl())
    document["name"] = name
    document.add(tomlkit.nl())
    _comment(document, _ABOUT_DESCRIPTION)
    document["description"] = _text(description)
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
    """Replace the technique prompts of the task in `folder`; comments and other keys stay as they are."""
    path = folder / "task.toml"
    document = tomlkit.parse(path.read_text(encoding="utf-8"))
    document["techniques"] = _array(techniques)
    path.write_text(tomlkit.dumps(document), encoding="utf-8", newline="\n")


def _comment(document: tomlkit.TOMLDocument, text: str) -> None:
    for line in text.split("\n"):
        document.add(tomlkit.comment(line))


def _text(text: str) -> String:
    return tomlkit.string(f"{text}\n" if text else "", multiline=bool(text))


def _array(texts: Sequence[str]) -> Array:
    array = tomlkit.array()
    array.extend(texts)
    return array.multiline(bool(texts))


GENERATORS: dict[str, Callable[[], dict[str, list[Example]]]] = {
    "boolean_expressions": boolean_expressions.generate,
    "date_understanding": date_understanding.generate,
    "home_commands": home.generate_calls,
    "home_intents": home.generate_intents,
    "object_counting": object_counting.generate,
}


def write_data(name: str, folder: Path) -> None:
    """Write the three splits of the shipped task `name` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in GENERATORS[name]().items():
        write_rows(folder / f"{split}.jsonl", rows)


def main(names: list[str]) -> int:
    """Write the data of `names`, or of every shipped task."""
    if unknown := set(names) - set(GENERATORS):
        print(f"no generator for {', '.join(sorted(unknown))}; known: {', '.join(GENERATORS)}")
        return 2
    for name in names or GENERATORS:
        write_data(name, catalog.root("tasks") / name)
        print(name)
    return 0


N_TECHNIQUES = 4
_MAX_CALLS = 8
_N_SEEDS = 3
_CHARACTERS = (30, 600)
_TOO_ALIKE = 0.8
_START = "<Technique_1>"
_TAGGED = re.compile(r"<Technique_(\d+)>(.*?)</Technique_\1>", re.DOTALL)
_BRIEF = "Use one to three short sentences."
_ASK = """\
Here is a task and some of its examples.

Task: {description}

{examples}

Write four different instructions for a person who has to solve this task, one for each way of thinking: \
going step by step, recalling the rule, eliminating wrong answers, restating the input. \
Each is one or two sentences, fits this task and holds for every input. \
Do not solve or mention an example."""
# A small model that has not seen such an answer solves the examples instead of writing instructions.
_SHOWN_ASK = _ASK.format(
    description="Sort a list of words in alphabetical order. The answer is the sorted words.",
    examples="Input: plum, apple, pear\nAnswer: apple, pear, plum",
)
_SHOWN = (
    "Go through the alphabet from the first letter on and write down each word when its letter comes.",
    "Recall that words with the same first letter are ordered by the next one, then compare word by word.",
    "Cross out every word that cannot come next because another one comes before it, and repeat.",
    "Rewrite the list with the first two letters of each word in capitals, then order those letters.",
)


def propose_techniques(engine: Engine, task_description: str, seeds: Sequence[Example]) -> tuple[str, ...]:
    """Return four technique prompts that `engine` writes for a task, none of them like another.

    Asks up to eight times, each time with the next three seeds, and keeps what is usable.

    Raises:
        ArteError: the calls failed, or fewer than four usable prompts came of them.
    """
    kept: list[str] = []
    failure = ""
    for call in range(_MAX_CALLS):
        shown = [seeds[(call * _N_SEEDS + i) % len(seeds)] for i in range(min(_N_SEEDS, len(seeds)))]
        examples = "\n\n".join(f"Input: {seed.input}\nAnswer: {seed.target}" for seed in shown)
        ask = _ASK.format(description=task_description, examples=examples)
        messages = [
            {"role": "user", "content": _SHOWN_ASK},
            {"role": "assistant", "content": _tagged(_SHOWN)},
            {"role": "user", "content": ask},
        ]
        prompt = render(engine, messages, _START)
        # The first answer is the teacher's best; the others must differ from it.
        sampling = Sampling(temperature=0.8 if call else 0.0, max_tokens=500, stop=("</Technique_4>",))
        completion = engine.complete([Request(prompt, sample=call)], sampling)[0]
        failure = completion.error or failure
        kept += _new_ones(parse_techniques(completion.text), kept, [seed.input for seed in shown])
        if len(kept) >= N_TECHNIQUES:
            return tuple(kept[:N_TECHNIQUES])
    reason = f" (last error: {failure})" if failure else ""
    raise ArteError(
        f"The teacher wrote {len(kept)} usable technique prompts, {N_TECHNIQUES} are needed{reason}",
        "Write them by hand under `techniques` in task.toml, or ask a larger teacher.",
    )


def _tagged(techniques: Sequence[str]) -> str:
    lines = (f"<Technique_{n}>{text}</Technique_{n}>" for n, text in enumerate(techniques, start=1))
    return "\n".join(lines)


def parse_techniques(text: str) -> list[str]:
    """Return the tagged techniques in `text`, which may or may not repeat the tag it was started with."""
    started = text if text.lstrip().startswith(_START) else _START + text
    return [" ".join(body.split()) for _, body in _TAGGED.findall(started)]


def _new_ones(proposed: Sequence[str], kept: Sequence[str], shown: Sequence[str]) -> list[str]:
    """Return the proposals that are instructions: of fair length, without tags or examples, not repeated."""
    new: list[str] = []
    for text in proposed:
        fits = _CHARACTERS[0] <= len(text) <= _CHARACTERS[1] and "<" not in text and "..." not in text
        quotes = any(fold_label(example) in fold_label(text) for example in shown)
        if fits and not quotes and not any(_alike(text, other) for other in [*_SHOWN, *kept, *new]):
            new.append(text)
    return [text if "sentence" in text.lower() else f"{text} {_BRIEF}" for text in new]


def _alike(one: str, other: str) -> bool:
    a, b = (fold_label(text.removesuffix(_BRIEF)) for text in (one, other))
    return SequenceMatcher(None, a, b, autojunk=False).ratio() > _TOO_ALIKE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
