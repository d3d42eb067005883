import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from arte_edge.errors import InputError  # noqa: E402
from arte_edge.runtimes.transformers import model as hf  # noqa: E402
from arte_edge.runtimes.transformers import packed_kv_cache as hf_tree  # noqa: E402
from arte_edge.runtimes.transformers.model import TransformersEngine  # noqa: E402

PREFIX = "the cat sat on the mat, and then the question was asked: "
SUFFIXES = ["one?", "is it two or three or one or two?", "", "the mat. one two three", "two?"]


def choose(engine, prefix, suffixes, choices):
    """Return log-probabilities [n_suffix, n_choice] of the same choices after several prompts."""
    rows = engine.choose_each([prefix + suffix for suffix in suffixes], [choices] * len(suffixes))
    return np.array(rows).reshape(-1, len(choices))


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
    scores = choose(llama, PREFIX, SUFFIXES, choices)
    assert scores.shape == (len(SUFFIXES), len(choices))
    for i, suffix in enumerate(SUFFIXES):
        for j, choice in enumerate(choices):
            terms = by_full_forward(llama_folder, PREFIX + suffix, choice)
            assert scores[i, j] == pytest.approx(terms[0], abs=1e-4)  # their first tokens tell them apart


def test_a_single_choice_counts_all_its_tokens(llama, llama_folder):
    scores = choose(llama, PREFIX, SUFFIXES, [" xyzzy three"])
    expected = [sum(by_full_forward(llama_folder, PREFIX + suffix, " xyzzy three")) for suffix in SUFFIXES]
    assert scores[:, 0] == pytest.approx(expected, abs=1e-4)


def test_choices_that_part_late_are_told_apart_where_they_part(llama, llama_folder):
    choices = ["xyza", "xyzb", "xywc"]
    scores = choose(llama, PREFIX, SUFFIXES, choices)
    for i, suffix in enumerate(SUFFIXES):
        a, b, c = (by_full_forward(llama_folder, PREFIX + suffix, choice) for choice in choices)
        expected = [sum(a[2:4]), sum(b[2:4]), c[2]]
        assert scores[i] == pytest.approx(expected, abs=1e-4)


def test_a_tree_gives_what_a_row_for_each_choice_gives(llama, monkeypatch):
    """Questions of two drafts, with choices of their own, in small groups, against the plain path."""
    drafts = [PREFIX * 3 + word for word in ("one ", "two three ")]
    prompts = [draft + suffix for draft in drafts for suffix in SUFFIXES]
    own = [["xyza", "xyzb", "(A)"], [" True", " False"], ["xyzzy"], ["1</ans>", "12</ans>"], ["a", "b"]] * 2
    monkeypatch.setattr(hf_tree, "MOST_ROWS", 60)
    scores = llama.choose_each(prompts, own)
    monkeypatch.setattr(hf, "supports_packing", lambda model: False)
    plain = llama.choose_each(prompts, own)
    assert [len(row) for row in scores] == [len(choices) for choices in own]
    for left, right in zip(scores, plain, strict=True):
        assert left == pytest.approx(right, abs=1e-4)


def test_no_prompt_and_one_too_long_are_refused(llama):
    with pytest.raises(InputError, match="a prompt before them"):
        choose(llama, "", [""], ["one", "two"])
    with pytest.raises(InputError, match="exceeds the model's context"):
        choose(llama, "", ["one " * 5000], [" one", " two"])


def test_sixteen_bits_on_a_cpu_are_there_for_the_asking(llama_folder, llama, monkeypatch):
    choices = [" True", " False", " xyzzy"]
    monkeypatch.setenv("ARTE_EDGE_DTYPE", "bfloat16")
    half = TransformersEngine(llama_folder, sha256="0", device="cpu")
    assert half.identity.quantization == "bfloat16" and llama.identity.quantization == "float32"
    scores, exact = (choose(engine, PREFIX, SUFFIXES, choices) for engine in (half, llama))
    assert 1e-6 < np.abs(scores - exact).max() < 0.1 * np.abs(exact).max()
    with pytest.raises(InputError, match="dtype float8"):
        TransformersEngine(llama_folder, sha256="0", device="cpu", dtype="float8")
