"""An ONNX folder, opened in plain onnxruntime: the layout that optimum writes and transformers.js reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arte_edge.runtimes.onnxruntime import FolderText, OnnxSession, check_files, onnx_precision
from arte_edge.runtimes.prompt_render import Message
from arte_edge.verify.opened import Memo, rendered

__all__ = ["OnnxModel", "until_stop"]


class OnnxModel:
    """`Opened` for a folder with one ONNX decoder."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        """Check the folder's files and load the model.

        Raises:
            InputError: a file is missing, cut short, or no decoder that we can run.
            ArteError: onnxruntime is not installed.
        """
        check_files(folder)
        self._session = OnnxSession(folder, threads)
        import onnxruntime

        text = FolderText(folder)
        self.name = folder.resolve().name
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self.quantization = onnx_precision(folder)
        self.chat_template = text.chat_template
        self.special_tokens = text.special_tokens
        self.added_tokens = tuple(text.added.values())
        self.eos_tokens = self.stop_tokens = self._session.stop_tokens
        self.n_vocab = self._session.n_vocab
        self.context_tokens = self._session.context_length or 2**31
        self._added = text.added
        self._memo = Memo(self._write)

    def tokens(self, text: str) -> list[int]:
        return self._session.tokenizer.tokens(text)

    def token_text(self, token: int) -> str:
        return self._added.get(token) or self._session.tokenizer.text([token], special=True) or f"[{token}]"

    def file_tokens(self, text: str) -> None:
        return None

    def words(self) -> list[str]:
        texts = (self._session.tokenizer.text([token]) for token in range(self.n_vocab))
        return [text for text in texts if text and "\ufffd" not in text]

    def render(self, messages: Sequence[Message]) -> str | None:
        return rendered(self, messages)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return self._session.logits(ids)

    def generate(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        return self._memo(prompts, max_tokens, stop)

    def _write(self, prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        return [self._one(prompt, max_tokens, stop) for prompt in prompts]

    def _one(self, prompt: str, max_tokens: int, stop: tuple[str, ...]) -> str:
        self._session.reset()
        tokenizer, written = self._session.tokenizer, list[int]()
        for token in self._session.write(self.tokens(prompt), max_tokens):
            written.append(token)
            if (cut := until_stop(tokenizer.text(written), stop)) is not None:
                return cut
        return tokenizer.text(written)

    def close(self) -> None:
        self._session.close()


def until_stop(text: str, stop: Sequence[str]) -> str | None:
    """Return `text` up to and with the first stop string in it, None if there is none."""
    found = [(at, s) for s in stop if (at := text.find(s)) >= 0]
    if not found:
        return None
    at, first = min(found)
    return text[: at + len(first)]
