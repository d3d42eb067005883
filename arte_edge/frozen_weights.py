"""Hold the weights of a frozen model in the 16 bits of its checkpoint, and compute with them in float32.

A processor that does not multiply 16-bit floats computes in float32, and then the weights of a teacher that no
training changes take twice the memory of their files. Both 16-bit formats are subsets of float32, so a layer can widen
its weight for each product and drop it again: the values are those of a model that was loaded in float32, exactly, and
so are all results up to the order in which a product of a large output layer is summed. The backward pass widens the
weight once more instead of keeping it. Embeddings are looked up in 16 bits and widened after that; whatever is no
Linear or Embedding layer, such as the weights of norms, is float32 throughout.

The 16-bit weights are no parameters: they are in no optimizer, no state dict, and are sent to no other process.

Weights in the file's own type are not read but mapped, so their pages can be given back while they are not used: the
file still holds them (`FilePages`).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arte_edge.checkpoint import read_weights
from arte_edge.transformers_load import load_model

if TYPE_CHECKING:
    import torch

_KINDS = {"F16": "float16", "BF16": "bfloat16"}
_CHUNK = 1 << 26  # values that are widened at once: of a large vocabulary's output layer a part, 268 MB


def stored_floats(checkpoint: Path) -> str:
    """Return the one 16-bit type of all weights of a checkpoint, empty if there is no such type."""
    weights = read_weights(checkpoint).values()
    kinds, has_norms = {weight.dtype for weight in weights}, any(len(weight.shape) == 1 for weight in weights)
    # Weights that stay float32 are needed too: transformers takes a model's type from its first parameter.
    return _KINDS.get(kinds.pop(), "") if len(kinds) == 1 and has_norms else ""


def load_frozen(checkpoint: Path, **options: Any) -> Any:
    """Return the model of a folder, computing in float32, with its weights as they are stored; it cannot be trained.

    Raises InputError: as `load_model`.
    """
    import torch

    if not (dtype := stored_floats(checkpoint)):
        return load_model(checkpoint, torch.float32, **options).requires_grad_(False)
    holders = _holders()
    model = load_model(checkpoint, getattr(torch, dtype), **options).requires_grad_(False)
    _set_buffers(model)
    others = [module for module in model.modules() if type(module) not in holders]
    kept = {id(weight) for module in others for weight in module.parameters(recurse=False)}  # may be tied
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) in holders and id(module.weight) not in kept:
                setattr(parent, name, holders[type(module)](module))
    for weight in model.parameters():
        weight.data = weight.data.float()
    model.config.dtype = torch.float32
    return model


def _set_buffers(model: Any) -> None:
    """Give `model` the constants that its code computes in float32, which loading in 16 bits has rounded."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():  # the weights have no memory, buffers do
        exact = dict(AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).named_buffers())
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float() if name in saved else exact[name].data


def _chunks(weight: torch.Tensor) -> list[slice]:
    """Return the rows of a weight in parts that are widened one at a time."""
    n_row = max(1, _CHUNK // weight.shape[1])
    return [slice(start, start + n_row) for start in range(0, weight.shape[0], n_row)]


@cache
def _holders() -> dict[type, Any]:
    """Return what replaces a layer of torch: torch is imported late."""
    import torch

    class _Product(torch.autograd.Function):
        """``x @ weight.T + bias`` of a 16-bit weight ``[n_out, n_in]`` that needs no gradient, in the floats of `x`."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            ctx.save_for_backward(weight)
            parts = [
                torch.nn.functional.linear(x, weight[rows].to(x.dtype), None if bias is None else bias[rows])
                for rows in _chunks(weight)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
            (weight,), (gradient,) = ctx.saved_tensors, gradients
            parts = (gradient[..., rows] @ weight[rows].to(gradient.dtype) for rows in _chunks(weight))
            total = next(parts)
            for part in parts:
                total += part
            return total, None, None

    class HeldLinear(torch.nn.Linear):
        """A Linear layer whose weight is held in 16 bits; `weight` is a widened copy."""

        def __init__(self, layer: torch.nn.Linear) -> None:
            torch.nn.Module.__init__(self)  # nn.Linear would make a weight
            self.in_features, self.out_features = layer.in_features, layer.out_features
            self.held, self.bias = layer.weight.data, layer.bias

        @property
        def weight(self) -> torch.Tensor:  # type: ignore[override]
            return self.held.float()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = _Product.apply(x, self.held, self.bias)  # type: ignore[no-untyped-call]
            return found

    class HeldEmbedding(torch.nn.Embedding):
        """An Embedding layer whose weight is held in 16 bits; `weight` is a widened copy."""

        def __init__(self, layer: torch.nn.Embedding) -> None:
            torch.nn.Module.__init__(self)
            self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
            self.padding_idx, self.max_norm, self.norm_type = layer.padding_idx, None, 2.0
            self.scale_grad_by_freq, self.sparse, self.held = False, False, layer.weight.data

        @property
        def weight(self) -> torch.Tensor:  # type: ignore[override]
            return self.held.float()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.embedding(ids, self.held).float()

    return {torch.nn.Linear: HeldLinear, torch.nn.Embedding: HeldEmbedding}


class FilePages:
    """The pages of files that a model's weights lie in; none but on Linux.

    Pages of a layer that was replaced stay in memory as long as any other weight of the file is used: twice the memory
    that the model needs.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        uses = Counter(id(weight) for part in model.modules() for weight in part.parameters(recurse=False))
        self._shared = {key for key, count in uses.items() if count > 1}
        self._mapped = _private_files() if sys.platform == "linux" else []

    def release(self, weight: torch.Tensor) -> None:
        """Give back the whole pages of `weight`, which nothing uses any more, if they are a file's and not shared."""
        if id(weight) not in self._shared:
            self._give_back(weight)

    def release_frozen(self) -> None:
        """Give back those of every weight that is not trained; used again, it is read from the file."""
        for part in self._model.modules():
            held = [part.held] if hasattr(part, "held") else []
            for weight in [*held, *part.parameters(recurse=False)]:
                if not weight.requires_grad:
                    self._give_back(weight)

    def _give_back(self, weight: torch.Tensor) -> None:
        start = weight.data_ptr()
        if any(start in place for place in self._mapped):
            first, last = -(-start // mmap.PAGESIZE), (start + weight.nbytes) // mmap.PAGESIZE
            if last > first:
                call = ctypes.CDLL(None).madvise
                call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
                call(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, mmap.MADV_DONTNEED)


def _private_files() -> list[range]:
    """Return the addresses of files that this process maps for itself, and could write to, as weights are."""
    found = []
    for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
        addresses, access, _, _, inode, *_ = line.split(maxsplit=5)
        if access == "rw-p" and inode != "0":
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append(range(start, end))
    return found
