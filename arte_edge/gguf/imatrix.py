"""Importance matrices: which input columns of each weight matrix matter for given prompts.

Quantization rounds a weight with an error; the effect of the error grows with the square of the input that it is
multiplied with. The mean square of every input column, over the prompts that the student was tailored to, shows the
quantizer where to be exact. Prompts are run through the checkpoint one by one in 32 bits.

A converter may permute, fuse or offset a weight's *rows*; the columns stay, and the columns are what the inputs
multiply. So the sums need no conversion, and a test verifies that for every family. Only matrices inside the blocks
count, as in llama-imatrix: the output matrix is left out (tied, it is also the embedding).

The file has the GGUF form of llama.cpp's tools. For every weight matrix two F32 tensors: ``NAME.in_sum2`` is the sum,
over all tokens, of each input column's squared value, ``NAME.counts`` the number of tokens. ``llama-quantize`` divides
one by the other (llama.cpp, tools/imatrix and common/imatrix-loader.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.cache import Progress, sha256_checkpoint
from arte_edge.checkpoint import read_config
from arte_edge.errors import ArteError, InputError
from arte_edge.extras import need
from arte_edge.gguf.names import Layout, checkpoint_family
from arte_edge.gguf.reader import ARRAY, STRING, UINT32, Field, read_header
from arte_edge.gguf.writer import Tensor, write_gguf
from arte_edge.store import content_key
from arte_edge.transformers_load import load_model, load_tokenizer

if TYPE_CHECKING:
    import torch

Sums = dict[str, NDArray[np.float64]]
CHUNK_TOKENS = 512  # llama-imatrix's own default; it counts tokens in chunks of this many
_SUMS, _COUNTS = ".in_sum2", ".counts"
_KEY = "arte_edge.imatrix.key"
_VERSION = 1  # raised when the same prompts would give other sums
_WINDOW_TOKENS = 2048  # a longer prompt is run in pieces: activations of one piece are in memory


@dataclass(frozen=True)
class Imatrix:
    """Sums of squares ``[n_in]`` over `n_token` tokens by GGUF tensor name; `key` identifies checkpoint and prompts."""

    sums: Mapping[str, NDArray[np.float32]] = field(repr=False)
    n_token: int
    dataset: str = "training prompts"
    key: str = ""

    @property
    def chunk_count(self) -> int:
        return max(self.n_token // CHUNK_TOKENS, 1)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Return mean squares ``[n_in]``, as llama.cpp's quantizer takes them."""
        count = np.float32(self.n_token)
        return {name: np.ascontiguousarray(sums / count, np.float32) for name, sums in self.sums.items()}


def collect(
    checkpoint: Path,
    prompts: Sequence[str],
    out: Path,
    *,
    dataset: str = "training prompts",
    progress: Progress | None = None,
) -> Path:
    """Write the importance matrix of the model in the folder `checkpoint` over `prompts` to `out`; return `out`.

    A finished `out` of the same checkpoint and prompts is reused.

    Args:
        prompts: rendered texts, special tokens included, as the model will get them. Never the test split.
        dataset: the source of the prompts, written into the file.
        progress: called with ("importance matrix", prompts done, prompts in all).

    Raises:
        InputError: no prompts, or a checkpoint of an unknown family.
        ArteError: a package is missing, activations are not finite, or the disk is full.
    """
    if not any(prompts):
        hint = "Give the texts that the student was trained on."
        raise InputError("An importance matrix needs prompts", hint)
    for extra in ("train", "gguf"):
        need(extra, "Collecting an importance matrix")
    key = content_key("imatrix", _VERSION, sha256_checkpoint(checkpoint), dataset, list(prompts))
    if _is_finished(out, key):
        return out
    import torch

    model, tokenizer = load_model(checkpoint, torch.float32).eval(), load_tokenizer(checkpoint)
    sums: Sums = {}
    n_token = 0
    with torch.inference_mode(), _watched(model, linear_names(model, checkpoint), sums):
        for number, prompt in enumerate(prompts, 1):
            ids = _token_ids(tokenizer, prompt)
            for start in range(0, len(ids), _WINDOW_TOKENS):
                # The output matrix is left out, and its logits would be the largest array in memory.
                model.base_model(torch.tensor([ids[start : start + _WINDOW_TOKENS]]), use_cache=False)
            n_token += len(ids)
            if progress:
                progress("importance matrix", number, len(prompts))
    rows = {name: values.astype(np.float32) for name, values in sums.items()}
    return write_imatrix(Imatrix(rows, n_token, dataset, key), out)


def _token_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the ids of a prompt; the begin token is added if the tokenizer does so and the prompt has none."""
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    begin = tokenizer.bos_token
    if begin and not prompt.startswith(begin) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return [tokenizer.bos_token_id, *ids]
    return ids


def _is_finished(out: Path, key: str) -> bool:
    try:
        return out.is_file() and read_imatrix(out).key == key
    except InputError:
        return False


def linear_names(model: torch.nn.Module, checkpoint: Path) -> dict[str, str]:
    """Return module name -> GGUF tensor name of every linear layer inside a block.

    Raises:
        InputError: an unknown family, or a block with weights that are not
            plain linear layers (a mixture of experts).
    """
    import torch

    n_layer = int(read_config(checkpoint).get("num_hidden_layers") or 0)
    layout = Layout(checkpoint_family(checkpoint), n_layer, 0, 0)  # head counts have no effect on columns
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or not name.endswith(".weight"):
            continue
        found = layout.gguf_name(name)
        if found is None or not found.startswith("blk."):
            continue
        module = name.removesuffix(".weight")
        if not isinstance(model.get_submodule(module), torch.nn.Linear):
            raise InputError(f"{checkpoint}: {name} is not a plain linear layer", _OTHERS)
        names[module] = found
    if not names or len(set(names.values())) != len(names):
        raise InputError(f"{checkpoint}: the names of its layers are not in llama.cpp's table", _OTHERS)
    return names


_OTHERS = "Make the importance matrix with llama.cpp's own llama-imatrix from the F16 file."


@contextmanager
def _watched(model: torch.nn.Module, names: dict[str, str], sums: Sums) -> Iterator[None]:
    """Add each input column's sum of squares over all tokens to ``sums[GGUF name]`` ``[n_in]`` while inside."""
    import torch

    def hook(name: str) -> Any:
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            columns = inputs[0].detach().flatten(0, -2).float()
            squares = columns.square().sum(dim=0, dtype=torch.float64).cpu().numpy()
            if not np.isfinite(squares).all():
                hint = "The checkpoint is damaged or its training diverged."
                raise ArteError(f"{name}: its inputs are not finite", hint)
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    modules = [(model.get_submodule(module), name) for module, name in names.items()]
    handles = [module.register_forward_pre_hook(hook(name)) for module, name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix that `write_imatrix` wrote.

    Raises InputError: it is none, damaged, or holds values that are not finite.
    """
    header = read_header(path)
    names = [name.removesuffix(_SUMS) for name in header.tensors if name.endswith(_SUMS)]
    if header.metadata.get("general.type") != "imatrix" or not names:
        raise InputError(f"{path}: not an importance matrix in GGUF form", "Remove it: it is collected again.")
    sums = {name: header.floats(name + _SUMS).ravel() for name in names}
    n_token = float(header.floats(names[0] + _COUNTS).sum())
    if not (0 < n_token < 1 << 62) or not all(np.isfinite(values).all() for values in sums.values()):
        raise InputError(f"{path}: holds values that are not finite", "Remove it: it is collected again.")
    dataset = header.metadata.get("imatrix.datasets")
    name = str(dataset[0]) if isinstance(dataset, list) and dataset else ""
    return Imatrix(sums, int(n_token), name, str(header.metadata.get(_KEY, "")))


def write_imatrix(imatrix: Imatrix, out: Path) -> Path:
    """Write `imatrix` to `out`, whole or not at all; the same matrix gives the same bytes. Return `out`.

    Raises ArteError: the disk is full or not writable.
    """
    fields = {
        "general.type": Field(STRING, "imatrix"),
        "imatrix.datasets": Field(ARRAY, [imatrix.dataset], STRING),
        "imatrix.chunk_count": Field(UINT32, imatrix.chunk_count),
        "imatrix.chunk_size": Field(UINT32, CHUNK_TOKENS),
        _KEY: Field(STRING, imatrix.key),
    }
    counts = np.full((1, 1), imatrix.n_token, np.float32)
    tensors = [
        Tensor(name + part, values.shape, "F32", partial(np.asarray, values))
        for name in sorted(imatrix.sums)
        for part, values in ((_SUMS, imatrix.sums[name][None, :]), (_COUNTS, counts))
    ]
    # No architecture: llama.cpp writes none, a matrix is no model.
    return write_gguf(out, "", fields, tensors)
