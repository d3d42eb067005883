"""A model that is on this machine, by whatever name it was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from arte_edge.cache import Progress

__all__ = ["LocalModel"]


@dataclass(frozen=True)
class LocalModel:
    """A GGUF file or a checkpoint folder, verified, with the identity that runs are keyed on.

    Exactly one of `gguf` and `folder` is set. `sha256` is that of the GGUF file, or
    one sum over a checkpoint's weights, configuration and tokenizer. `quantization`
    is "Q4_K_M" and the like for a GGUF, the weights' type ("BF16") for a checkpoint.
    """

    name: str
    sha256: str
    gguf: Path | None
    folder: Path | None
    quantization: str

    def __post_init__(self) -> None:
        if (self.gguf is None) == (self.folder is None):
            raise ValueError("a model is either a GGUF file or a checkpoint folder")

    def checkpoint(self, progress: Progress | None = None) -> Path:
        """Return a safetensors folder with these weights; a GGUF is converted once and kept.

        Raises:
            ArteError: the packages for it are missing, or the disk is full.
            InputError: an architecture that transformers cannot read from GGUF.
        """
        if self.gguf is None:
            return cast(Path, self.folder)
        from arte_edge.gguf.to_hf import to_checkpoint

        return to_checkpoint(self.name, self.gguf, self.sha256, progress)
