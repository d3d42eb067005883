"""Multiply in 8-bit integers with oneDNN: with VNNI 1.5 times llama.cpp's speed for batches of a 1.5B model.

Weights are rounded to 8 bits a row of the matrix. The inputs of a product are rounded to 8 bits a token and block of
features, when they are known. A few features of a language model are a hundred times larger than the rest and would
leave no bits for these (LLM.int8(), arXiv 2208.07339): the largest ones, found with a short text, are multiplied in
bfloat16 instead. What remains is 0.002 to 0.005 nats a token (benchmarks/results/int8_teacher). Sums of integers are
exact, so a row's product does not depend on who shares its batch.

The operators are those that torch's own compiler (inductor) emits for quantized weights; where a build of torch or a
processor lacks them, `supported` is false.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from arte_edge.private_apis import missing
from arte_edge.runtimes.transformers.onednn_prepack import linear_layers

if TYPE_CHECKING:
    import torch

_TOKENS = 64  # of a typical call: oneDNN chooses the block layout by it
_LARGE = 64  # features of each layer that stay in bfloat16
_BLOCK = 1280  # features with one scale, at most
_ALIGNED = 64  # features that a VNNI kernel takes at a time
_MOST = 127
_ZERO = 128  # inputs are unsigned for oneDNN

# What shows which features are large: a chat, a list, numbers and code.
SAMPLE_TEXT = (
    "<|im_start|>system\nAnswer the question.<|im_end|>\n<|im_start|>user\nWhat is the capital of France, and how "
    "many people live there? 1. Paris; 2. Lyon.<|im_end|>\n<|im_start|>assistant\nThe capital is Paris, with about "
    "2,165,000 inhabitants.\n\ndef double(x):\n    return x + x\n"
)


def supported() -> bool:
    """Return whether this torch build and processor multiply 8-bit integers fast and without overflow."""
    import torch

    if not torch.backends.mkldnn.is_available() or missing(__name__):  # type: ignore[no-untyped-call]
        return False
    # Without VNNI oneDNN adds pairs of products in 16 bits, which overflow.
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def quantize(model: Any, sample: Sequence[int]) -> int:
    """Replace every linear layer of a bfloat16 `model` on the CPU; return how many were replaced.

    `sample` are the tokens of a text that shows which features are large. A replaced layer cannot be trained or
    saved. Weights that nothing else uses are freed.
    """
    places = linear_layers(model)
    largest = _largest_inputs(model, [child for _, _, child in places], sample)
    layer, inputs, head = _layer(), _Inputs(), model.get_output_embeddings()
    for module, name, child in places:
        setattr(module, name, layer(child, largest[child], inputs, child is head))
    return len(places)


def _largest_inputs(model: Any, layers: Sequence[Any], sample: Sequence[int]) -> dict[Any, torch.Tensor]:
    """Return the largest absolute input ``[n_in]`` of each layer while the model reads `sample`."""
    import torch

    found: dict[Any, torch.Tensor] = {}

    def note(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        found[layer] = inputs[0].reshape(-1, layer.in_features).abs().amax(0).float()

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor([list(sample)]))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _block(n_feature: int) -> int:
    """Return the features with one scale: as many as divide `n_feature`, at most `_BLOCK`; else all of them."""
    sizes = (n_feature // n for n in range(1, n_feature // _ALIGNED + 1) if n_feature % n == 0)
    return next((size for size in sizes if size <= _BLOCK and size % _ALIGNED == 0), n_feature)


class _Inputs:
    """The rounded inputs of the last product: query, key and value layers have the same ones."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] = (None,)

    def of(self, x: torch.Tensor, large: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the features `large` of `x` ``[n, n_large]``; the others rounded ``[n_block, n, block]``, and scales.

        The rounded ones are unsigned, and every block has a scale a token ``[n_block, n, 1]``.
        """
        import torch

        if self._last[0] is not x or not torch.equal(self._last[1], large):
            flat = x.reshape(-1, x.shape[-1])
            rest = flat.float().index_fill(1, large, 0.0)
            blocks = rest.view(len(rest), -1, block).transpose(0, 1).contiguous()
            scales = (blocks.abs().amax(2, keepdim=True) / _MOST).clamp_(min=1e-12)
            rounded = blocks.div_(scales).round_().add_(_ZERO).to(torch.uint8)
            self._last = (x, large, flat[:, large], rounded, scales)
        return self._last[2:]


def _layer() -> Any:
    """Return the class of quantized layers: torch is imported late."""
    import torch

    class Quantized(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear, largest: torch.Tensor, inputs: _Inputs, wide: bool) -> None:
            super().__init__()
            n_out, n_in = linear.weight.shape
            self.out_features, self.bias, self._inputs, self._wide = n_out, linear.bias, inputs, wide
            self._block = _block(n_in)
            with torch.inference_mode():
                weight = linear.weight.float()
                self._large = largest.topk(min(_LARGE, n_in // 8)).indices
                self._exact = weight[:, self._large].t().contiguous().to(linear.weight.dtype)
                weight[:, self._large] = 0.0
                self._scale = (weight.abs().amax(1) / _MOST).clamp(min=1e-12)
                rounded = weight.div_(self._scale.unsqueeze(1)).round_().to(torch.int8)
                self._zero = torch.zeros(n_out, dtype=torch.int64)
                self._parts = [
                    torch.ops.onednn.qlinear_prepack(part.contiguous(), [_TOKENS, self._block])
                    for part in torch.split(rounded, self._block, dim=1)
                ]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            large, rounded, scales = self._inputs.of(x, self._large, self._block)
            out = (large @ self._exact).float()
            for part, block, scale in zip(self._parts, rounded, scales, strict=True):
                product = torch.ops.onednn.qlinear_pointwise(
                    block,
                    1.0,
                    _ZERO,
                    part,
                    self._scale,
                    self._zero,
                    None,
                    1.0,
                    0,
                    torch.float32,
                    "none",
                    [],
                    "",
                )
                out.addcmul_(product, scale)
            if self.bias is not None:
                out += self.bias
            return (out if self._wide else out.to(x.dtype)).view(*x.shape[:-1], self.out_features)

    return Quantized
