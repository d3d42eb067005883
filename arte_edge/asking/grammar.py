"""Grammars that permit the answers of a task and nothing else: GBNF for llama.cpp, JSON schema for servers.

Where the answer comes in tags the reasoning is free, and may hold ``<``: only the tags themselves are kept out of it,
so that a text has one answer and ends with it. A grammar that a runtime cannot parse is as good as none, so what is
written keeps to GBNF's literals, character classes and repetitions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from arte_edge.asking.form import ANSWER_CLOSE, ANSWER_OPEN, Asking, Form
from arte_edge.tasks.structured import compact, key_order
from arte_edge.tasks.task import BOOLEANS, Answer

_LETTERS = tuple(f"({chr(code)})" for code in range(ord("A"), ord("Z") + 1))
_ESCAPED = re.compile(r'["\\\x00-\x1f\x7f\u0085\u2028\u2029]')
# One character of a text without tags, or all of what begins like a tag and is none ("<a", "</x", "<<answer>").
_CHAR = r"""char ::= [^<] | lt
lt ::= "<" (lt | "/" (lt | tag | [^<aA]) | tag | [^</aA])
tag ::= [aA] (lt | [nN] (lt | [sS] (lt | [^<>]) | [^<sS]) | [^<nN])
"""
# Any JSON, without blanks as in the canonical form of an answer.
_JSON = r"""value ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" (string ":" value ("," string ":" value)*)? "}"
array ::= "[" (value ("," value)*)? "]"
string ::= "\"" ([^"\\\x00-\x1f] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))* "\""
number ::= integer ("." [0-9]+)? ([eE] [-+]? [0-9]+)?
integer ::= "-"? ("0" | [1-9] [0-9]{0,15})
boolean ::= "true" | "false"
null ::= "null"
"""
_TEXT = 'char* (char | "<")'  # which may end with what begins like a tag


def gbnf(answer: Answer, form: Form, reasoning_chars: int | None = None) -> str | None:
    """Return the GBNF grammar of an answer in `form`; None for bare texts, of which there is nothing to say.

    With `reasoning_chars` there is reasoning before a tagged answer, of at most so many characters; llama.cpp
    rejects more than 2000.
    """
    named = _Named(answer.json_schema)
    rules = named.rule(json.loads(answer.json_schema)) if answer.kind == "json" else _rules(answer)
    more = named.text if answer.kind == "json" else ""
    if form == "answer":
        return f"root ::= {rules}\n{more}" if rules else None
    in_tags = f'"{ANSWER_OPEN}" answer "{ANSWER_CLOSE}"'
    free = "char*" if reasoning_chars is None else f"char{{1,{reasoning_chars}}}"
    root = f"{in_tags} {free}" if form == "answer-first" else f"{free} {in_tags}"
    return f"root ::= {root}\nanswer ::= {rules or _TEXT}\n{more}{_CHAR}"


def grammar_of(how: Asking, text: str) -> str | None:
    """Return the grammar of the answer to `text`, which may list options of its own."""
    if not how.answer.letters:
        return gbnf(how.answer, how.form)
    options = how.answer.options(text)
    return gbnf(Answer(kind="choice", choices=options), how.form) if options else None


def json_schema(answer: Answer) -> dict[str, Any] | None:
    """Return the JSON schema of an answer, for servers that constrain to one; None for texts."""
    if answer.kind == "number":
        return {"type": "number"}
    if answer.kind == "json":
        return dict(json.loads(answer.json_schema))
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


class _Named:
    """The rules of a JSON schema, given as text: what `compact` writes of the values that fit it.

    Of a keyword that no grammar can hold, such as a pattern, it permits more: the answer is checked when it is read.
    """

    def __init__(self, schema: str) -> None:
        self._schema = schema
        self._names: dict[str, str] = {}  # by what they stand for

    @property
    def text(self) -> str:
        return "".join(f"{name} ::= {rule}\n" for rule, name in self._names.items()) + _JSON

    def _named(self, rule: str) -> str:
        return self._names.setdefault(rule, f"r{len(self._names)}")

    def rule(self, schema: Any) -> str:
        """Return the name of the rule of `schema`."""
        if not isinstance(schema, dict):
            return "value"
        for key in ("const", "enum"):
            if key in schema:
                values = schema[key] if key == "enum" else [schema[key]]
                return self._named(_one_of(compact(value, self._schema) for value in values))
        kind = schema.get("type", "object" if "properties" in schema else "array" if "items" in schema else "")
        if "properties" not in schema:
            for key in ("anyOf", "oneOf"):
                if key in schema:
                    return self._named(" | ".join(map(self.rule, schema[key])))
        if isinstance(kind, list):
            return self._named(" | ".join(self.rule({**schema, "type": one}) for one in kind))
        if kind == "object":
            return self._object(schema)
        if kind == "array" and isinstance(items := schema.get("items"), dict):
            one = self.rule(items)
            some = f'"[" {one} ("," {one})* "]"'
            return self._named(some if schema.get("minItems") else f'{some} | "[]"')
        return kind or "value"

    def _object(self, schema: dict[str, Any]) -> str:
        """Return the rule of an object that has no keys but the listed ones, of which some are optional."""
        listed = schema.get("properties")
        if not listed:
            if schema.get("additionalProperties") is False:
                return self._named('"{}"')
            pair = f'string ":" {self.rule(schema.get("additionalProperties"))}'
            return self._named(f'"{{" ({pair} ("," {pair})*)? "}}"')
        order = key_order(self._schema)
        pairs = [
            (self._named(f"{_literal(compact(key, self._schema) + ':')} {self.rule(listed[key])}"), key)
            for key in sorted(listed, key=order.__getitem__)
        ]
        required = {key for key in schema.get("required", ()) if key in listed}
        return self._named(f'"{{" {self._members(pairs, required)} "}}"')

    def _members(self, pairs: Sequence[tuple[str, str]], required: set[str]) -> str:
        """Return the keys of an object in their order, with commas between those that are there."""
        rest, first = "", []
        for pair, key in reversed(pairs):
            later = f" {rest}" if rest else ""
            first.append(f"{pair}{later}")
            if key in required:
                first = [first[-1]]
            more = f'"," {pair}{later}' if key in required else f'("," {pair})?{later}'
            rest = self._named(more)
        return f"({' | '.join(reversed(first))}){'' if required else '?'}"
