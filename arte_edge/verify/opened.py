"""A model opened for comparison, whatever runtime is behind it: its tokens, template, stops, logits and text.

Each runtime gets the text as a user of that runtime gives it: tokenized by its own
tokenizer, rendered by its own chat template. That is the point: an export whose
weights are right and whose tokenizer is not is broken all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import InputError
from arte_edge.runtimes.completion import Engine
from arte_edge.runtimes.prompt_render import Message, render

__all__ = ["Memo", "Opened", "open_model", "rendered"]


class Opened(Protocol):
    """What the gate asks of a model. n tokens of input, v vocabulary size."""

    @property
    def name(self) -> str:
        """The file's or folder's name, without the path to it."""

    @property
    def runtime(self) -> str:
        """What runs it, with its version."""

    @property
    def quantization(self) -> str:
        """``Q4_K_M``, ``BF16``, ``int4`` and the like; empty if the file does not say."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the model's own chat template, or None."""

    @property
    def special_tokens(self) -> dict[str, str]:
        """``bos_token`` and ``eos_token`` as text, for the template."""

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """Tokens that stand beside the learned vocabulary, in the order of their ids."""

    @property
    def eos_tokens(self) -> frozenset[int]:
        """Ids that the model's own files declare to end a text."""

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Ids at which the runtime ends a generation: the declared ones, and those it knows by their names."""

    @property
    def n_vocab(self) -> int: ...

    @property
    def context_tokens(self) -> int: ...

    def tokens(self, text: str) -> list[int]:
        """Return the ids of a prompt: special tokens parsed, BOS in front if the model adds one."""

    def token_text(self, token: int) -> str:
        """Return one token as text for a message; never raises for an id out of range."""

    def file_tokens(self, text: str) -> list[int] | None:
        """Return the ids that the model's tokenizer file means, where the runtime reads it with code of its own.

        None where there is no second reading to compare with.
        """

    def words(self) -> list[str]:
        """Return the text of each token that is text by itself (not half a character), added ones left out."""

    def render(self, messages: Sequence[Message]) -> str | None:
        """Return the prompt that the model's own chat template makes, None without a template.

        Raises:
            InputError: the template does not render these messages.
        """

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the next-token logits ``[n, v]`` after each of `ids`."""

    def generate(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Return what the model writes greedily after each prompt, a stop string included."""

    def close(self) -> None: ...


def open_model(path: Path, threads: int | None = None) -> Opened:
    """Open a checkpoint folder, a GGUF file, an onnxruntime-genai folder or a plain ONNX folder.

    Args:
        path: the file or folder.
        threads: of the runtime; None takes ``ARTE_EDGE_THREADS`` or every core this process may use.

    Raises:
        InputError: nothing there, damaged, or no model that we can open.
        ArteError: the runtime for it is not installed.
    """
    if path.is_file():
        from arte_edge.bench.runtimes.open import choose_runtime

        if choose_runtime(path) == "xllamacpp":
            from arte_edge.bench.runtimes.xllamacpp import XllamaTextModel

            return cast(Opened, XllamaTextModel(path, threads))
        from arte_edge.verify.gguf_model import GgufModel

        return GgufModel(path, threads)
    if (path / "genai_config.json").is_file():
        from arte_edge.verify.genai_model import GenaiModel

        return GenaiModel(path)
    if any(path.glob("*.onnx")) or any(path.glob("onnx/*.onnx")):
        from arte_edge.verify.onnx_model import OnnxModel

        return OnnxModel(path, threads)
    if (path / "config.json").is_file():
        from arte_edge.verify.hf_model import HfModel

        return HfModel(path)
    if path.is_dir() and len(ggufs := sorted(path.glob("*.gguf"))) == 1:
        return open_model(ggufs[0], threads)
    raise InputError(
        f"{path}: no model that can be verified",
        "Give a .gguf file, a checkpoint folder (config.json), or a folder with an ONNX model.",
    )


def rendered(model: Opened, messages: Sequence[Message]) -> str | None:
    """Render with the model's own template in the house's sandbox; see `Opened.render`."""
    if model.chat_template is None:
        return None
    # Of an engine the renderer reads the template and the special tokens, and a model has both.
    return render(cast(Engine, model), messages)


class Memo:
    """Remembers what was written: one reference is compared with many artifacts, and greedy text repeats."""

    def __init__(self, write: Callable[[list[str], int, tuple[str, ...]], list[str]]) -> None:
        self._write = write
        self._known: dict[tuple[str, int, tuple[str, ...]], str] = {}

    def __call__(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str]) -> list[str]:
        keys = [(prompt, max_tokens, tuple(stop)) for prompt in prompts]
        if new := [key for key in dict.fromkeys(keys) if key not in self._known]:
            texts = self._write([key[0] for key in new], max_tokens, tuple(stop))
            self._known.update(zip(new, texts, strict=True))
        return [self._known[key] for key in keys]
