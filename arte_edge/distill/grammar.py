"""The GBNF grammar of a rationale: some reasoning, then one answer of the task in its tags.

A small teacher invents labels ("heater") and forgets tags. Where the engine can hold
a grammar, the reasoning stays free and only the end is held to the format.
"""

from __future__ import annotations

from arte_edge.distill.prompts import ANSWER_CLOSE, ANSWER_OPEN
from arte_edge.tasks.task import BOOLEANS, Answer

__all__ = ["rationale_grammar"]


def rationale_grammar(answer: Answer) -> str:
    """Return the grammar for one rationale of a task with this kind of answer."""
    return f'root ::= [^<]+ "{ANSWER_OPEN}" answer "{ANSWER_CLOSE}"\nanswer ::= {_answer(answer)}\n'


def _answer(answer: Answer) -> str:
    if answer.kind == "number":
        return '"-"? [0-9]+ ("." [0-9]+)?'
    if answer.kind == "text":
        return "[^<\\n]+"
    if answer.letters:
        return '"(" [A-Z] ")"'
    options = BOOLEANS if answer.kind == "boolean" else answer.choices
    return " | ".join(_quoted(option) for option in options)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
