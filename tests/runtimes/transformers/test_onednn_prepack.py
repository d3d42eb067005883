"""Packed weights are the same weights: texts and scores stay, and a model that is not bfloat16 is left alone."""

import numpy as np
import pytest

from arte_edge.runtimes.completion import Request, Sampling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from arte_edge.runtimes.transformers import model as hf  # noqa: E402
from arte_edge.runtimes.transformers import onednn_prepack as hf_pack  # noqa: E402
from arte_edge.runtimes.transformers.model import TransformersEngine  # noqa: E402

needs_bf16 = pytest.mark.skipif(not hf_pack.supported(), reason="this processor multiplies no bfloat16")
PROMPTS = ["the cat sat on the mat. ", "one two three ", "is it True or False? "]


def engine_of(folder, dtype="bfloat16"):
    return TransformersEngine(folder, sha256="0", device="cpu", dtype=dtype)


@needs_bf16
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_texts_and_scores_are_those_of_plain_layers(tiny_checkpoint, tmp_path, monkeypatch, family):
    folder = tiny_checkpoint(tmp_path / "m", family)
    packed = engine_of(folder)
    monkeypatch.setattr(hf, "pack", lambda model: 0)
    plain = engine_of(folder)
    tokens = torch.tensor([packed.text.tokens(PROMPTS[0])])
    with torch.inference_mode():
        one, two = (e.model(input_ids=tokens).logits.float().numpy() for e in (packed, plain))
    # Rounding to 8 bits of mantissa, in another order of sums.
    assert np.abs(one - two).max() < 0.02 * np.abs(two).max()
    requests = [Request(prompt) for prompt in PROMPTS]
    texts = [[row.text for row in e.complete(requests, Sampling(max_tokens=1))] for e in (packed, plain)]
    assert texts[0] == texts[1]


@needs_bf16
def test_every_linear_layer_is_packed_and_its_own_weights_are_given_back(tiny_checkpoint, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path / "m"), dtype=torch.bfloat16)
    linear = sum(type(module) is torch.nn.Linear for module in model.modules())
    before = sum(weight.numel() for weight in model.parameters())
    assert hf_pack.pack(model) == linear > 7
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    assert sum(weight.numel() for weight in model.parameters()) < 0.6 * before
    assert hf_pack.pack(model) == 0

    model = engine_of(tiny_checkpoint(tmp_path / "m"), "float32").model
    assert sum(type(module) is torch.nn.Linear for module in model.modules()) > 7, "32 bits are left as they are"
