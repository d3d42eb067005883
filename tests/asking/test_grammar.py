"""What the grammars permit, asked of llama.cpp itself: every answer of the task, and nothing else."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Folders

from arte_edge.asking.form import FORMS, Asking, Form
from arte_edge.asking.grammar import gbnf, json_schema
from arte_edge.tasks.answers import canonical
from arte_edge.tasks.structured import infer_schema, tools_schema
from arte_edge.tasks.task import Answer, Example, Task

LABELS = ("C", "C++", 'say "hi"', "a\\b", "two\nlines", "tab\there", "größer", "音楽", "[x]", "<b>", "\u2028|*")
ANSWERS = {
    "labels": (Answer(kind="choice", choices=LABELS), LABELS, ("", "C+", "C+++", "c", "say", "größ", "a", "two")),
    "letters": (Answer(kind="choice"), ("(A)", "(Z)"), ("A", "(AB)", "(a)")),
    "boolean": (Answer(kind="boolean"), ("True", "False"), ("true", "yes", "TrueFalse")),
    "number": (Answer(kind="number"), ("7", "-3", "12.5"), ("", "seven", "1.", "--1", "1e5")),
}
Permits = Callable[[str | None, str], bool]


@pytest.fixture(scope="module")
def permits(tmp_path_factory: Folders) -> Permits:
    """Ask llama.cpp's own parser and sampler, token by token, whether a grammar permits a text and its end."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel

    from arte_edge.runtimes.llamacpp.bindings import Grammar, LlamaModel

    every_byte = sorted(ByteLevel.alphabet())
    model = LlamaModel(tiny.write_gguf(tmp_path_factory.mktemp("bytes") / "bytes.gguf", every_byte))
    ids = {model.piece(token): token for token in range(model.n_vocab)}
    end = next(token for token in range(model.n_vocab) if model.is_end(token))

    def asked(grammar: str | None, text: str) -> bool:
        assert grammar is not None
        state = Grammar(model, grammar)
        try:
            for token in [*(ids[bytes([byte])] for byte in text.encode()), end]:
                if np.isinf(state.mask(np.array([token]), np.zeros(1, np.float32))[0]):
                    return False
                state.accept(token)
            return True
        finally:
            state.close()

    return asked


def in_form(answer: Answer, form: Form, target: str, rationale: str = "Since 1 < 2, <a> and </answer>.") -> str:
    """Return what a student of a task with this answer is trained to write."""
    rows = (Example("?", target),)
    return Asking.of(Task("t", "?", answer, (), rows, rows), form, len).completion(target, rationale)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ANSWERS)
def test_every_answer_is_permitted_and_nothing_else(permits: Permits, kind: str, form: Form) -> None:
    answer, right, wrong = ANSWERS[kind]
    grammar = gbnf(answer, form)
    for target in right:
        assert canonical(target, answer) == target
        assert permits(grammar, in_form(answer, form, target))
        assert permits(grammar, in_form(answer, form, target, ""))
    for target in wrong:
        assert not permits(grammar, in_form(answer, form, target))


def test_a_bare_text_needs_no_grammar_and_a_tagged_one_ends_with_its_tag(permits: Permits) -> None:
    text = Answer(kind="text")
    assert gbnf(text, "answer") is None
    for target in ("] >", "a <", "<", "<a <b", "two\nlines"):
        assert permits(gbnf(text, "reasoning-first"), in_form(text, "reasoning-first", target))
        assert permits(gbnf(text, "answer-first"), in_form(text, "answer-first", target))
    assert not permits(gbnf(text, "reasoning-first"), "so <ans>x</ans> or so")
    assert not permits(gbnf(text, "reasoning-first"), "so x")


@pytest.mark.parametrize("reasons", ["a < b", "( < [ ] >", "<<< <an <ans <answer> </x> </an", "é\n<音>"])
def test_reasoning_may_hold_what_begins_like_a_tag(permits: Permits, reasons: str) -> None:
    answer, *_ = ANSWERS["labels"]
    assert permits(gbnf(answer, "reasoning-first"), f"{reasons} <ans>C++</ans>")
    assert permits(gbnf(answer, "answer-first"), f"<ans>C++</ans> {reasons}.")
    assert permits(gbnf(answer, "reasoning-first", 1500), f"{reasons} <ans>C++</ans>")


@pytest.mark.parametrize("tag", ["<ans>", "</ans>", "<ANS>", "<<ans>", "</a<ans>"])
def test_reasoning_holds_no_tag_so_that_the_answer_is_one_of_the_task(permits: Permits, tag: str) -> None:
    answer, *_ = ANSWERS["labels"]
    assert not permits(gbnf(answer, "reasoning-first"), f"so {tag} wrong</ans>, <ans>C</ans>")
    assert not permits(gbnf(answer, "reasoning-first", 1500), f"so {tag} wrong <ans>C</ans>")


def test_reasoning_has_the_limit_that_it_is_given(permits: Permits) -> None:
    grammar = gbnf(Answer(kind="boolean"), "reasoning-first", 9)
    assert permits(grammar, "123456789<ans>True</ans>")
    assert not permits(grammar, "1234567890<ans>True</ans>")
    assert not permits(grammar, "<ans>True</ans>")  # it was asked for


def test_a_json_schema_lists_closed_answers() -> None:
    assert json_schema(Answer(kind="choice", choices=LABELS)) == {"enum": list(LABELS)}
    assert json_schema(Answer(kind="boolean")) == {"enum": ["True", "False"]}
    assert json_schema(Answer(kind="number")) == {"type": "number"}
    assert json_schema(Answer(kind="text")) is None
    letters = json_schema(Answer(kind="choice"))
    assert letters is not None
    assert letters["enum"][:2] == ["(A)", "(B)"]
    assert all(canonical(option, Answer(kind="choice")) == option for option in letters["enum"])


SLOTS = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["PlayMusic", 'say "hi"', "größer"]},
        "slots": {
            "type": "object",
            "properties": {
                "year": {"type": ["integer", "null"]},
                "artist": {"type": "string"},
                "tags": {"type": "array", "items": {"type": "string"}},
                "loud": {"type": "boolean"},
            },
            "additionalProperties": False,
        },
        "at": {"type": "object", "properties": {"x": {"type": "number"}, "y": {}}, "required": ["x"]},
    },
    "required": ["intent", "slots"],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "set_alarm",
            "parameters": {
                "type": "object",
                "properties": {"time": {"$ref": "#/$defs/time"}, "label": {"type": "string"}},
                "required": ["time"],
                "$defs": {"time": {"type": "string", "pattern": "^[0-9]+:[0-9]+$"}},
            },
        },
    },
    {"name": "stop"},
]
OBJECTS: tuple[dict[str, Any], ...] = (
    {"intent": "PlayMusic", "slots": {}},
    {"intent": "größer", "slots": {"year": 1999, "loud": True}},
    {"intent": 'say "hi"', "slots": {"year": None, "artist": 'C:\\ "<é>"\n', "tags": ["a", "b"], "loud": False}},
    {"intent": "PlayMusic", "slots": {"tags": []}, "at": {"x": -1.5e-7, "y": [{"z": [1, "two", None]}, {}]}},
)
CALLS: tuple[dict[str, Any], ...] = (
    {"name": "set_alarm", "arguments": {"time": "7:30", "label": "up"}},
    {"name": "set_alarm", "arguments": {"time": "7:30"}},
    {"name": "stop", "arguments": {}},
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("schema", "objects"), [(SLOTS, OBJECTS), (tools_schema(TOOLS), CALLS)])
def test_of_json_what_fits_the_schema_is_permitted(
    permits: Permits, schema: dict[str, Any], objects: tuple[dict[str, Any], ...], form: Form
) -> None:
    answer = Answer(kind="json", json_schema=json.dumps(schema))
    for value in objects:
        target = canonical(json.dumps(value), answer)
        assert target is not None
        assert permits(gbnf(answer, form), in_form(answer, form, target))
    assert json_schema(answer) == json.loads(answer.json_schema)


@pytest.mark.parametrize(
    "text",
    [
        '{"slots":{},"intent":"PlayMusic"}',
        '{"intent":"StopMusic","slots":{}}',
        '{"intent":"PlayMusic"}',
        '{"intent":"PlayMusic","slots":{"year":"1999"}}',
        '{"intent":"PlayMusic","slots":{"song":"x"}}',
        '{"intent":"PlayMusic","slots":{,"loud":true}}',
        '{"intent":"PlayMusic","slots":{"loud":true,"loud":true}}',
        '{"intent":"PlayMusic","slots":{}} and so on',
    ],
)
def test_of_json_nothing_else_is_permitted(permits: Permits, text: str) -> None:
    assert not permits(gbnf(Answer(kind="json", json_schema=json.dumps(SLOTS)), "answer"), text)


@settings(deadline=None)
@given(st.data())
def test_every_object_of_an_inferred_schema_is_permitted(permits: Permits, data: st.DataObject) -> None:
    texts = st.text(st.characters(codec="utf-8"), max_size=5)
    scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | texts
    values = st.recursive(scalars, lambda some: st.lists(some, max_size=3) | st.dictionaries(texts, some, max_size=3))
    objects = data.draw(st.lists(st.dictionaries(texts, values, max_size=4), min_size=1, max_size=4))
    answer = Answer(kind="json", json_schema=json.dumps(infer_schema(objects)))
    for value in objects:
        target = canonical(json.dumps(value), answer)
        assert target is not None
        assert permits(gbnf(answer, "answer"), target)
