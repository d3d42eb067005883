from pathlib import Path
from typing import Any

import pytest

from arte_edge.distill.train import sft
from arte_edge.distill.train.common import SftSettings, load
from arte_edge.distill.train.sft import train_sft


@pytest.fixture
def multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any processor computes bfloat16 products, some of them slowly."""
    monkeypatch.setattr(sft, "multiplies_bfloat16", lambda: True)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])  # without and with biases
def test_the_forward_pass_is_exact_and_every_gradient_points_the_same_way(
    multiplies: None, tiny_checkpoint: Any, arch: str
) -> None:
    import torch

    found = []
    for rounded in (False, True):
        model, _ = load(tiny_checkpoint(arch=arch), frozen=False)
        assert not rounded or sft.gradients_in_bfloat16(model)
        ids = torch.arange(10, 34).reshape(2, 12)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.item(), {name: weight.grad for name, weight in model.named_parameters()}))
    (exact, gradients), (loss, rounded_gradients) = found
    assert loss == exact
    for name, gradient in gradients.items():
        other = rounded_gradients[name]
        assert other is not None and other.dtype == torch.float32, name
        # Of what the softmax does not see, such as the bias of keys, the gradient is rounding alone.
        if gradient.norm() > 1e-6:
            assert torch.nn.functional.cosine_similarity(gradient.flatten(), other.flatten(), 0) > 0.99, name
            assert other.norm().item() == pytest.approx(gradient.norm().item(), rel=0.02), name


def test_a_training_follows_the_loss_of_float32(
    multiplies: None, tiny_checkpoint: Any, sft_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SftSettings(learning_rate=1e-3, batch_size=4, epochs=4, seed=3)
    rounded = train_sft(tiny_checkpoint(), sft_rows, tmp_path / "rounded", settings)
    monkeypatch.setattr(sft, "multiplies_bfloat16", lambda: False)
    exact = train_sft(tiny_checkpoint(), sft_rows, tmp_path / "exact", settings)
    ours, theirs = ([row["loss"] for row in result.history] for result in (rounded, exact))
    assert ours[0] == theirs[0] and ours != theirs
    assert ours == pytest.approx(theirs, rel=0.01)
    assert theirs[-1] < 0.9 * theirs[0]  # there was something to follow
