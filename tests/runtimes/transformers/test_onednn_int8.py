"""Products in 8-bit integers are nearly the same model, whoever shares the batch, and large features stay exact."""

import numpy as np
import pytest
from tiny import save_adapter

from arte_edge.frozen_weights import FilePages
from arte_edge.runtimes.completion import Request, Sampling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from arte_edge.runtimes.transformers import onednn_int8  # noqa: E402
from arte_edge.runtimes.transformers.model import TransformersEngine  # noqa: E402

pytestmark = pytest.mark.skipif(not onednn_int8.supported(), reason="this processor has no fast 8-bit integers")
PROMPTS = ["the cat sat on the mat. ", "one two three ", "is it True or False? "]


def engine_of(folder, dtype):
    return TransformersEngine(folder, sha256="0", device="cpu", dtype=dtype)


def layer_of(n_in, n_out, largest, seed=0):
    """Return a linear layer and its quantized form."""
    torch.manual_seed(seed)
    linear = torch.nn.Linear(n_in, n_out).bfloat16()
    inputs = onednn_int8._Inputs()
    return linear, onednn_int8._layer()(linear, largest, inputs, False)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_log_probabilities_are_close_to_those_of_bfloat16(tiny_checkpoint, tmp_path, family):
    folder = tiny_checkpoint(tmp_path / "m", family)
    exact, rounded = engine_of(folder, "float32"), engine_of(folder, "int8")
    assert rounded.identity.quantization == "int8"
    assert rounded.identity.key() != exact.identity.key()
    tokens = torch.tensor([exact.text.tokens(PROMPTS[0])])
    with torch.inference_mode():
        one, two = (torch.log_softmax(e.model(input_ids=tokens).logits[0].float(), -1) for e in (exact, rounded))
    divergence = (one.exp() * (one - two)).sum(-1)
    assert divergence.mean() < 0.01, "a random model of width 32 has the coarsest blocks there are"
    assert not any(type(module) is torch.nn.Linear for module in rounded.model.modules())


def test_a_text_does_not_depend_on_who_shares_the_batch(tiny_checkpoint, tmp_path):
    engine = engine_of(tiny_checkpoint(tmp_path / "m"), "int8")
    sampling = Sampling(max_tokens=6, temperature=1.0, seed=3)
    together = engine.complete([Request(prompt) for prompt in PROMPTS], sampling)
    alone = [engine.complete([Request(prompt)], sampling)[0] for prompt in PROMPTS]
    assert [done.text for done in together] == [done.text for done in alone]


def test_a_feature_a_thousand_times_larger_leaves_bits_for_the_others():
    x = torch.randn(5, 512, generator=torch.manual_seed(1)).bfloat16()
    x[:, 7] = 1000.0
    linear, quantized = layer_of(512, 128, x.abs().amax(0).float())
    blind = layer_of(512, 128, torch.arange(512.0))[1]  # takes others to be large
    small = x.clone()
    small[:, 7] = 0.0
    with torch.inference_mode():
        large_alone = linear(x).float() - linear(small).float()
        wanted = linear(small).float()
        good, bad = (layer(x).float() - large_alone for layer in (quantized, blind))
    scale = wanted.abs().mean()
    assert (good - wanted).abs().mean() < 0.05 * scale * 10  # bfloat16 of sums of about 50
    assert (bad - wanted).abs().mean() > 2 * (good - wanted).abs().mean()


@pytest.mark.parametrize(("n_feature", "block"), [(896, 896), (1536, 768), (4864, 1216), (8960, 1280), (100, 100)])
def test_blocks_divide_the_features(n_feature, block):
    assert onednn_int8._block(n_feature) == block


def test_layers_with_the_same_input_round_it_once():
    largest = torch.arange(256.0)
    inputs = onednn_int8._Inputs()
    make = onednn_int8._layer()
    layers = [make(torch.nn.Linear(256, 64).bfloat16(), largest, inputs, False) for _ in range(2)]
    x, other = torch.randn(3, 256).bfloat16(), torch.randn(3, 256).bfloat16()
    with torch.inference_mode():
        first = layers[0](x)
        kept = inputs._last[3]
        layers[1](x)
        assert inputs._last[3] is kept
        layers[1](other)
        assert inputs._last[3] is not kept
        assert torch.equal(layers[0](x), first)
    assert np.isfinite(first.float().numpy()).all()


@pytest.mark.parametrize(("lora", "plain"), [({}, True), ({"lora_bias": True}, False), ({"use_dora": True}, False)])
def test_an_adapter_that_is_more_than_two_matrices_stays_beside_a_layer(lora, plain):
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], **lora))
    found = [onednn_int8._is_plain_lora(module) for module in model.modules() if hasattr(module, "lora_A")]
    assert found == [plain]


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_logits_are_wide_and_pages_given_back_whatever_an_adapter_adapts(tiny_checkpoint, tmp_path, monkeypatch, lora):
    pytest.importorskip("peft")
    folder = tiny_checkpoint(tmp_path / "m", "qwen2")
    save_adapter(folder, tmp_path / "adapter", [1, 2], **lora)
    released = []
    monkeypatch.setattr(FilePages, "release", lambda pages, weight: released.append(weight.shape))
    engine = TransformersEngine(folder, sha256="0", adapter=tmp_path / "adapter", device="cpu", dtype="int8")
    with torch.inference_mode():
        assert engine.model(input_ids=torch.tensor([[1, 2]])).logits.dtype == torch.float32
    layers = [module for module in engine.model.modules() if type(module).__name__ == "Quantized"]
    assert len(released) == len(layers) == 7 * engine.model.config.num_hidden_layers + 1
    assert not any(hasattr(module, "lora_A") for module in engine.model.modules())
