"""Grammars that permit the answers of a task and nothing else: GBNF for llama.cpp, JSON schema for servers.

Where the answer comes in tags the reasoning is free, and may hold ``<``: only the tags themselves are kept out of it,
so that a text has one answer and ends with it. A grammar that a runtime cannot parse is as good as none, so what is
written keeps to GBNF's literals, character classes and repetitions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from arte_edge.asking.form import ANSWER_CLOSE, ANSWER_OPEN, Form
from arte_edge.tasks.task import BOOLEANS, Answer

__all__ = ["gbnf", "json_schema"]

_LETTERS = tuple(f"({chr(code)})" for code in range(ord("A"), ord("Z") + 1))
_ESCAPED = re.compile(r'["\\\x00-\x1f\x7f\u0085\u2028\u2029]')
# One character of a text without tags, or all of what begins like a tag and is none ("<a", "</x", "<<answer>").
_CHAR = r"""char ::= [^<] | lt
lt ::= "<" (lt | "/" (lt | tag | [^<aA]) | tag | [^</aA])
tag ::= [aA] (lt | [nN] (lt | [sS] (lt | [^<>]) | [^<sS]) | [^<nN])
"""
_TEXT = 'char* (char | "<")'  # which may end with what begins like a tag


def gbnf(answer: Answer, form: Form, reasoning_chars: int | None = None) -> str | None:
    """Return the GBNF grammar of an answer in `form`; None for bare texts, of which there is nothing to say.

    With `reasoning_chars` there is reasoning before a tagged answer, of at most so many characters; llama.cpp
    rejects more than 2000.
    """
    rules = _rules(answer)
    if form == "answer":
        return f"root ::= {rules}\n" if rules else None
    in_tags = f'"{ANSWER_OPEN}" answer "{ANSWER_CLOSE}"'
    free = "char*" if reasoning_chars is None else f"char{{1,{reasoning_chars}}}"
    root = f"{in_tags} {free}" if form == "answer-first" else f"{free} {in_tags}"
    return f"root ::= {root}\nanswer ::= {rules or _TEXT}\n{_CHAR}"


def json_schema(answer: Answer) -> dict[str, Any] | None:
    """Return the JSON schema of an answer, for servers that constrain to one; None for texts."""
    if answer.kind == "number":
        return {"type": "number"}
    options = _LETTERS if answer.letters else BOOLEANS if answer.kind == "boolean" else answer.choices
    return {"enum": list(options)} if options else None


def _rules(answer: Answer) -> str:
    """Return the right side of an answer's rule, empty for a text."""
    if answer.kind == "number":
        return '"-"? [0-9]+ ("." [0-9]+)?'
    if answer.letters:
        return '"(" [A-Z] ")"'
    return _one_of(BOOLEANS if answer.kind == "boolean" else answer.choices)


def _one_of(texts: Iterable[str]) -> str:
    return " | ".join(map(_literal, texts))


def _literal(text: str) -> str:
    """Return `text` as a GBNF literal on one line."""
    return f'"{_ESCAPED.sub(lambda found: _escape(found[0]), text)}"'


def _escape(char: str) -> str:
    return f"\\{char}" if char in '"\\' else f"\\u{ord(char):04x}"
