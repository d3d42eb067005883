"""Lets the teacher propose a task's technique prompts.

The ARTE paper writes them by hand for each task, which is its stated limit. A teacher
that sees the description and a few seeds writes usable ones, if the format is started
for it and unusable ones are thrown away and asked for again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from arte_edge.engines.base import Engine, Request, Sampling
from arte_edge.engines.render import render
from arte_edge.errors import ArteError
from arte_edge.tasks.normal import fold_label
from arte_edge.tasks.task import Example

__all__ = ["N_TECHNIQUES", "parse_techniques", "propose_techniques"]

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
