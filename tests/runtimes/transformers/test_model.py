import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Patch, choose

from arte_edge.errors import InputError
from arte_edge.runtimes import sampling as drawing
from arte_edge.runtimes.completion import Request, Sampling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from arte_edge.runtimes.transformers import model as hf  # noqa: E402
from arte_edge.runtimes.transformers import packed_generate as packed  # noqa: E402
from arte_edge.runtimes.transformers import packed_kv_cache as kv_cache  # noqa: E402
from arte_edge.runtimes.transformers.model import TransformersEngine, plan, shared_prefix  # noqa: E402
from arte_edge.runtimes.transformers.packed_generate import PromptLookup  # noqa: E402

PREFIX = "the cat sat on the mat, and then the question was asked: "
SUFFIXES = ["one?", "is it two or three or one or two?", "", "the mat. one two three", "two?"]


def complete_after(engine, prefix, suffixes, sampling):
    return engine.complete([Request(prefix + suffix) for suffix in suffixes], sampling)


def alone(engine, prompts, sampling):
    """Each prompt in a call of its own: nothing shared, nothing padded."""
    return [engine.complete([Request(prompt)], sampling)[0] for prompt in prompts]


def llama_ids(engine, text):
    return engine.text.tokens(text)


def plain(folder):
    return (auto.from_pretrained(folder) for auto in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM))


def by_generate(llama_folder, prompt, max_new_tokens):
    tokenizer, model = plain(llama_folder)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_greedy_text_is_what_the_librarys_own_generate_writes(llama, llama_folder):
    rows = alone(llama, [PREFIX + suffix for suffix in SUFFIXES], Sampling(max_tokens=20))
    assert [row.text for row in rows] == [by_generate(llama_folder, PREFIX + s, 20) for s in SUFFIXES]
    assert len({row.text for row in rows}) > 1


def test_a_batch_with_a_shared_prefix_writes_what_each_prompt_writes_alone(llama):
    sampling = Sampling(max_tokens=24)
    shared = complete_after(llama, PREFIX, SUFFIXES, sampling)
    plain = alone(llama, [PREFIX + suffix for suffix in SUFFIXES], sampling)
    assert [row.text for row in shared] == [row.text for row in plain]
    assert [row.prompt_tokens for row in shared] == [row.prompt_tokens for row in plain]
    assert min(row.cached_tokens for row in shared) > 8 and plain[0].cached_tokens == 0


def test_the_prefix_is_computed_once_for_all_batches(llama_folder, monkeypatch):
    engine = TransformersEngine(llama_folder, sha256="0", device="cpu", batch_tokens=70)
    prefilled = []
    forward = engine.model.forward

    def counting(*args, **kwargs):
        prefilled.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", counting)
    suffixes = [f"{word}?" for word in ("one", "two", "cat", "mat", "True", "False")]
    n_prefix = engine.count_tokens(PREFIX)
    complete_after(engine, PREFIX, suffixes, Sampling(max_tokens=1))
    batches = [shape for shape in prefilled if shape[0] > 1 or shape[1] < 10]
    assert len(batches) >= 3, "the token limit must split the rows"
    assert sum(rows * width for rows, width in prefilled) < n_prefix + 8 * len(suffixes)


def test_a_sliding_window_shorter_than_the_prompt_changes_no_text(tiny_checkpoint, tmp_path):
    engine = TransformersEngine(tiny_checkpoint(tmp_path / "m", "mistral"), sha256="0", device="cpu")
    sampling = Sampling(max_tokens=12)
    rows = complete_after(engine, PREFIX, SUFFIXES, sampling)
    assert [r.text for r in rows] == [r.text for r in alone(engine, [PREFIX + s for s in SUFFIXES], sampling)]


@pytest.mark.parametrize(
    "prompts",
    [
        ["one two three", "the cat sat on the mat. is it True or False?", "(A)", "two"],  # nothing in common
        [PREFIX * (1 + i % 3) + str(i) for i in range(9)],
    ],
)
def test_rows_keep_their_order_and_texts_whatever_their_lengths(llama, prompts):
    rows = llama.complete([Request(prompt) for prompt in prompts], Sampling(max_tokens=16))
    assert [row.prompt_tokens for row in rows] == [llama.count_tokens(prompt) for prompt in prompts]
    assert [row.text for row in rows] == [row.text for row in alone(llama, prompts, Sampling(max_tokens=16))]


def test_a_text_ends_with_the_stop_string_that_ended_it(llama):
    full = alone(llama, [PREFIX], Sampling(max_tokens=30))[0].text
    stop = full[8:20]  # longer than any token
    cut = full[: full.index(stop) + len(stop)]
    (row,) = llama.complete([Request(PREFIX)], Sampling(max_tokens=30, stop=("never there", stop)))
    assert (row.text, row.finish) == (cut, "stop")
    assert row.completion_tokens < 30


def test_rows_that_stop_leave_the_batch_without_disturbing_the_others(llama, monkeypatch):
    words = ("one", "two", "three", "cat", "mat", "True", "False", "question", "answer", "the")
    full = [row.text for row in alone(llama, [PREFIX + word for word in words], Sampling(max_tokens=30))]
    # A letter that some rows write early, some late and some never.
    stop = max(set("".join(full)), key=lambda c: len({text.find(c) for text in full if c in text}))
    ended = [text[: text.index(stop) + 1] if stop in text else text for text in full]
    assert 2 < sum(stop in text for text in full) < len(full) and len(set(map(len, ended))) > 4
    sizes = []
    step, forward = llama.forward.step, packed.forward_rows
    monkeypatch.setattr(
        llama.forward, "step", lambda state, tokens: (sizes.append(len(tokens)), step(state, tokens))[1]
    )

    def counting(model, device, parts, outputs):
        sizes.append(sum(len(part.tokens) for part in parts))
        return forward(model, device, parts, outputs)

    monkeypatch.setattr(packed, "forward_rows", counting)
    for side_by_side in (True, False):
        sizes.clear()
        monkeypatch.setattr(hf, "supports_packing", lambda model, known=side_by_side: known)
        rows = complete_after(llama, PREFIX, words, Sampling(max_tokens=30, stop=(stop,)))
        assert 0 < sizes[-1] < len(words), "nothing is computed for rows that have ended"
        assert [row.text for row in rows] == ended
        assert [row.finish for row in rows] == ["stop" if stop in text else "length" for text in full]


def test_finish_is_length_at_the_budget_and_eos_at_an_end_token(tmp_path, llama_folder, llama):
    row = alone(llama, [PREFIX], Sampling(max_tokens=6))[0]
    assert (row.finish, row.completion_tokens) == ("length", 6)
    ending = shutil.copytree(llama_folder, tmp_path / "ending")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    third = tokenizer(row.text, add_special_tokens=False)["input_ids"][2]
    config = json.loads((ending / "generation_config.json").read_text())
    (ending / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [third]}))
    other = TransformersEngine(ending, sha256="0", device="cpu")
    (ended,) = other.complete([Request(PREFIX)], Sampling(max_tokens=6))
    assert ended.finish == "eos" and row.text.startswith(ended.text) and ended.completion_tokens <= 2


def test_a_loop_is_cut_off(llama_folder, tmp_path):
    looping = shutil.copytree(llama_folder, tmp_path / "looping")
    from safetensors.torch import load_file, save_file

    weights = load_file(looping / "model.safetensors")
    # Without attention and MLP the next token depends on the last alone, so greedy text must cycle.
    for name, value in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            value.zero_()
    save_file(weights, looping / "model.safetensors", metadata={"format": "pt"})
    engine = TransformersEngine(looping, sha256="0", device="cpu")
    (row,) = engine.complete([Request(PREFIX)], Sampling(max_tokens=200))
    assert row.finish in ("loop", "eos") and row.completion_tokens < 200


def test_sampled_draws_repeat_and_differ_between_samples(llama):
    sampling = Sampling(temperature=1.0, top_p=0.95, max_tokens=12, seed=7)
    asked = [Request(PREFIX, sample) for sample in range(4)] + [Request("one")]
    once, again = llama.complete(asked, sampling), llama.complete(asked, sampling)
    assert once == again
    assert len({row.text for row in once[:4]}) == 4
    backwards = llama.complete(asked[::-1], sampling)[::-1]
    assert [row.text for row in backwards] == [row.text for row in once]
    other_seed = llama.complete(asked, Sampling(temperature=1.0, top_p=0.95, max_tokens=12, seed=8))
    assert [row.text for row in other_seed] != [row.text for row in once]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_knows_prompt_and_text_and_decides_with_them(llama, monkeypatch, temperature):
    ids, known = llama_ids(llama, " cat"), []

    def only_cats(self, logits):
        known.append(list(self._tokens))
        return np.where(np.arange(len(logits)) == ids[0], logits, -np.inf)

    monkeypatch.setattr(drawing.Repeats, "lessened", only_cats)
    sampling = Sampling(temperature=temperature, max_tokens=5, repeat_penalty=1.0)
    (row,) = llama.complete([Request(PREFIX)], sampling)
    assert row.text == " cat" * 5
    assert known == [llama_ids(llama, PREFIX) + ids * n for n in range(5)]


def test_a_prompt_too_long_is_an_error_row_between_whole_ones(llama):
    rows = llama.complete([Request("one"), Request("cat " * 300), Request("two")], Sampling(max_tokens=3))
    assert [row.finish for row in rows] == ["length", "error", "length"]
    assert "context of 256 tokens" in rows[1].error
    assert llama.complete([], Sampling()) == [] and choose(llama, PREFIX, [], ["a", "b"]).shape == (0, 2)
    with pytest.raises(InputError, match="context of 256"):
        choose(llama, "cat " * 300, [""], ["a", "b"])


def test_sequences_of_several_drafts_come_and_go_in_two_rows(llama, monkeypatch):
    """More prompts than places, three prefixes, and cells given back on the path: as the plain path writes."""
    drafts = [PREFIX * 2 + word * 9 for word in ("one ", "two ", "three ")]
    requests = [Request(f"{draft}{word} {i}?") for draft in drafts for i in (1, 2) for word in ("cat", "mat", "the")]
    sampling = Sampling(max_tokens=14)
    monkeypatch.setattr(packed, "_SLOTS", 2)
    monkeypatch.setattr(packed, "_ROWS", 2)
    monkeypatch.setattr(packed, "_REFILL_SHARE", 4)
    moved = []
    keep = kv_cache.CacheRow.keep
    monkeypatch.setattr(kv_cache.CacheRow, "keep", lambda self, cells: (moved.append(len(cells)), keep(self, cells))[1])
    rows = llama.complete(requests, sampling)
    monkeypatch.setattr(hf, "supports_packing", lambda model: False)
    plain = llama.complete(requests, sampling)
    assert [row.text for row in rows] == [row.text for row in plain]
    assert all(row.cached_tokens > 20 for row in rows)
    assert moved


FAMILIES = ("gemma3_text", "granite", "llama", "phi3", "qwen2", "qwen3", "smollm3")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_and_scores_in_rows_as_in_batches(tiny_checkpoint, tmp_path, monkeypatch, family):
    engine = TransformersEngine(tiny_checkpoint(tmp_path / "m", family), sha256="0", device="cpu")
    asked, suffixes = kv_cache.supports_packing(engine.model), [s or "three" for s in SUFFIXES]

    def found():
        rows = complete_after(engine, PREFIX, suffixes, Sampling(max_tokens=10))
        return [row.text for row in rows], choose(engine, PREFIX, suffixes, ["one", "two three", "the cat"])

    texts, scores = found()
    monkeypatch.setattr(hf, "supports_packing", lambda model: False)
    plain_texts, plain_scores = found()
    assert asked and texts == plain_texts
    assert np.abs(scores - plain_scores).max() < 1e-3


def test_long_prompts_are_read_in_pieces_and_no_call_takes_more(llama, monkeypatch):
    """What one call has to remember is bounded, and the texts are those of prompts read at once."""
    drafts = [PREFIX * 2 + word * 9 for word in ("one ", "two ")]
    requests = [Request(f"{draft}{word * n}?") for draft in drafts for n in (1, 9, 20) for word in ("cat ", "the ")]
    requests.append(Request("mat " * 70))  # shares nothing
    sampling = Sampling(max_tokens=12)
    whole = llama.complete(requests, sampling)
    sizes, seen = [], []
    run = kv_cache.forward_rows

    def counting(model, device, parts, outputs):
        sizes.extend(len(part.tokens) for part in parts)
        seen.append(len(outputs))
        return run(model, device, parts, outputs)

    monkeypatch.setattr(kv_cache, "forward_rows", counting)
    monkeypatch.setattr(packed, "forward_rows", counting)
    monkeypatch.setattr(kv_cache, "_PIECE", 11)
    monkeypatch.setattr(packed, "_MOST_NEW", 13)
    pieces = llama.complete(requests, sampling)
    assert [row.text for row in pieces] == [row.text for row in whole]
    assert [row.cached_tokens for row in pieces] == [row.cached_tokens for row in whole]
    assert max(sizes) <= 13 and len(seen) > 20


def test_a_family_whose_attention_is_no_plain_softmax_stays_in_batches(tiny_checkpoint, tmp_path):
    engine = TransformersEngine(tiny_checkpoint(tmp_path / "m", "gemma2"), sha256="0", device="cpu")
    assert not kv_cache.supports_packing(engine.model)
    rows = complete_after(engine, PREFIX, ["one", "two"], Sampling(max_tokens=6))
    assert all(row.finish != "error" for row in rows)


def counted(engine, requests, sampling):
    """Complete the requests; return the texts with how they ended, and how many calls that took."""
    calls, forward = [], packed.forward_rows
    with Patch.context() as patch:
        patch.setattr(packed, "forward_rows", lambda *args: (calls.append(args), forward(*args))[1])
        rows = engine.complete(requests, sampling)
    return [(row.text, row.finish, row.completion_tokens) for row in rows], len(calls)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_proposals_change_no_text_and_right_ones_save_steps(llama, monkeypatch, temperature):
    monkeypatch.setattr(hf, "FLOAT32_ROWS", 0)
    sampling = Sampling(max_tokens=24, temperature=temperature, stop=("True",))
    requests = [Request(PREFIX + suffix, sample=i) for i in range(3) for suffix in SUFFIXES]
    written, looked_up = [], PromptLookup.propose

    def none(self):
        written.append(self._tokens)  # the list that grows
        return []

    def right(self):
        n = len(self._tokens)
        return next((text[n : n + 3] for text in written if text[:n] == self._tokens), [])

    steps = {}
    for name, guess in {"none": none, "right": right, "wrong": lambda _: [5] * 3, "own": looked_up}.items():
        monkeypatch.setattr(PromptLookup, "propose", guess)
        steps[name] = counted(llama, requests, sampling)
    assert {tuple(rows) for rows, _ in steps.values()} == {tuple(steps["none"][0])}
    assert steps["right"][1] < 0.5 * steps["none"][1]
    assert steps["wrong"][1] == steps["none"][1]
    assert {finish for _, finish, _ in steps["none"][0]} >= {"length"}


@pytest.mark.parametrize("rows", [2, 6])
def test_in_float32_proposals_only_fill_a_step_up_to_some_rows(llama, monkeypatch, rows):
    monkeypatch.setattr(PromptLookup, "propose", lambda self: self._proposal or self._tokens[-8:])
    monkeypatch.setattr(hf, "FLOAT32_ROWS", rows)
    sizes, forward = [], packed.forward_rows

    def noted(model, device, parts, outputs):
        sizes.append(sum(len(part.tokens) for part in parts))
        return forward(model, device, parts, outputs)

    monkeypatch.setattr(packed, "forward_rows", noted)
    llama.complete([Request(PREFIX + suffix) for suffix in SUFFIXES[:3]], Sampling(max_tokens=12))
    assert max(sizes[2:]) == max(rows // 3 * 3, 3), "after the prefix and the prompts, while all three write"


def by_full_forward(llama_folder, context, choice):
    """Log-probabilities of the choice's tokens, from one plain forward."""
    tokenizer, model = plain(llama_folder)
    start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    ids = tokenizer(context + choice, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_probabilities = torch.log_softmax(model(ids).logits[0].float(), -1)
    return [float(log_probabilities[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])]


FIRST, LATE = slice(0, 1), slice(2, 4)


@pytest.mark.parametrize(
    ("choices", "counted"),
    [
        ([" True", " False", " xyzzy"], [FIRST] * 3),  # of one and of several tokens
        ([" xyzzy three"], [slice(None)]),  # nothing to compare with: all of it
        (["xyza", "xyzb", "xywc"], [LATE, LATE, slice(2, 3)]),
    ],
)
def test_choices_are_scored_by_the_tokens_in_which_they_part(llama, llama_folder, choices, counted):
    scores = choose(llama, PREFIX, SUFFIXES, choices)
    for suffix, row in zip(SUFFIXES, scores, strict=True):
        terms = [by_full_forward(llama_folder, PREFIX + suffix, choice) for choice in choices]
        assert row == pytest.approx([sum(t[own]) for t, own in zip(terms, counted, strict=True)], abs=1e-4)


def test_a_tree_gives_what_a_row_for_each_choice_gives(llama, monkeypatch):
    """Questions of two drafts, with choices of their own, in small groups, against the plain path."""
    drafts = [PREFIX * 3 + word for word in ("one ", "two three ")]
    prompts = [draft + suffix for draft in drafts for suffix in SUFFIXES]
    own = [["xyza", "xyzb", "(A)"], [" True", " False"], ["xyzzy"], ["1</ans>", "12</ans>"], ["a", "b"]] * 2
    monkeypatch.setattr(kv_cache, "MOST_ROWS", 60)
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


ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=30)


@given(ROWS, st.integers(0, 8), st.integers(10, 200))
def test_every_row_is_in_one_batch_and_no_batch_is_too_large(rows, new_tokens, batch_tokens):
    batches = plan(rows, new_tokens, batch_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        size = len(batch) * (max(len(rows[i]) for i in batch) + new_tokens)
        assert size <= batch_tokens or len(batch) == 1


def test_rows_are_batched_by_long_prefixes():
    prefixes = [[k] * 300 for k in range(3)]
    rows = [[*prefixes[i % 3], 7, i] for i in range(30)]
    assert [{i % 3 for i in batch} for batch in plan(rows, 10, 10**6)] == [{0}, {1}, {2}]
    rows = [[i, *range(50)] for i in range(40)]
    assert len(plan(rows, 10, 10**6)) == 1
    assert shared_prefix([[1, 2, 3, 4], [1, 2, 3, 5]]) == 0
    assert shared_prefix([]) == shared_prefix([[1] * 50]) == 0


@given(ROWS.map(lambda rows: [[5] * 8 + row for row in rows]))
def test_a_shared_prefix_is_shared_and_leaves_each_row_a_token(rows):
    n = shared_prefix(rows)
    assert all(row[:n] == rows[0][:n] and len(row) > n for row in rows)
    if n and all(len(row) > n + 1 for row in rows):
        assert len({row[n] for row in rows}) > 1, "it could be longer"
