"""The part of Go's text/template that our Modelfiles use, read strictly: what is not known is an error.

Actions: ``$v := …``, ``$v = …``, ``range .Messages``, ``if``, ``else if``, ``else``, ``end``, and printing of
``.Field``, ``$v`` and string literals. ``{{-`` trims the blanks before it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

TOKEN = re.compile(r"\{\{(-?)\s*(.*?)\s*\}\}", re.DOTALL)


def parse(text: str) -> list[Any]:
    """Return the template as nested lists: text, ("print", e), ("set", v, e), ("range", body), ("if", branches)."""
    pieces: list[tuple[str, str]] = []
    at = 0
    for found in TOKEN.finditer(text):
        before = text[at : found.start()]
        pieces.append(("text", before.rstrip() if found[1] else before))
        pieces.append(("action", found[2]))
        at = found.end()
    pieces.append(("text", text[at:]))
    assert "{{" not in text[at:], "an action is not closed"
    stream = iter(pieces)
    body, ended = _block(stream)
    assert ended == "", f"'{ended}' without a beginning"
    return body


def _block(stream: Iterator[tuple[str, str]]) -> tuple[list[Any], str]:
    body: list[Any] = []
    for kind, value in stream:
        if kind == "text":
            body.append(value)
        elif value == "end" or value.split()[0] == "else":
            return body, value
        elif value == "range .Messages":
            inner, ended = _block(stream)
            assert ended == "end"
            body.append(("range", inner))
        elif value.startswith("if "):
            branches, condition = [], value.removeprefix("if ")
            while True:
                inner, ended = _block(stream)
                branches.append((condition, inner))
                if ended == "end":
                    break
                assert ended == "else" or ended.startswith("else if "), ended
                condition = ended.removeprefix("else").strip().removeprefix("if ") or "true"
            body.append(("if", branches))
        elif assigned := re.fullmatch(r"(\$\w+) :?= (.+)", value):
            body.append(("set", assigned[1], assigned[2]))
        else:
            body.append(("print", value))
    return body, ""


def execute(text: str, data: Mapping[str, Any]) -> str:
    """Return what the template writes for `data`."""
    out: list[str] = []
    _run(parse(text), dict(data), {}, out)
    return "".join(out)


def _run(body: Sequence[Any], dot: Mapping[str, Any], names: dict[str, Any], out: list[str]) -> None:
    for part in body:
        if isinstance(part, str):
            out.append(part)
        elif part[0] == "print":
            out.append(str(_value(part[1], dot, names)))
        elif part[0] == "set":
            names[part[1]] = _value(part[2], dot, names)
        elif part[0] == "range":
            for item in dot["Messages"]:
                _run(part[1], item, names, out)
        else:
            inner = next((b for condition, b in part[1] if _value(condition, dot, names)), [])
            _run(inner, dot, names, out)


def _value(text: str, dot: Mapping[str, Any], names: Mapping[str, Any]) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r'"[^"\\]*"', text):
        return text[1:-1]
    if text.startswith("$"):
        return names[text]
    if re.fullmatch(r"\.\w+", text):
        return dot[text[1:]]
    if compared := re.fullmatch(r'eq (\.\w+) ("[^"]*")', text):
        return _value(compared[1], dot, names) == _value(compared[2], dot, names)
    raise AssertionError(f"not in the part of Go's templates that we use: {text}")
