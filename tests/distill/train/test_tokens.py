from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arte_edge.distill.train.common import Encoder, check_rows
from arte_edge.errors import InputError

BOS, EOS = 1, 2


def encoder(checkpoint: Any) -> Encoder:
    from transformers import AutoTokenizer

    return Encoder(AutoTokenizer.from_pretrained(checkpoint))


@pytest.mark.parametrize("text", ["<bos><|user|>Is true?", "<|user|>Is true?"])
def test_a_model_that_wants_a_begin_token_gets_exactly_one(text: str, tiny_checkpoint: Any) -> None:
    ids = encoder(tiny_checkpoint(adds_bos=True)).prompt(text)
    assert ids[0] == BOS and ids.count(BOS) == 1


def test_a_model_without_one_gets_what_the_template_wrote(tiny_checkpoint: Any) -> None:
    plain = encoder(tiny_checkpoint())
    assert plain.prompt("<|user|>Is true?")[0] != BOS
    assert plain.prompt("<bos>Is true?").count(BOS) == 1


def test_special_tokens_in_a_rendered_prompt_are_parsed(tiny_checkpoint: Any) -> None:
    plain = encoder(tiny_checkpoint())
    assert plain.tokenizer.convert_tokens_to_ids("<|user|>") in plain.prompt("<|user|>no")


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_completion_is_closed_by_one_end_token(adds_bos: bool, tiny_checkpoint: Any) -> None:
    coder = encoder(tiny_checkpoint(adds_bos=adds_bos))
    for text in ("<ans>no</ans>", "<ans>no</ans><eos>"):
        ids = coder.completion("Is true?\n", text)
        assert ids[-1] == EOS and ids.count(EOS) == 1 and BOS not in ids


@settings(max_examples=80, deadline=None)
@given(prompt=st.text("ab tre\n<>", min_size=1), completion=st.text("ab tre\n<>", min_size=1))
def test_prompt_and_completion_join_to_the_text_whatever_the_seam(
    prompt: str, completion: str, tiny_checkpoint: Any
) -> None:
    coder = encoder(tiny_checkpoint())
    ids = coder.prompt(prompt) + coder.completion(prompt, completion)
    assert coder.tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion


def test_a_word_cut_by_the_seam_leaves_the_prompt_as_the_engine_sees_it(tiny_checkpoint: Any) -> None:
    coder = encoder(tiny_checkpoint())
    whole = coder.prompt("the answer")
    assert whole[: len(coder.prompt("the ans"))] != coder.prompt("the ans")  # the seam would merge
    ids = coder.completion("the ans", "wer")
    assert coder.tokenizer.decode(ids[:-1]) == "wer"


def test_a_tokenizer_without_an_end_token_is_refused(tiny_checkpoint: Any) -> None:
    coder = encoder(tiny_checkpoint())
    coder.tokenizer.eos_token = None
    with pytest.raises(InputError, match="end token"):
        coder.completion("a", "b")


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], "no example"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}], "example 2: 'completion'"),
        ([{"prompt": "a"}], "'completion'"),
        ([{"prompt": "a", "completion": "b", "target": "c"}], "'target'"),
    ],
)
def test_a_bad_row_is_named(rows: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        check_rows(rows, ("prompt", "completion"), "example")
