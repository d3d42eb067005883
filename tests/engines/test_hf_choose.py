from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from arte_edge.engines.hf import TransformersEngine  # noqa: E402

PREFIX = "the cat sat on the mat, and then the question was asked: "
SUFFIXES = ["one?", "is it two or three or one or two?", "", "the mat. one two three", "two?"]


def by_full_forward(llama_folder, context, choice):
    """Log-probabilities of the choice's tokens, from one plain forward."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    ids = tokenizer(context + choice, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_probabilities = torch.log_softmax(model(ids).logits[0].float(), -1)
    return [float(log_probabilities[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])]


def test_a_choice_is_scored_as_one_plain_forward_scores_it(llama, llama_folder):
    choices = [" True", " False", " xyzzy"]  # of one and of several tokens
    scores = llama.choose(PREFIX, SUFFIXES, choices)
    assert scores.shape == (len(SUFFIXES), len(choices))
    for i, suffix in enumerate(SUFFIXES):
        for j, choice in enumerate(choices):
            terms = by_full_forward(llama_folder, PREFIX + suffix, choice)
            assert scores[i, j] == pytest.approx(terms[0], abs=1e-4)  # their first tokens tell them apart


def test_a_single_choice_counts_all_its_tokens(llama, llama_folder):
    scores = llama.choose(PREFIX, SUFFIXES, [" xyzzy three"])
    expected = [sum(by_full_forward(llama_folder, PREFIX + suffix, " xyzzy three")) for suffix in SUFFIXES]
    assert scores[:, 0] == pytest.approx(expected, abs=1e-4)


def test_choices_that_part_late_are_told_apart_where_they_part(llama, llama_folder):
    choices = ["xyza", "xyzb", "xywc"]
    scores = llama.choose(PREFIX, SUFFIXES, choices)
    for i, suffix in enumerate(SUFFIXES):
        a, b, c = (by_full_forward(llama_folder, PREFIX + suffix, choice) for choice in choices)
        expected = [sum(a[2:4]), sum(b[2:4]), c[2]]
        assert scores[i] == pytest.approx(expected, abs=1e-4)


def test_splitting_into_batches_changes_no_score(llama_folder, llama):
    small = TransformersEngine(llama_folder, sha256="0", device="cpu", batch_tokens=120)
    choices = ["xyza", "xyzb", "(A)"]
    assert small.choose(PREFIX, SUFFIXES, choices) == pytest.approx(
        llama.choose(PREFIX, SUFFIXES, choices), abs=1e-4
    )
