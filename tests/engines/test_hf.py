from __future__ import annotations

import json
import shutil
import string

import numpy as np
import pytest

from arte_edge.engines.base import Request, Sampling
from arte_edge.errors import InputError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from arte_edge.engines.hf import TransformersEngine, adapter_sha256  # noqa: E402
from arte_edge.engines.hf_text import Text  # noqa: E402

CORPUS = "the cat sat on the mat. is it True or False? question answer one two three (A) (B) (C)\n"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
PREFIX = "the cat sat on the mat, and then the question was asked: "
SUFFIXES = ["one?", "is it two or three or one or two?", "", "the mat. one two three", "two?"]


def tiny_tokenizer(adds_bos):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=160,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        # No half characters: different tokens must be different texts.
        initial_alphabet=sorted(set(string.ascii_letters + string.digits + string.punctuation) | {"Ġ", "Ċ"}),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def save(folder, family="llama", adds_bos=False, seed=0):
    """A two-layer model with weights large enough that its next token is no near-tie."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(adds_bos)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    if family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    else:
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, sliding_window=12))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(folder):
    engine = TransformersEngine(folder, sha256="0" * 64, device="cpu")
    yield engine
    engine.close()


def alone(engine, prompts, sampling):
    """Each prompt in a call of its own: nothing shared, nothing padded."""
    return [engine.complete([Request(prompt)], sampling)[0] for prompt in prompts]


def by_generate(folder, prompt, max_new_tokens):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_greedy_text_is_what_the_librarys_own_generate_writes(engine, folder):
    rows = alone(engine, [PREFIX + suffix for suffix in SUFFIXES], Sampling(max_tokens=20))
    assert [row.text for row in rows] == [by_generate(folder, PREFIX + s, 20) for s in SUFFIXES]
    assert len({row.text for row in rows}) > 1


def test_a_batch_with_a_shared_prefix_writes_what_each_prompt_writes_alone(engine):
    sampling = Sampling(max_tokens=24)
    shared = engine.continue_shared(PREFIX, SUFFIXES, sampling)
    plain = alone(engine, [PREFIX + suffix for suffix in SUFFIXES], sampling)
    assert [row.text for row in shared] == [row.text for row in plain]
    assert [row.prompt_tokens for row in shared] == [row.prompt_tokens for row in plain]
    assert min(row.cached_tokens for row in shared) > 8 and plain[0].cached_tokens == 0


def test_a_batch_without_a_common_prefix_writes_what_each_prompt_writes_alone(engine):
    prompts = ["one two three", "the cat sat on the mat. is it True or False?", "(A)", "two"]
    sampling = Sampling(max_tokens=24)
    rows = engine.complete([Request(prompt) for prompt in prompts], sampling)
    assert [row.text for row in rows] == [row.text for row in alone(engine, prompts, sampling)]


def test_the_prefix_is_computed_once_for_all_batches(folder, monkeypatch):
    engine = TransformersEngine(folder, sha256="0", device="cpu", batch_tokens=100)
    prefilled = []
    forward = engine._model.forward

    def counting(*args, **kwargs):
        prefilled.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine._model, "forward", counting)
    suffixes = [f"{word}?" for word in ("one", "two", "three", "cat", "mat", "True", "False")]
    n_prefix = engine.count_tokens(PREFIX)
    engine.continue_shared(PREFIX, suffixes, Sampling(max_tokens=1))
    batches = [shape for shape in prefilled if shape[0] > 1 or shape[1] < 10]
    assert len(batches) >= 3, "the token limit must split the rows"
    assert sum(rows * width for rows, width in prefilled) < n_prefix + 8 * len(suffixes)


def test_a_sliding_window_shorter_than_the_prompt_changes_no_text(tmp_path):
    engine = TransformersEngine(save(tmp_path / "m", "mistral"), sha256="0", device="cpu")
    sampling = Sampling(max_tokens=12)
    rows = engine.continue_shared(PREFIX, SUFFIXES, sampling)
    assert [r.text for r in rows] == [r.text for r in alone(engine, [PREFIX + s for s in SUFFIXES], sampling)]


def test_rows_keep_their_order_whatever_their_lengths(engine):
    prompts = [PREFIX * (1 + i % 3) + str(i) for i in range(9)]
    rows = engine.complete([Request(prompt) for prompt in prompts], Sampling(max_tokens=4))
    assert [row.prompt_tokens for row in rows] == [engine.count_tokens(prompt) for prompt in prompts]
    assert [row.text for row in rows] == [row.text for row in alone(engine, prompts, Sampling(max_tokens=4))]


def test_a_text_ends_with_the_stop_string_that_ended_it(engine):
    full = alone(engine, [PREFIX], Sampling(max_tokens=30))[0].text
    stop = full[8:20]  # longer than any token
    cut = full[: full.index(stop) + len(stop)]
    (row,) = engine.complete([Request(PREFIX)], Sampling(max_tokens=30, stop=("never there", stop)))
    assert (row.text, row.finish) == (cut, "stop")
    assert row.completion_tokens < 30


def test_rows_that_stop_leave_the_batch_without_disturbing_the_others(engine, monkeypatch):
    words = ("one", "two", "three", "cat", "mat", "True", "False", "question", "answer", "the")
    full = [row.text for row in alone(engine, [PREFIX + word for word in words], Sampling(max_tokens=30))]
    # A letter that some rows write early, some late and some never.
    stop = max(set("".join(full)), key=lambda c: len({text.find(c) for text in full if c in text}))
    ended = [text[: text.index(stop) + 1] if stop in text else text for text in full]
    assert 2 < sum(stop in text for text in full) < len(full) and len(set(map(len, ended))) > 4
    sizes = []
    step = engine._forward.step
    monkeypatch.setattr(
        engine._forward, "step", lambda state, tokens: (sizes.append(len(tokens)), step(state, tokens))[1]
    )
    rows = engine.continue_shared(PREFIX, words, Sampling(max_tokens=30, stop=(stop,)))
    assert sizes[-1] < sizes[0], "nothing is computed for rows that have ended"
    assert [row.text for row in rows] == ended
    assert [row.finish for row in rows] == ["stop" if stop in text else "length" for text in full]


def test_finish_is_length_at_the_budget_and_eos_at_an_end_token(tmp_path, folder, engine):
    row = alone(engine, [PREFIX], Sampling(max_tokens=6))[0]
    assert (row.finish, row.completion_tokens) == ("length", 6)
    ending = shutil.copytree(folder, tmp_path / "ending")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    third = tokenizer(row.text, add_special_tokens=False)["input_ids"][2]
    config = json.loads((ending / "generation_config.json").read_text())
    (ending / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [third]}))
    other = TransformersEngine(ending, sha256="0", device="cpu")
    (ended,) = other.complete([Request(PREFIX)], Sampling(max_tokens=6))
    assert ended.finish == "eos" and row.text.startswith(ended.text) and ended.completion_tokens <= 2


def test_a_loop_is_cut_off(folder, tmp_path):
    looping = shutil.copytree(folder, tmp_path / "looping")
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


def test_sampled_draws_repeat_and_differ_between_samples(engine):
    sampling = Sampling(temperature=1.0, top_p=0.95, max_tokens=12, seed=7)
    asked = [Request(PREFIX, sample) for sample in range(4)] + [Request("one")]
    once, again = engine.complete(asked, sampling), engine.complete(asked, sampling)
    assert once == again
    assert len({row.text for row in once[:4]}) == 4
    backwards = engine.complete(asked[::-1], sampling)[::-1]
    assert [row.text for row in backwards] == [row.text for row in once]
    other_seed = engine.complete(asked, Sampling(temperature=1.0, top_p=0.95, max_tokens=12, seed=8))
    assert [row.text for row in other_seed] != [row.text for row in once]


def test_draws_follow_the_models_distribution(folder, engine):
    asked = [Request(PREFIX, sample) for sample in range(600)]
    rows = engine.complete(asked, Sampling(temperature=1.0, max_tokens=1))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**tokenizer(PREFIX, return_tensors="pt")).logits[0, -1]
    best = int(logits.argmax())
    expected = float(torch.softmax(logits.float(), -1)[best])
    seen = np.mean([row.text == tokenizer.decode([best]) for row in rows])
    assert abs(seen - expected) < 4 * np.sqrt(expected * (1 - expected) / len(rows)) + 0.01


def by_full_forward(folder, context, choice):
    """Log-probabilities of the choice's tokens, from one plain forward."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    ids = tokenizer(context + choice, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_probabilities = torch.log_softmax(model(ids).logits[0].float(), -1)
    return [float(log_probabilities[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])]


def test_a_choice_is_scored_as_one_plain_forward_scores_it(engine, folder):
    choices = [" True", " False", " xyzzy"]  # of one and of several tokens
    scores = engine.choose(PREFIX, SUFFIXES, choices)
    assert scores.shape == (len(SUFFIXES), len(choices))
    for i, suffix in enumerate(SUFFIXES):
        for j, choice in enumerate(choices):
            terms = by_full_forward(folder, PREFIX + suffix, choice)
            assert scores[i, j] == pytest.approx(terms[0], abs=1e-4)  # their first tokens tell them apart


def test_a_single_choice_counts_all_its_tokens(engine, folder):
    scores = engine.choose(PREFIX, SUFFIXES, [" xyzzy three"])
    expected = [sum(by_full_forward(folder, PREFIX + suffix, " xyzzy three")) for suffix in SUFFIXES]
    assert scores[:, 0] == pytest.approx(expected, abs=1e-4)


def test_choices_that_part_late_are_told_apart_where_they_part(engine, folder):
    choices = ["xyza", "xyzb", "xywc"]
    scores = engine.choose(PREFIX, SUFFIXES, choices)
    for i, suffix in enumerate(SUFFIXES):
        a, b, c = (by_full_forward(folder, PREFIX + suffix, choice) for choice in choices)
        expected = [sum(a[2:4]), sum(b[2:4]), c[2]]
        assert scores[i] == pytest.approx(expected, abs=1e-4)


def test_splitting_into_batches_changes_no_score(folder, engine):
    small = TransformersEngine(folder, sha256="0", device="cpu", batch_tokens=120)
    choices = ["xyza", "xyzb", "(A)"]
    assert small.choose(PREFIX, SUFFIXES, choices) == pytest.approx(
        engine.choose(PREFIX, SUFFIXES, choices), abs=1e-4
    )


def test_no_suffixes_no_rows(engine):
    assert engine.choose(PREFIX, [], ["a", "b"]).shape == (0, 2)
    assert engine.complete([], Sampling()) == []
    assert engine.continue_shared(PREFIX, [], Sampling()) == []


@pytest.mark.parametrize(("adds_bos", "extra"), [(True, 1), (False, 0)])
def test_a_begin_token_is_added_once_and_only_where_the_tokenizer_adds_one(tmp_path, adds_bos, extra):
    engine = TransformersEngine(save(tmp_path / "m", adds_bos=adds_bos), sha256="0", device="cpu")
    bare = engine.count_tokens("<s>cat") - 1
    assert engine.count_tokens("cat") == bare + extra
    assert engine.count_tokens("cat<|im_end|>") == bare + extra + 1, "special tokens are parsed from text"


def test_special_tokens_are_no_text_and_a_first_blank_is_kept():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    text = Text(tiny_tokenizer(adds_bos=False), None)
    assert text.decode(text.tokens("a cat<|im_end|>"), []) == "a cat"
    # Tokenizers of the SentencePiece kind drop the blank before the first word that they decode.
    tokenizer = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "</s>": 2}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    text = Text(transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"), None)
    assert text.tokens("the cat") == [0, 1]
    assert text.decode([1], [0]) == " cat"


def test_template_and_special_tokens_are_the_tokenizers(engine):
    assert engine.chat_template == TEMPLATE
    assert engine.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert not engine.supports_grammar
    with pytest.raises(InputError, match="takes no grammar"):
        engine.complete([Request("a")], Sampling(grammar='root ::= "a"'))


def test_a_prompt_too_long_is_an_error_row_between_whole_ones(engine):
    rows = engine.complete([Request("one"), Request("cat " * 300), Request("two")], Sampling(max_tokens=3))
    assert [row.finish for row in rows] == ["length", "error", "length"]
    assert "context of 256 tokens" in rows[1].error
    with pytest.raises(InputError, match="context of 256"):
        engine.choose("cat " * 300, [""], ["a", "b"])


def test_what_is_no_checkpoint_is_refused_with_the_reason(tmp_path, folder):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        TransformersEngine(tmp_path, sha256="0")
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        TransformersEngine(pickled, sha256="0")


# --- adapters --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    path = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(model, config).save_pretrained(path)
    return path


def test_an_adapter_changes_the_text_as_peft_itself_does(folder, adapter, engine):
    import peft

    adapted = TransformersEngine(folder, sha256="0", adapter=adapter, device="cpu")
    scores = adapted.choose(PREFIX, ["one", "two"], [" True", " False"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(model, adapter)
    ids = tokenizer([" True", " False"], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(**tokenizer(PREFIX + "one", return_tensors="pt")).logits[0, -1]
    expected = torch.log_softmax(logits, -1)[[ids[0][0], ids[1][0]]]
    assert scores[0] == pytest.approx(expected.numpy(), abs=1e-4)
    assert scores != pytest.approx(engine.choose(PREFIX, ["one", "two"], [" True", " False"]), abs=1e-3)


def test_an_adapters_identity_is_its_weights_and_scale_not_where_its_base_lay(folder, adapter, tmp_path):
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/elsewhere"}))
    assert adapter_sha256(moved) == adapter_sha256(adapter)
    (moved / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert adapter_sha256(moved) != adapter_sha256(adapter)
    engine = TransformersEngine(folder, sha256="b" * 64, adapter=adapter, device="cpu")
    assert engine.identity.adapter == adapter_sha256(adapter)
    assert engine.identity.key() == f"transformers/{'b' * 64}/float32/{adapter_sha256(adapter)}"


def test_a_pickled_adapter_is_refused(folder, adapter, tmp_path):
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(InputError, match="no adapter here"):
        TransformersEngine(folder, sha256="0", adapter=pickled, device="cpu")


# --- the real small model --------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.slow
def test_a_checkpoint_agrees_with_the_gguf_that_it_was_made_from(smollm2):
    from arte_edge.engines.llamacpp import LlamaCppEngine

    here = TransformersEngine(smollm2.checkpoint(), sha256=smollm2.sha256, device="cpu")
    there = LlamaCppEngine(smollm2.gguf, sha256=smollm2.sha256)
    prompt = "<|im_start|>user\nName the capital of France.<|im_end|>\n<|im_start|>assistant\nThe capital of"
    assert here.count_tokens(prompt) == there.count_tokens(prompt)
    sampling = Sampling(max_tokens=6)
    ours, theirs = (engine.complete([Request(prompt)], sampling)[0] for engine in (here, there))
    assert ours.text == theirs.text and "Paris" in ours.text
    suffixes = [" 2 + 2 = 4. Answer:", " London is in Spain. Answer:", " 5 is less than 3. Answer:"]
    choices = [" True", " False"]
    ours, theirs = (engine.choose("True or false?", suffixes, choices) for engine in (here, there))
    # llama.cpp rounds activations to 8 bits on their way into 4-bit weights.
    assert ours == pytest.approx(theirs, abs=0.3)
    there.close()
