"""Answers that are JSON objects: intents with slots, tool calls, anything else that has a JSON schema.

A schema is held as text with its references inlined, so that nothing is ever fetched. The canonical form of an answer
is JSON without blanks, with the keys in the order of the schema: a student names the tool before its arguments.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from arte_edge.tasks.normalize import fold_text

_MAX_DEPTH = 32
_MAX_PARTS = 20_000
# Keywords that hold schemas by name; those that hold data; those that mean nothing once references are inlined.
_NAMED = ("properties", "patternProperties", "dependentSchemas")
_DATA = ("const", "enum", "default", "examples")
_LEFT_OUT = ("$defs", "definitions", "$id", "$schema", "$anchor", "$dynamicAnchor", "$comment")
_ALL_SLOTS = ("slots", "arguments")  # where one of these is, it holds what is scored leaf by leaf


def schema_text(schema: object) -> str:
    """Return a JSON schema (draft 2020-12) as text, with its references inlined.

    Raises ValueError: it is no schema, refers to another document or to itself, or is absurdly large or deep.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    if not isinstance(schema, dict):
        raise ValueError('a JSON schema is an object like {"type": "object", "properties": {…}}')
    inlined = _inlined(schema, schema, 0, Counter())
    try:
        Draft202012Validator.check_schema(inlined)
    except SchemaError as error:
        raise ValueError(f"no JSON schema (2020-12): {_place(error.path)}{error.message:.200}") from error
    return json.dumps(inlined, ensure_ascii=False, separators=(",", ":"))


def _inlined(schema: Any, root: dict[str, Any], depth: int, seen: Counter[str]) -> Any:
    """Return `schema` with what it refers to in its place; `seen` counts the parts."""
    if not isinstance(schema, dict):
        return schema
    seen["parts"] += 1
    if depth > _MAX_DEPTH or seen["parts"] > _MAX_PARTS:
        what = f"nested more than {_MAX_DEPTH} deep" if depth > _MAX_DEPTH else f"of more than {_MAX_PARTS} parts"
        raise ValueError(f"the schema is {what}, or refers to itself")
    if any(isinstance(schema.get(key), str) for key in ("$dynamicRef", "$recursiveRef")):
        raise ValueError("the schema uses dynamic references; write plain ones, to #/$defs/…")
    if isinstance(ref := schema.get("$ref"), str):
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        return _inlined({**_target(ref, root), **rest}, root, depth + 1, seen)
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _LEFT_OUT:
            continue
        if key in _DATA:
            found[key] = value
        elif key in _NAMED and isinstance(value, dict):
            found[key] = {name: _inlined(part, root, depth + 1, seen) for name, part in value.items()}
        elif isinstance(value, list):
            found[key] = [_inlined(part, root, depth + 1, seen) for part in value]
        else:
            found[key] = _inlined(value, root, depth + 1, seen)
    by_pattern = found.get("patternProperties")
    for pattern in (found.get("pattern", ""), *(by_pattern if isinstance(by_pattern, dict) else ())):
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression ({error})") from error
    return found


def _target(ref: str, root: dict[str, Any]) -> dict[str, Any]:
    if not ref.startswith("#"):
        raise ValueError(f"$ref {ref!r} is in another document; put it under $defs, nothing is fetched")
    part: Any = root
    for key in ref.removeprefix("#").split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        part = part.get(key) if isinstance(part, dict) else None
    if not isinstance(part, dict) or not ref.startswith("#/"):
        raise ValueError(f"$ref {ref!r} is not in the schema")
    return part


def tools_schema(tools: object) -> dict[str, Any]:
    """Return the schema of a call ``{"name": …, "arguments": {…}}`` to one of `tools`, a list in OpenAI's format.

    Raises ValueError: not such a list, or two tools have one name.
    """
    listed = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    names = [tool.get("name") for tool in listed if isinstance(tool, dict)]
    if not names or len(names) < len(tools if isinstance(tools, list) else ()) or not all(map(_is_name, names)):
        raise ValueError('tools are a list like [{"name": "set_alarm", "parameters": {…}}, …]')
    if len(set(names)) < len(names):
        raise ValueError(f"two tools are named {Counter(names).most_common(1)[0][0]!r}")
    empty = {"type": "object", "properties": {}, "additionalProperties": False}
    calls = [(tool["name"], json.loads(schema_text(tool.get("parameters") or empty))) for tool in listed]
    return {"anyOf": [_object({"name": {"const": name}, "arguments": arguments}) for name, arguments in calls]}


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(name.strip())


def _object(properties: dict[str, Any], optional: Sequence[str] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": properties,
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


@lru_cache(maxsize=16)
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads(schema))


@lru_cache(maxsize=16)
def key_order(schema: str) -> dict[str, int]:
    """Return the rank of every key that a schema, given as text, names; an object's keys go before those inside."""
    order: dict[str, int] = {}
    parts = [json.loads(schema)]
    for part in parts:  # grows
        if isinstance(part, dict):
            named = part.get("properties")
            for name in named if isinstance(named, dict) else ():
                order.setdefault(name, len(order))
            for key, value in part.items():
                if key not in _DATA:
                    parts += list(value.values()) if key in _NAMED else value if isinstance(value, list) else [value]
    return order


def parse(text: str, schema: str) -> dict[str, Any]:
    """Return the object that `text` is, and nothing but is, if it fits `schema`, given as text.

    Raises ValueError: why it is none: not JSON, a key twice, not a finite number, or where it does not fit.
    """
    from jsonschema.exceptions import best_match

    try:
        value = _DECODER.decode(text.strip())
        compact(value, schema).encode()  # half of a character
        error = best_match(_validator(schema).iter_errors(value))
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if error is not None:
        raise ValueError(f"{_place(error.absolute_path)}{error.message:.200}")
    return value


def _place(path: Sequence[object]) -> str:
    return f"{'.'.join(map(str, path))}: " if path else ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} is there twice")
    return found


def _float(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value  # 21.0 is 21


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=_float, parse_constant=_constant)


def compact(value: Any, schema: str) -> str:
    """Return `value` as JSON without blanks, its keys in the order of `schema`; ValueError for infinite numbers."""
    order = key_order(schema)

    def ordered(part: Any) -> Any:
        if isinstance(part, dict):
            keys = sorted(part, key=lambda key: (order.get(key, len(order)), key))
            return {key: ordered(part[key]) for key in keys}
        return [ordered(one) for one in part] if isinstance(part, list) else part

    return json.dumps(ordered(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def folded(value: Any) -> Any:
    """Return `value` with its texts as free texts are compared: without regard to case or punctuation at the edges."""
    if isinstance(value, dict):
        return {key: folded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [folded(part) for part in value]
    return fold_text(value) or value if isinstance(value, str) else value


def leaves(value: Mapping[str, Any]) -> Counter[tuple[str, ...]]:
    """Return the values of an answer with their paths, of which slot F1 is made; the order in a list does not count.

    Of an answer that has ``slots`` or ``arguments`` those alone: the intent, or the tool, is no slot.
    """
    part = next((value[key] for key in _ALL_SLOTS if key in value), value)
    return Counter(_leaves(part, ()))


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, (*path, key))
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part, (*path, "[]"))
    else:
        yield (*path, json.dumps(value))


_MAX_VALUES = 12  # of an enum, each in five rows on average
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}


def infer_schema(values: Sequence[Any]) -> dict[str, Any]:
    """Return a schema that all `values` fit: their keys and types, and an enum where few texts recur."""
    types = {_TYPES.get(type(value), "null") for value in values}
    if types == {"object"}:
        keys = dict.fromkeys(key for value in values for key in value)
        parts = {key: [value[key] for value in values if key in value] for key in keys}
        optional = [key for key, found in parts.items() if len(found) < len(values)]
        return _object({key: infer_schema(found) for key, found in parts.items()}, optional)
    if types == {"array"}:
        items = [item for value in values for item in value]
        return {"type": "array", **({"items": infer_schema(items)} if items else {})}
    if types == {"string"}:
        texts = Counter(values)
        if len(texts) <= _MAX_VALUES and len(values) >= 5 * len(texts):
            return {"enum": sorted(texts)}
    if types & {"object", "array"}:
        return {}
    named = sorted(types - {"integer"} if "number" in types else types)
    return {"type": named[0] if len(named) == 1 else named}
