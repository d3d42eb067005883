"""Compute the gradients of a training on a CPU in bfloat16, its forward pass and its weights in float32.

Two thirds of a step are products of the backward pass, and a processor with bfloat16 products computes them twice as
fast. Rounding a gradient to eight bits changes its direction by a cosine of 0.9995, and Adam's steps less. Mixed
precision as usual, with a forward pass in bfloat16 too, trains worse: the weights of a checkpoint are 16-bit values,
a step at the rates of fine-tuning moves them by less than half of bfloat16's spacing, and the forward pass would
round every such step away (SmolLM2-135M after one step at 1e-5: loss 5.6, and 6.3 in bfloat16).
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

from arte_edge.distill.train.ranks import is_sharded
from arte_edge.runtimes.transformers.placement import multiplies_bfloat16

if TYPE_CHECKING:
    import torch


def gradients_in_bfloat16(model: Any) -> bool:
    """Let the linear layers of `model`, whose weights are trained, compute gradients so; return whether they will.

    They will not on a GPU, on a processor that does not multiply bfloat16, with ``ARTE_EDGE_DTYPE=float32``, and
    where weights are spread over several ranks.
    """
    import torch

    if model.device.type != "cpu" or is_sharded() or not multiplies_bfloat16():
        return False
    product = _product()

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = product.apply(x, self.weight, self.bias)
        return found

    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.dtype == torch.float32:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    return True


@cache
def _product() -> Any:
    """Return the autograd function ``x @ weight.T + bias``: torch is imported late."""
    import torch

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
        ) -> torch.Tensor:
            ctx.save_for_backward(x.bfloat16(), weight)
            return torch.nn.functional.linear(x, weight, bias)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            (x, weight), gradient = ctx.saved_tensors, gradients[0]
            rows = gradient.reshape(-1, gradient.shape[-1])  # [n_token, n_out]
            rounded, (of_x, of_weight, of_bias) = rows.bfloat16(), ctx.needs_input_grad
            return (
                (rounded @ weight.bfloat16()).float().reshape(x.shape) if of_x else None,
                (rounded.t() @ x.reshape(-1, x.shape[-1])).float() if of_weight else None,
                rows.sum(0) if of_bias else None,
            )

    return Product
