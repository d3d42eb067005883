"""JSON answers: which schemas are taken, what an answer is, and how slots are counted."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.tasks.answers import canonical, leaf_counts, leaf_f1, matches
from arte_edge.tasks.structured import compact, infer_schema, key_order, parse, schema_text, tools_schema
from arte_edge.tasks.task import Answer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["PlayMusic", "SetAlarm"]},
        "slots": {"type": "object", "properties": {"year": {"type": "integer"}, "artist": {"type": "string"}}},
    },
    "required": ["intent"],
}
ANSWER = Answer(kind="json", json_schema=json.dumps(SCHEMA))
QUEEN = '{"intent":"PlayMusic","slots":{"year":1975,"artist":"Queen"}}'


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (QUEEN, QUEEN),
        (' {"slots": {"artist": "Queen", "year": 1975.0},\n "intent": "PlayMusic"} ', QUEEN),
        (
            '{"slots": {"zz": 1, "b": "é", "year": 1}, "intent": "SetAlarm"}',
            '{"intent":"SetAlarm","slots":{"year":1,"b":"é","zz":1}}',
        ),
        ('{"intent": "PlayMusic"}', '{"intent":"PlayMusic"}'),
        (QUEEN + " because", None),
        (f"```json\n{QUEEN}\n```", None),
        ('{"intent": "PlayMusic", "intent": "SetAlarm"}', None),
        ('{"intent": "playmusic"}', None),
        ('{"intent": "PlayMusic", "slots": {"year": NaN}}', None),
        ('{"intent": "PlayMusic", "slots": {"zz": 1e999}}', None),
        ('{"intent": "PlayMusic", "slots": {"artist": "\\ud800"}}', None),
        ('{"slots": {}}', None),
        ("PlayMusic", None),
        ("[]", None),
        ("", None),
        ('{"a":' * 100_000, None),
        (f'{{"intent": "PlayMusic", "zz": {"9" * 5000}}}', None),
    ],
)
def test_an_answer_is_one_object_that_fits(text: str, form: str | None) -> None:
    assert canonical(text, ANSWER) == form
    if form is not None:
        assert canonical(form, ANSWER) == form


def test_texts_inside_are_compared_as_free_texts_unless_exact() -> None:
    written = QUEEN.replace("Queen", " queen. ")
    exact = Answer(kind="json", json_schema=ANSWER.json_schema, exact=True)
    assert matches(written, QUEEN, ANSWER)
    assert not matches(written, QUEEN, exact)
    assert not matches(QUEEN.replace("Queen", "ABBA"), QUEEN, ANSWER)
    assert not matches(QUEEN.replace("1975", "1976"), QUEEN, ANSWER)
    assert matches(json.dumps(json.loads(QUEEN), indent=1), QUEEN, exact)


@pytest.mark.parametrize(
    ("predicted", "counts"),
    [
        (QUEEN, (2, 2, 2)),
        (QUEEN.replace("PlayMusic", "SetAlarm"), (2, 2, 2)),  # the intent is no slot
        (QUEEN.replace("1975", "1976"), (1, 2, 2)),
        ('{"intent":"PlayMusic","slots":{"year":1975,"artist":"queen","b":"Queen"}}', (2, 3, 2)),
        ('{"intent":"PlayMusic","slots":{"b":"Queen"}}', (0, 1, 2)),  # the right words under a wrong key
        ('{"intent":"PlayMusic"}', (0, 1, 2)),  # without slots everything counts
        ("none", (0, 0, 2)),
        (None, (0, 0, 2)),
    ],
)
def test_slots_are_counted_by_path_and_value(predicted: str | None, counts: tuple[int, int, int]) -> None:
    assert leaf_counts(predicted, QUEEN, ANSWER) == counts


def test_slot_f1_is_over_all_slots_together() -> None:
    other = '{"intent":"PlayMusic","slots":{"artist":"ABBA"}}'
    assert leaf_f1([(QUEEN, QUEEN), (None, other)], ANSWER) == pytest.approx(2 * 2 / (2 + 3))
    assert leaf_f1([], ANSWER) == 1.0
    lists = Answer(kind="json", json_schema="{}")
    assert leaf_counts('{"x":["b","a","a"]}', '{"x":["a","b"]}', lists) == (2, 3, 2)  # in any order, as often
    assert leaf_counts('{"x":"1"}', '{"x":1}', lists) == (0, 1, 1)


def test_a_call_names_its_tool_before_the_arguments_and_takes_its_parameters_alone() -> None:
    time = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/t"}},
        "required": ["at"],
        "$defs": {"t": {"type": "string"}},
    }
    tools = [{"type": "function", "function": {"name": "set_alarm", "parameters": time}}, {"name": "stop"}]
    schema = schema_text(tools_schema(tools))
    call = parse('{"arguments": {"at": "7:30"}, "name": "set_alarm"}', schema)
    assert compact(call, schema) == '{"name":"set_alarm","arguments":{"at":"7:30"}}'
    for wrong in (
        '{"name": "set_alarm", "arguments": {}}',
        '{"name": "stop", "arguments": {"at": "7"}}',
        '{"name": "x", "arguments": {}}',
    ):
        with pytest.raises(ValueError):
            parse(wrong, schema)


@pytest.mark.parametrize(
    "tools",
    [
        None,
        {},
        [],
        ["set_alarm"],
        [{"name": ""}],
        [{"function": 1}],
        [{"name": "a"}, {"name": "a"}],
        [{"name": "a", "parameters": 3}],
    ],
)
def test_what_is_no_list_of_tools_is_refused(tools: object) -> None:
    with pytest.raises(ValueError):
        tools_schema(tools)


def deep(levels: int) -> dict[str, Any]:
    return {"properties": {"a": deep(levels - 1)}} if levels else {}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ([], "a JSON schema is an object"),
        ({"type": "text"}, "no JSON schema"),
        ({"properties": 3}, "no JSON schema"),
        ({"patternProperties": 3}, "no JSON schema"),
        ({"$ref": "https://example.org/schema.json"}, "nothing is fetched"),
        ({"properties": {"a": {"items": {"$ref": "other.json"}}}}, "nothing is fetched"),
        ({"$ref": "#/$defs/a"}, "is not in the schema"),
        ({"$ref": "#"}, "is not in the schema"),
        ({"$dynamicRef": "#a"}, "dynamic references"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}, "refers to itself"),
        (deep(40), "more than 32 deep"),
        (
            {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}] * 200}, "b": {"anyOf": [{}] * 200}}, "$ref": "#/$defs/a"},
            "20000 parts",
        ),
        ({"properties": {"a": {"pattern": "("}}}, "no regular expression"),
        ({"patternProperties": {"(": {}}}, "no regular expression"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_at_once(schema: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schema_text(schema)


def test_references_are_inlined_once_and_for_all_and_keys_may_have_any_name() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": {"a/b": {"type": "integer"}},
        "properties": {"const": {"$ref": "#/$defs/a~1b", "description": "n"}, "$ref": {"enum": [{"$ref": "x"}]}},
    }
    text = schema_text(schema)
    assert json.loads(text)["properties"]["const"] == {"type": "integer", "description": "n"}
    assert "$defs" not in text and "$schema" not in text
    assert schema_text(json.loads(text)) == text
    assert list(key_order(text)) == ["const", "$ref"]
    assert parse('{"const": 1, "$ref": {"$ref": "x"}}', text)
    with pytest.raises(ValueError, match="const: 'x' is not of type 'integer'"):
        parse('{"const": "x"}', text)


def test_few_recurring_texts_are_an_enum_and_what_is_not_everywhere_is_optional() -> None:
    rows = [{"intent": f"i{n % 2}", "slots": {"n": n, **({"x": f"{n}"} if n % 3 else {})}} for n in range(20)]
    schema = infer_schema(rows)
    assert schema["required"] == ["intent", "slots"]
    assert schema["properties"]["intent"] == {"enum": ["i0", "i1"]}
    slots = schema["properties"]["slots"]
    assert slots["properties"] == {"n": {"type": "integer"}, "x": {"type": "string"}}
    assert slots["required"] == ["n"]
    assert infer_schema([1, 2.5, None]) == {"type": ["null", "number"]}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(st.characters(codec="utf-8"), max_size=3),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text("ab$", max_size=2), some, max_size=3),
)


@given(st.lists(st.dictionaries(st.text("ab$", max_size=2), json_values, max_size=3), min_size=1, max_size=5))
def test_what_a_schema_was_inferred_from_fits_it(values: list[dict[str, Any]]) -> None:
    schema = schema_text(infer_schema(values))
    for value in values:
        assert parse(json.dumps(value), schema) == value
