"""A checkpoint folder under the clock, in transformers on the CPU, in 32 bits.

For comparison, where torch is installed: how much faster the exported files are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from arte_edge.bench.runtime import RuntimeFacts
from arte_edge.errors import InputError
from arte_edge.runtimes.transformers.model import TransformersEngine

if TYPE_CHECKING:
    from arte_edge.runtimes.transformers.model import State

__all__ = ["HfSpeedModel"]


class HfSpeedModel(TransformersEngine):
    """`SpeedModel` of a checkpoint folder."""

    def __init__(self, folder: Path, threads: int, context_tokens: int) -> None:
        """Load the checkpoint.

        Raises:
            InputError: not a checkpoint that transformers loads, or it was made for fewer tokens.
            ArteError: torch or transformers is not installed.
        """
        super().__init__(folder, sha256="", device="cpu")
        import torch

        torch.set_num_threads(threads)
        if context_tokens > self._context:
            raise InputError(
                f"{folder.name} was made for {self._context} tokens, the test needs {context_tokens}",
                "Lower -p, -n or -d.",
            )
        self.facts = RuntimeFacts(
            runtime=self.identity.runtime, build=f"{self.identity.quantization}, {threads} threads"
        )
        self.n_vocab = int(self._model.config.get_text_config().vocab_size)
        self.context_tokens = context_tokens
        self._state: State | None = None

    def clear(self) -> None:
        self._state = None

    def read(self, tokens: Sequence[int]) -> int:
        """See `SpeedModel.read`; only a prompt into an empty cache goes without logits of every token."""
        if self._state is None:
            logits, self._state = self._forward.prefill([list(tokens)], 0)
            return int(logits[0].argmax())
        return int(self._forward.extend(self._state, [list(tokens)])[0, -1].argmax())

    def step(self, token: int) -> None:
        if self._state is None:
            self._state = self._forward.prefill([[token]], 0)[1]
        else:
            self._forward.step(self._state, [token])
