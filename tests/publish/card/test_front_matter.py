from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from arte_edge.errors import InputError
from arte_edge.publish.card.front_matter import MARK, merge_head, merge_model_index, read_head, split_card

HAND = """---
# written by hand
license: mit          # my choice
tags:
- one
# before language
language: en

model-index: []   # ours
# the end
---
# Title

Words.
"""


@pytest.mark.parametrize(
    ("wanted", "replace", "old", "new"),
    [
        ({"license": "apache-2.0", "pipeline_tag": "t"}, (), "# the end\n", "# the end\npipeline_tag: t\n"),
        (
            {"model-index": [{"name": "m", "results": []}]},
            ("model-index",),
            "model-index: []   # ours\n",
            "model-index:\n- name: m\n  results: []\n",
        ),
        ({"tags": ["two", "three"]}, ("tags",), "- one\n", "- two\n- three\n"),
        ({"tags": None}, ("tags",), "tags:\n- one\n", ""),
    ],
    ids=["a key that is there stays", "the named key is replaced", "a list is replaced whole", "removed"],
)
def test_only_what_is_named_changes(wanted: Any, replace: tuple[str, ...], old: str, new: str) -> None:
    assert merge_head(split_card(HAND), wanted, replace=replace).text == HAND.replace(old, new)


def test_a_card_gets_a_head_in_its_own_line_ends() -> None:
    card = merge_head(split_card("# Mine\r\n\r\nText"), {"license": "mit"})
    assert card.text == "---\r\nlicense: mit\r\n---\r\n# Mine\r\n\r\nText"
    text = "\ufeff---\r\nlicense: mit\r\n---\r\nText\r\n"
    card = merge_head(split_card(text), {"tags": ["a", "b"]})
    assert card.text == "\ufeff---\r\nlicense: mit\r\ntags:\r\n- a\r\n- b\r\n---\r\nText\r\n"


@pytest.mark.parametrize(
    ("block", "said"),
    [("a: [1", r"README\.md:\d+: its front matter is not valid YAML"), ("- a", "not a mapping"), ("{a: 1}", "braces")],
)
def test_a_head_that_cannot_be_kept_is_refused(block: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        merge_head(split_card(f"---\n{block}\n---\n"), {"license": "mit"})


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
HEADS = st.dictionaries(st.from_regex(r"[a-z][a-z_-]{0,8}", fullmatch=True), VALUES, min_size=1, max_size=5)


@settings(max_examples=60)
@given(there=HEADS, wanted=HEADS, body=TEXT, crlf=st.booleans())
def test_any_head_keeps_its_keys(there: dict[str, Any], wanted: dict[str, Any], body: str, crlf: bool) -> None:
    text = f"---\n{yaml.safe_dump(there, sort_keys=False, allow_unicode=True)}---\n{body}"
    card = split_card(text.replace("\n", "\r\n") if crlf else text)
    found = merge_head(card, wanted, replace=list(wanted)[:1])
    first = next(iter(wanted))
    expected = {k: v for k, v in wanted.items() if v is not None} | there | {first: wanted[first]}
    if wanted[first] is None:
        del expected[first]
    assert read_head(found) == expected
    assert found.body == card.body
    assert merge_head(found, wanted, replace=list(wanted)[:1]).text == found.text


def metric(value: float, **args: Any) -> dict[str, Any]:
    return {"type": "accuracy", "value": value} | ({"args": args} if args else {})


def entry(*metrics: dict[str, Any], name: str = "m") -> dict[str, Any]:
    result = {"task": {"type": "t"}, "dataset": {"type": "d", "name": "d"}, "metrics": list(metrics)}
    return {"name": name, "results": [result]}


def test_our_results_are_replaced_and_those_of_others_stay() -> None:
    theirs = entry(metric(0.5), metric(0.1, **MARK))
    found = merge_model_index([theirs, entry(metric(0.2, **MARK), name="n")], [entry(metric(0.9, **MARK))])
    assert [e["name"] for e in found] == ["m"]
    assert [m["value"] for r in found[0]["results"] for m in r["metrics"]] == [0.5, 0.9]
    assert merge_model_index(found, [entry(metric(0.9, **MARK))]) == found


def test_no_results_leave_no_index_of_ours() -> None:
    assert merge_model_index([entry(metric(0.1, **MARK))], []) is None
    assert merge_model_index(None, []) is None
    assert merge_model_index([entry(metric(0.5))], []) == [entry(metric(0.5))]
