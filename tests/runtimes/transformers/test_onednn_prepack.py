"""Packed weights are the same weights: texts and scores stay, and other floats are left alone."""

import numpy as np
import pytest

from arte_edge.runtimes.completion import Request, Sampling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from arte_edge.runtimes.transformers import model as hf  # noqa: E402
from arte_edge.runtimes.transformers import onednn_prepack as hf_pack  # noqa: E402
from arte_edge.runtimes.transformers.model import TransformersEngine  # noqa: E402

needs_bf16 = pytest.mark.skipif(not hf_pack.supported(), reason="this processor multiplies no bfloat16")
needs_x86 = pytest.mark.skipif(not hf_pack.supports_float32(), reason="not an x86 processor")
PROMPTS = ["the cat sat on the mat. ", "one two three ", "is it True or False? "]


def engine_of(folder, dtype):
    return TransformersEngine(folder, sha256="0", device="cpu", dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "off"),
    # Rounding to 8 or 24 bits of mantissa, in another order of sums.
    [pytest.param("bfloat16", 0.02, marks=needs_bf16), pytest.param("float32", 1e-5, marks=needs_x86)],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_texts_and_scores_are_those_of_plain_layers(tiny_checkpoint, tmp_path, monkeypatch, family, dtype, off):
    folder = tiny_checkpoint(tmp_path / "m", family)
    packed = engine_of(folder, dtype)
    monkeypatch.setattr(hf, "pack", lambda model: 0)
    plain = engine_of(folder, dtype)
    tokens = torch.tensor([packed.text.tokens(PROMPTS[0])])
    with torch.inference_mode():
        one, two = (e.model(input_ids=tokens).logits.float().numpy() for e in (packed, plain))
    assert np.abs(one - two).max() < off * np.abs(two).max()
    requests = [Request(prompt) for prompt in PROMPTS]
    texts = [[row.text for row in e.complete(requests, Sampling(max_tokens=1))] for e in (packed, plain)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "dtype", [pytest.param("bfloat16", marks=needs_bf16), pytest.param("float32", marks=needs_x86)]
)
def test_every_linear_layer_is_packed_and_its_own_weights_are_given_back(tiny_checkpoint, tmp_path, dtype):
    floats = getattr(torch, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path / "m"), dtype=floats)
    linear = sum(type(module) is torch.nn.Linear for module in model.modules())
    before = sum(weight.numel() for weight in model.parameters())
    assert hf_pack.pack(model) == linear > 7
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    assert sum(weight.numel() for weight in model.parameters()) < 0.6 * before
    assert hf_pack.pack(model) == 0


def test_a_processor_that_multiplies_nothing_so_leaves_the_layers_alone(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_pack.platform, "machine", lambda: "aarch64")
    model = engine_of(tiny_checkpoint(tmp_path / "m"), "float32").model
    assert sum(type(module) is torch.nn.Linear for module in model.modules()) > 7
