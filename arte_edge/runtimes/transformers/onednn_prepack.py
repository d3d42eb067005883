"""Pre-pack Linear weights in oneDNN's layout, once instead of at every product.

oneDNN multiplies bfloat16 in blocks of its own layout. torch stores weights row by row, so each product of a `Linear`
first reorders its weights; with some dozen tokens a call, as when many texts are generated, that is a quarter of the
time. In float32 torch calls MKL, which repacks them likewise: on an AVX2 processor (Zen 2) packed ones are multiplied
1.8 times as fast with 32 tokens and 1.3 times with 256. The operators used here are those that torch's own compiler
(inductor) emits for frozen weights; where a build of torch or a processor lacks them, the model stays as it is.
"""

from __future__ import annotations

import platform
from typing import Any

from arte_edge.frozen_weights import FilePages
from arte_edge.private_apis import missing

_TOKENS = 64  # of a typical call: oneDNN chooses the block layout by it


def pack(model: Any) -> int:
    """Pack every linear layer of a model that this processor multiplies so; return how many were packed.

    A packed layer cannot be trained or saved. Weights that nothing else uses are freed.
    """
    import torch

    able = {torch.bfloat16: supported, torch.float32: supports_float32}
    if model.dtype not in able or not able[model.dtype]():
        return 0
    linear, layer, pages = linear_layers(model), _layer(), FilePages(model)
    n_layer = len(linear)
    while linear:  # the list would keep what is replaced
        module, name, child = linear.pop()
        setattr(module, name, layer(child))
        pages.release(child.weight)
    return n_layer


def linear_layers(model: Any) -> list[tuple[Any, str, Any]]:
    """Return each linear layer of a model with its parent and its name there, without those of an adapter beside it."""
    import torch

    return [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is torch.nn.Linear and not isinstance(module, torch.nn.ModuleDict)  # an adapter's
    ]


def supported() -> bool:
    """Return whether this torch build and processor support bfloat16 products with pre-packed weights."""
    import torch

    if not torch.backends.mkldnn.is_available() or missing(__name__):  # type: ignore[no-untyped-call]
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def supports_float32() -> bool:
    """Return whether float32 products with pre-packed weights are worth it: measured on x86 alone."""
    import torch

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.mkldnn.is_available() and not missing(__name__)  # type: ignore[no-untyped-call]


def _layer() -> Any:
    """Return the class of packed layers: torch is imported late."""
    import torch

    class Packed(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.out_features, self.bias = linear.out_features, linear.bias
            with torch.inference_mode():
                self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight, _TOKENS)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return out

    return Packed
