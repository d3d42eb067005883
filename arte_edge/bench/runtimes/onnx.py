"""A plain ONNX folder under the clock, in onnxruntime with buffers of ours.

The graph computes logits for every token it reads, whoever needs them: that belongs to its rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arte_edge.bench.runtime import RuntimeFacts
from arte_edge.errors import InputError
from arte_edge.runtimes.onnxruntime import OnnxSession

__all__ = ["OnnxSpeedModel"]


class OnnxSpeedModel:
    """`SpeedModel` of a folder that `arte_edge.runtimes.onnxruntime` opens."""

    def __init__(self, folder: Path, threads: int, context_tokens: int) -> None:
        """Load the folder.

        Raises:
            InputError: no model that can be run, or it was made for fewer tokens.
            ArteError: onnxruntime is not installed.
        """
        self._session = OnnxSession(folder, threads)
        limit = self._session.context_length
        if 0 < limit < context_tokens:
            raise InputError(
                f"{folder.name} was made for {limit} tokens, the test needs {context_tokens}",
                "Lower -p, -n or -d.",
            )
        import onnxruntime

        self.facts = RuntimeFacts(
            runtime=f"onnxruntime {onnxruntime.__version__}",
            build=" ".join(onnxruntime.get_build_info().split()),
        )
        self.n_vocab = self._session.n_vocab
        self.context_tokens = context_tokens

    def clear(self) -> None:
        self._session.reset()

    def read(self, tokens: Sequence[int]) -> int:
        return int(self._session.step(tokens)[-1].argmax())

    def step(self, token: int) -> None:
        self._session.step((token,))

    def close(self) -> None:
        self._session.close()
