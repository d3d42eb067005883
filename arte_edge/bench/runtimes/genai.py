"""A folder for onnxruntime-genai under the clock, in that runtime.

A token is appended and its logits are computed; the runtime's own sampling is left out, as with GGUF.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arte_edge.bench.runtime import RuntimeFacts
from arte_edge.errors import EngineError, InputError
from arte_edge.onnx.tokenizer import read_json
from arte_edge.runtimes.onnxruntime import check_files

__all__ = ["GenaiSpeedModel"]


class GenaiSpeedModel:
    """`SpeedModel` of a folder with genai_config.json."""

    def __init__(self, folder: Path, threads: int, context_tokens: int) -> None:
        """Load the folder.

        Raises:
            InputError: a file is missing or cut short, or it was made for fewer tokens.
            EngineError: onnxruntime-genai is not installed.
        """
        try:
            import onnxruntime_genai as runtime
        except ImportError as error:
            raise EngineError(
                "onnxruntime-genai is not installed", "pip install 'arte-edge[onnx]'"
            ) from error
        check_files(folder)
        told = read_json(folder / "genai_config.json").get("model", {})
        limit = int(told.get("context_length", 0))
        if 0 < limit < context_tokens:
            raise InputError(
                f"{folder.name} was made for {limit} tokens, the test needs {context_tokens}",
                "Lower -p, -n or -d.",
            )
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        self._runtime: Any = runtime
        try:
            config = runtime.Config(str(folder))
            config.overlay(json.dumps(options))
            self._model: Any = runtime.Model(config)
            self._generator: Any = self._new(context_tokens)
        except Exception as error:  # the runtime's exceptions share no public base class
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(
                f"{folder.name}: onnxruntime-genai {runtime.__version__} cannot load this folder: {first}",
                "It may be cut short or made for a newer runtime: export or copy it again.",
            ) from error
        self.facts = RuntimeFacts(
            runtime=f"onnxruntime-genai {runtime.__version__}", build=f"device {self._model.device_type}"
        )
        self.n_vocab = int(told.get("vocab_size", 0))
        self.context_tokens = context_tokens

    def clear(self) -> None:
        """Take the cache back to its beginning; the buffers stay."""
        if self._generator.token_count():
            self._generator.rewind_to(0)

    def read(self, tokens: Sequence[int]) -> int:
        self._generator.append_tokens(np.asarray(tokens, dtype=np.int32))
        return int(np.asarray(self._generator.get_logits()).reshape(-1)[-self.n_vocab :].argmax())

    def step(self, token: int) -> None:
        self._generator.append_tokens(np.asarray((token,), dtype=np.int32))

    def close(self) -> None:
        """Give the memory back; the model cannot be used afterwards."""
        vars(self).pop("_generator", None)
        vars(self).pop("_model", None)

    def _new(self, context_tokens: int) -> Any:
        params = self._runtime.GeneratorParams(self._model)
        params.set_search_options(max_length=context_tokens, do_sample=False)
        return self._runtime.Generator(self._model, params)
