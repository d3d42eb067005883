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

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from arte_edge.frozen_weights import FilePages
from arte_edge.private_apis import missing
from arte_edge.runtimes.transformers.onednn_prepack import linear_layers

if TYPE_CHECKING:
    import torch

_TOKENS = 64  # of a typical call: oneDNN chooses the block layout by it
_LARGE = 64  # features of each layer that stay in bfloat16
_BLOCK = 1280  # features with one scale, at most
_ALIGNED = 64  # features that a VNNI kernel takes at a time
_MOST = 127
_CHUNK = 1 << 19  # weights that are rounded together: what a processor's cache holds
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
    """Replace every linear layer of a bfloat16 `model` on the CPU that `sample` goes through; return how many.

    `sample` are the tokens of a text that shows which features are large. A replaced layer cannot be trained or
    saved. A LoRA adapter beside a layer is taken into it, in bfloat16. Weights that nothing else uses are freed.
    """
    import torch

    layer, inputs, head, pages = _layer(), _Inputs(), model.get_output_embeddings(), FilePages(model)
    head = getattr(head, "base_layer", head)
    within = {child: (module, name) for module in model.modules() for name, child in module.named_children()}
    slots: dict[Any, list[tuple[Any, str, Any]]] = defaultdict(list)  # of each layer, with the adapter that it takes in
    for module, name, child in linear_layers(model):
        slots[child].append((*within[module], module) if _is_plain_lora(module) else (module, name, None))
    del within, module, child
    n_layer = len(slots)

    def replace(child: Any, read: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        """Quantize a layer as soon as the sample went through it: only one is then in memory in both forms."""
        if child in slots:
            places = slots.pop(child)
            largest = read[0].reshape(-1, child.in_features).abs().amax(0).float()
            made = layer(child, largest, inputs, child is head, places[0][2])
            for module, name, _ in places:
                setattr(module, name, made)
            pages.release(child.weight)

    hooks = [child.register_forward_hook(replace) for child in slots]
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor([list(sample)]))
    finally:
        for hook in hooks:
            hook.remove()
    return n_layer - len(slots)


def _is_plain_lora(module: Any) -> bool:
    """Return whether a layer of PEFT adds the product of two matrices, and nothing else, to the layer inside it."""
    if not hasattr(module, "lora_A") or len(names := module.active_adapters) != 1:
        return False
    return not getattr(module, "lora_variant", {}).get(names[0]) and module.lora_B[names[0]].bias is None


def _block(n_feature: int) -> int:
    """Return the features with one scale: as many as divide `n_feature`, at most `_BLOCK`; else all of them."""
    sizes = (n_feature // n for n in range(1, n_feature // _ALIGNED + 1) if n_feature % n == 0)
    return next((size for size in sizes if size <= _BLOCK and size % _ALIGNED == 0), n_feature)


def _rounded(weight: torch.Tensor, large: torch.Tensor, block: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the scales ``[n_out]`` of a matrix ``[n_out, n_in]``, and its rounded blocks ``[n_out, block]``.

    The columns `large` are zero. Some rows at a time: touching fresh memory for a whole matrix of 32-bit floats takes
    longer than the rounding.
    """
    import torch

    n_out, n_in = weight.shape
    scale = torch.empty(n_out)
    parts = [torch.empty(n_out, block, dtype=torch.int8) for _ in range(n_in // block)]
    n_row = max(1, _CHUNK // n_in)
    chunk = torch.empty(min(n_row, n_out), n_in)
    for start in range(0, n_out, n_row):
        rows = slice(start, min(start + n_row, n_out))
        values = chunk[: rows.stop - start].copy_(weight[rows]).index_fill_(1, large, 0.0)
        scale[rows] = (values.abs().amax(1) / _MOST).clamp_(min=1e-12)
        values.div_(scale[rows].unsqueeze(1)).round_()
        for i, part in enumerate(parts):
            part[rows] = values[:, i * block : (i + 1) * block]
    return scale, parts


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
        def __init__(
            self, linear: torch.nn.Linear, largest: torch.Tensor, inputs: _Inputs, wide: bool, adapter: Any = None
        ) -> None:
            super().__init__()
            n_out, n_in = linear.weight.shape
            self.out_features, self.bias, self._inputs, self._wide = n_out, linear.bias, inputs, wide
            self._block = _block(n_in)
            with torch.inference_mode():
                self._large = largest.topk(min(_LARGE, n_in // 8)).indices
                self._exact = linear.weight[:, self._large].t().contiguous()
                self._down: torch.Tensor | None = None
                if adapter is not None:  # one more product with few columns, and some more rows of another
                    (name,) = adapter.active_adapters
                    down, up = adapter.lora_A[name].weight, adapter.lora_B[name].weight
                    self._down = (adapter.scaling[name] * down).t().to(self._exact.dtype)
                    self._exact = torch.cat([self._exact, up.t().to(self._exact.dtype)])
                self._scale, rounded = _rounded(linear.weight, self._large, self._block)
                self._zero = torch.zeros(n_out, dtype=torch.int64)
                self._parts = [torch.ops.onednn.qlinear_prepack(part, [_TOKENS, self._block]) for part in rounded]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            large, rounded, scales = self._inputs.of(x, self._large, self._block)
            if self._down is not None:
                large = torch.cat([large, x.reshape(-1, x.shape[-1]) @ self._down], dim=1)
            out = (large @ self._exact).float()
            for part, block, scale in zip(self._parts, rounded, scales, strict=True):
                product = torch.ops.onednn.qlinear_pointwise(
                    block, 1.0, _ZERO, part, self._scale, self._zero, None, 1.0, 0, torch.float32, "none", [], ""
                )
                out.addcmul_(product, scale)
            if self.bias is not None:
                out += self.bias
            return (out if self._wide else out.to(x.dtype)).view(*x.shape[:-1], self.out_features)

    return Quantized
