"""The GBNF grammar of a rationale: some reasoning, then one answer of the task in its tags.

A small teacher invents labels ("heater") and forgets tags. Where the engine can hold
a grammar, the reasoning stays free and only the end is held to the format.
"""

from __future__ import annotations

from arte_edge.distill.prompts import ANSWER_CLOSE, ANSWER_OPEN
from arte_edge.tasks.task import BOOLEANS, Answer

__all__ = ["rationale_grammar"]


# Of a text in English a token is four characters or so; three leave room for the tags and a longer answer.
_CHARS_PER_TOKEN = 3
_MOST_CHARS = 1500  # llama.cpp refuses grammars with more repetitions than 2000


def rationale_grammar(answer: Answer, tokens: int) -> str:
    """Return the grammar for one rationale that must come to its answer within about `tokens` tokens."""
    most = max(_CHARS_PER_TOKEN * (tokens - 12), 16)
    reasoning = f"[^<]{{1,{min(most, _MOST_CHARS)}}}"
    return f'root ::= {reasoning} "{ANSWER_OPEN}" answer "{ANSWER_CLOSE}"\nanswer ::= {_answer(answer)}\n'


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
