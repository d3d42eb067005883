"""An importance matrix as a file, in the GGUF form that llama.cpp's tools write and read.

For every weight matrix two F32 tensors: ``NAME.in_sum2`` holds the sum, over all
tokens, of each input column's squared value, ``NAME.counts`` the number of tokens.
``llama-quantize`` divides one by the other. A mixture of experts has one row of each
for every expert (llama.cpp, tools/imatrix and common/imatrix-loader.cpp).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

import numpy as np
from numpy.typing import NDArray

from arte_edge.cache import whole_file
from arte_edge.errors import InputError
from arte_edge.export.gguf.tensor_table import read_table

__all__ = ["CHUNK_TOKENS", "Imatrix", "base_name", "read_imatrix", "write_imatrix"]

CHUNK_TOKENS = 512  # llama-imatrix's own default; it counts tokens in chunks of this many
_SUMS, _COUNTS = ".in_sum2", ".counts"
_KEY = "arte_edge.imatrix.key"


@dataclass(frozen=True)
class Imatrix:
    """Sums of squares ``[n_expert, n_in]`` and token counts ``[n_expert]`` by GGUF tensor name; n_expert is mostly 1.

    `key` identifies what the sums were made of; empty in a file of other tools.
    """

    sums: Mapping[str, NDArray[np.float32]] = field(repr=False)
    counts: Mapping[str, NDArray[np.float32]] = field(repr=False)
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    key: str = ""

    @property
    def n_token(self) -> int:
        return int(max((counts.max() for counts in self.counts.values()), default=0))

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Return mean squares, flat ``[n_expert * n_in]``, as llama.cpp's quantizer takes them.

        An expert that no token reached gets ones, as in ``llama-quantize``.
        """
        means = {}
        for name, sums in self.sums.items():
            counts = self.counts[name][:, None]
            mean = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
            means[name] = np.ascontiguousarray(mean, dtype=np.float32).ravel()
        return means


def base_name(name: str) -> str:
    """Return `name` without any folder, so that no path of this machine gets into a file."""
    return PureWindowsPath(name).name or "prompts"  # splits at both kinds of slashes


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix in GGUF form, ours or llama.cpp's.

    Raises:
        InputError: not one, damaged, or with values that are not finite.
    """
    table = read_table(path)
    names = [name.removesuffix(_SUMS) for name in table.tensors if name.endswith(_SUMS)]
    if table.metadata.get("general.type") != "imatrix" or not names:
        raise InputError(
            f"{path}: not an importance matrix in GGUF form",
            "An older one: llama-imatrix --in-file old.dat -o new.gguf",
        )
    sums, counts = {}, {}
    for name in names:
        counts[name] = table.floats(name + _COUNTS).ravel()
        values = table.floats(name + _SUMS)
        if not counts[name].size or values.size % counts[name].size or not values.size:
            raise InputError(f"{path}: sums and counts of {name} do not fit together")
        if not (np.isfinite(values).all() and np.isfinite(counts[name]).all() and counts[name].min() >= 0):
            raise InputError(f"{path}: {name} holds values that are not finite", "Collect the matrix again.")
        sums[name] = values.reshape(counts[name].size, -1)
    datasets = table.metadata.get("imatrix.datasets")
    chunks = table.metadata.get("imatrix.chunk_count")
    return Imatrix(
        sums,
        counts,
        tuple(map(str, datasets)) if isinstance(datasets, list) else (),
        chunks if isinstance(chunks, int) else 0,
        str(table.metadata.get(_KEY, "")),
    )


def write_imatrix(imatrix: Imatrix, out: Path) -> Path:
    """Write `imatrix` to `out`, whole or not at all; the same matrix gives the same bytes. Return `out`.

    Raises:
        ArteError: the disk is full or not writable.
    """
    with whole_file(out) as partial:
        _write(imatrix, partial)
    return out


def _write(imatrix: Imatrix, path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "")
    writer.kv_data[0].pop("general.architecture", None)  # llama.cpp writes none: a matrix is no model
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", [base_name(name) for name in imatrix.datasets or ("prompts",)])
    writer.add_uint32("imatrix.chunk_count", imatrix.chunk_count)
    writer.add_uint32("imatrix.chunk_size", CHUNK_TOKENS)
    if imatrix.key:
        writer.add_string(_KEY, imatrix.key)
    for name in sorted(imatrix.sums):
        counts = imatrix.counts[name].astype(np.float32).reshape(-1, 1)
        writer.add_tensor(name + _SUMS, imatrix.sums[name].astype(np.float32).reshape(counts.size, -1))
        writer.add_tensor(name + _COUNTS, counts)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.flush()
        for file in writer.fout or ():
            os.fsync(file.fileno())
    finally:
        writer.close()
