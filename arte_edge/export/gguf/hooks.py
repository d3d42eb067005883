"""Watch what flows into a transformers model's linear layers, under the names llama.cpp has for them.

A converter may permute, fuse or offset a weight's *rows*; the columns stay as they are,
and the columns are what the inputs multiply. So the sums need no conversion, and a test
holds that for every family. Only matrices inside the blocks count, as in llama-imatrix:
the output matrix is left out (tied, it is also the embedding).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import ArteError, InputError
from arte_edge.models.gguf_layout import Layout, checkpoint_family, read_config

if TYPE_CHECKING:
    import torch

__all__ = ["Sums", "linear_names", "watched"]

Sums = dict[str, NDArray[np.float64]]


def linear_names(model: torch.nn.Module, checkpoint: Path) -> dict[str, str]:
    """Return module name -> GGUF tensor name of every linear layer inside a block.

    Raises:
        InputError: a family whose names we do not know, or a block with weights that are no
            plain linear layers (a mixture of experts).
    """
    import torch

    layout = _layout(checkpoint)
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or not name.endswith(".weight"):
            continue
        found = layout.gguf_name(name)
        if found is None or not found.startswith("blk."):
            continue
        module = name.removesuffix(".weight")
        if not isinstance(model.get_submodule(module), torch.nn.Linear):
            raise InputError(f"{checkpoint}: {name} is no plain linear layer", _OTHERS)
        names[module] = found
    if not names or len(set(names.values())) != len(names):
        raise InputError(f"{checkpoint}: its layers have names that llama.cpp's table does not hold", _OTHERS)
    return names


_OTHERS = "Make the importance matrix with llama.cpp's own llama-imatrix from the F16 file."


def _layout(checkpoint: Path) -> Layout:
    """Return the names of the checkpoint's family; head counts do not matter for columns."""
    config = read_config(checkpoint)
    try:
        arch = checkpoint_family(checkpoint)
        return Layout(arch, int(config["num_hidden_layers"]), 0, 0)
    except InputError as error:
        raise InputError(error.message, f"{error.hint} {_OTHERS}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{checkpoint / 'config.json'}: num_hidden_layers is missing", "Give a whole checkpoint."
        ) from error


@contextmanager
def watched(model: torch.nn.Module, names: dict[str, str], sums: Sums) -> Iterator[None]:
    """Add each input column's sum of squares over all tokens to ``sums[GGUF name]`` ``[n_in]`` while inside."""
    import torch

    def hook(name: str) -> Any:
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            columns = inputs[0].detach().flatten(0, -2).float()
            squares = columns.square().sum(dim=0, dtype=torch.float64).cpu().numpy()
            if not np.isfinite(squares).all():
                raise ArteError(
                    f"{name}: its inputs are not finite",
                    "The checkpoint is damaged or its training diverged.",
                )
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    handles = [
        model.get_submodule(module).register_forward_pre_hook(hook(name)) for module, name in names.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
