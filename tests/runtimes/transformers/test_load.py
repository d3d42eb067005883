import json
import shutil
from types import SimpleNamespace

import pytest
from tiny import Patch, choose, edited, edited_json, relative_error, save_adapter

from arte_edge.errors import ArteError, InputError
from arte_edge.runtimes.completion import Request, Sampling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from arte_edge.runtimes.transformers import onednn_int8, onednn_prepack  # noqa: E402
from arte_edge.runtimes.transformers.model import (  # noqa: E402
    TransformersEngine,
    adapter_sha256,
    room_tokens,
)
from arte_edge.runtimes.transformers.tokenizer import Text  # noqa: E402

PACKS = "arte_edge.runtimes.transformers.onednn_prepack.supports_float32"
PREFIX = "the cat sat on the mat, and then the question was asked: "


@pytest.mark.parametrize(("adds_bos", "extra"), [(True, 1), (False, 0)])
def test_a_begin_token_is_added_once_and_where_it_belongs(tiny_checkpoint, tmp_path, adds_bos, extra):
    engine = TransformersEngine(tiny_checkpoint(tmp_path / "m", adds_bos=adds_bos), sha256="0", device="cpu")
    bare = engine.count_tokens("<s>cat") - 1
    assert engine.count_tokens("cat") == bare + extra
    assert engine.count_tokens("cat<|im_end|>") == bare + extra + 1, "special tokens are parsed from text"


def test_special_tokens_are_no_text_and_a_first_blank_is_kept(llama_folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    text = Text(transformers.AutoTokenizer.from_pretrained(llama_folder), None)
    assert text.decode(text.tokens("a cat<|im_end|>"), []) == "a cat"
    # Tokenizers of the SentencePiece kind drop the blank before the first word that they decode.
    tokenizer = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "</s>": 2}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    text = Text(transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"), None)
    assert text.tokens("the cat") == [0, 1]
    assert text.decode([1], [0]) == " cat"


def test_template_and_special_tokens_are_the_tokenizers(llama):
    assert llama.chat_template == "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert llama.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert not llama.supports_grammar
    with pytest.raises(InputError, match="grammar"):
        llama.complete([Request("a")], Sampling(grammar='root ::= "a"'))


def test_what_is_no_checkpoint_is_refused_with_the_reason(tmp_path, llama_folder):
    with pytest.raises(InputError, match="no model here"):
        TransformersEngine(tmp_path, sha256="0")
    pickled = shutil.copytree(llama_folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickles"):
        TransformersEngine(pickled, sha256="0")


@pytest.fixture(scope="module")
def adapter(llama_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    save_adapter(llama_folder, path, [1, 2])
    return path


def test_an_adapter_changes_the_text_as_peft_itself_does(llama_folder, adapter, llama):
    import peft

    adapted = TransformersEngine(llama_folder, sha256="0", adapter=adapter, device="cpu")
    scores = choose(adapted, PREFIX, ["one", "two"], [" True", " False"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    model = peft.PeftModel.from_pretrained(model, adapter)
    ids = tokenizer([" True", " False"], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(**tokenizer(PREFIX + "one", return_tensors="pt")).logits[0, -1]
    expected = torch.log_softmax(logits, -1)[[ids[0][0], ids[1][0]]]
    assert scores[0] == pytest.approx(expected.numpy(), abs=1e-4)
    assert scores != pytest.approx(choose(llama, PREFIX, ["one", "two"], [" True", " False"]), abs=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_adapter_that_bfloat16_would_round_away_is_not_merged(llama_folder, adapter, monkeypatch: Patch, dtype: str):
    if dtype == "int8" and not onednn_int8.supported():
        pytest.skip("this processor has no fast 8-bit integers")

    def lost(*_: object) -> None:
        raise ArteError("not the same model")

    if dtype == "bfloat16":
        merged = TransformersEngine(llama_folder, sha256="0", adapter=adapter, device="cpu", dtype=dtype)
        assert not any(hasattr(module, "lora_A") for module in merged.model.modules())
    monkeypatch.setattr("arte_edge.transformers_load.compare_merge", lost)
    apart = TransformersEngine(llama_folder, sha256="0", adapter=adapter, device="cpu", dtype=dtype)
    beside = any(hasattr(module, "lora_A") for module in apart.model.modules())
    assert beside is (dtype == "bfloat16"), "8-bit layers take it in"
    monkeypatch.undo()
    wide, bare = (
        TransformersEngine(llama_folder, sha256="0", adapter=one, device="cpu", dtype="float32")
        for one in (adapter, None)
    )
    found = [choose(engine, PREFIX, ["one", "two"], [" True", " False"]) for engine in (apart, wide, bare)]
    assert abs(found[0] - found[1]).mean() < 0.5 * abs(found[2] - found[1]).mean()
    monkeypatch.setattr("arte_edge.transformers_load.compare_merge", lost)
    if onednn_prepack.supports_float32():  # then it stays beside packed weights, and nothing is merged
        TransformersEngine(llama_folder, sha256="0", adapter=adapter, device="cpu", dtype="float32")
    monkeypatch.setattr(PACKS, lambda: False)
    with pytest.raises(ArteError, match="not the same model"):  # where rounding does not explain it
        TransformersEngine(llama_folder, sha256="0", adapter=adapter, device="cpu", dtype="float32")


def test_an_adapters_identity_is_its_weights_and_scale_and_a_pickle_is_refused(llama_folder, adapter, tmp_path):
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/elsewhere"}))
    assert adapter_sha256(moved) == adapter_sha256(adapter)
    (moved / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert adapter_sha256(moved) != adapter_sha256(adapter)
    engine = TransformersEngine(llama_folder, sha256="b" * 64, adapter=adapter, device="cpu")
    assert engine.identity.adapter == adapter_sha256(adapter)
    assert engine.identity.key() == f"transformers/{'b' * 64}/float32/{adapter_sha256(adapter)}"
    (moved / "adapter_model.safetensors").rename(moved / "adapter_model.bin")
    with pytest.raises(InputError, match="pickles"):
        TransformersEngine(llama_folder, sha256="0", adapter=moved, device="cpu")


@pytest.mark.parametrize(
    "lora", [{"target_modules": ["embed_tokens"]}, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}]
)
def test_an_adapter_of_a_tied_embedding_runs_as_it_was_trained(llama_folder, tmp_path, lora, monkeypatch):
    tied = edited_json(llama_folder, tmp_path / "tied", tie_word_embeddings=True)
    edited(tied, tmp_path / "base", lambda tensors: tensors.pop("lm_head.weight", None))
    ids = [*range(30)]
    wanted = save_adapter(tmp_path / "base", tmp_path / "adapter", ids, **lora)
    engine = TransformersEngine(tmp_path / "base", sha256="0", adapter=tmp_path / "adapter", device="cpu")
    got = engine.forward.extend(engine.forward.empty(), [ids])[0].numpy()
    assert relative_error(got, wanted) < 1e-4
    monkeypatch.setattr(PACKS, lambda: False)
    engine = TransformersEngine(tmp_path / "base", sha256="0", adapter=tmp_path / "adapter", device="cpu")
    got = engine.forward.extend(engine.forward.empty(), [ids])[0].numpy()
    assert relative_error(got, wanted) < 1e-4, "merged too"
    room = "arte_edge.transformers_load.merge_attached"
    monkeypatch.setattr(room, lambda live: live.merge_and_unload())  # PEFT's own, into the shared matrix
    with pytest.raises(ArteError, match="not the same model"):
        TransformersEngine(tmp_path / "base", sha256="0", adapter=tmp_path / "adapter", device="cpu")


def test_a_checkpoint_that_lacks_a_tensor_is_refused(llama_folder, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    part = edited(llama_folder, tmp_path / "part", lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match=name.replace(".", r"\.")):  # transformers fills it with random numbers
        TransformersEngine(part, sha256="0", device="cpu")


@pytest.mark.parametrize(("free_bytes", "tokens"), [(100 * 10**9, 262_144), (8 * 10**9, 104_166), (10**8, 16_384)])
def test_a_batch_on_a_gpu_is_as_large_as_its_free_memory_allows(
    monkeypatch: Patch, free_bytes: int, tokens: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, free_bytes))
    config = SimpleNamespace(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576)
    assert room_tokens(config, torch.device("cuda")) == tokens
    assert room_tokens(config, torch.device("cpu")) == 16_384
