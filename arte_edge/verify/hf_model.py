"""A transformers checkpoint, opened as a reference: its 16-bit weights, computed in 32 bits on the CPU.

In 32 bits the reference adds no rounding of its own, so what is measured is the
artifact's. It costs four bytes a parameter; for a model that does not fit, the F16
GGUF file of the same weights can stand in as the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.prompt_render import Message
from arte_edge.runtimes.transformers.model import TransformersEngine
from arte_edge.verify.opened import Memo, rendered

__all__ = ["HfModel"]


class _Engine(TransformersEngine):
    """The house's engine, with the logits of every position."""

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        import torch

        from arte_edge.runtimes.transformers.model import State

        state = State(None, torch.ones((1, 0), dtype=torch.long, device=self._device))
        values: NDArray[np.float32] = self._forward.extend(state, [list(ids)])[0].cpu().numpy()
        return values

    def declared_ends(self) -> list[int]:
        ends = self._model.generation_config.eos_token_id
        return [ends] if isinstance(ends, int) else list(ends or ())

    @property
    def n_vocab(self) -> int:
        return int(self._model.config.get_text_config().vocab_size)

    @property
    def context_tokens(self) -> int:
        return self._context


class HfModel:
    """`Opened` for a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        """Load the checkpoint.

        Raises:
            InputError: not a checkpoint that transformers loads without running its code.
            ArteError: torch or transformers is not installed.
        """
        self._engine = _Engine(folder, sha256="", device="cpu")  # on a GPU the engine would take 16 bits
        from transformers import AutoTokenizer

        from arte_edge.runtimes.transformers.tokenizer import Text

        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        ends = self._engine.declared_ends()
        self._text = Text(self._tokenizer, ends)
        eos = self._tokenizer.eos_token_id
        self.eos_tokens = frozenset(ends) | frozenset([] if eos is None else [eos])
        self.stop_tokens = self._text.ends
        self.name = folder.resolve().name
        self.runtime = self._engine.identity.runtime
        self.quantization = _weights_type(folder)
        self.chat_template = self._engine.chat_template
        self.special_tokens = self._engine.special_tokens
        self.n_vocab = self._engine.n_vocab
        self.context_tokens = self._engine.context_tokens
        self._memo = Memo(self._write)

    @cached_property
    def added_tokens(self) -> tuple[str, ...]:
        added: dict[str, int] = self._tokenizer.get_added_vocab()
        return tuple(sorted(added, key=added.__getitem__))

    def tokens(self, text: str) -> list[int]:
        return self._text.tokens(text)

    def token_text(self, token: int) -> str:
        found = self._tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(self._tokenizer) else None
        return str(found) if found else f"[{token}]"

    def file_tokens(self, text: str) -> None:
        return None

    def words(self) -> list[str]:
        n = self._tokenizer.vocab_size
        texts: list[str] = self._tokenizer.batch_decode(
            [[token] for token in range(n)], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [text for text in texts if text and "\ufffd" not in text]

    def render(self, messages: Sequence[Message]) -> str | None:
        return rendered(self, messages)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return self._engine.logits(ids)

    def generate(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        return self._memo(prompts, max_tokens, stop)

    def _write(self, prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        sampling = Sampling(max_tokens=max_tokens, stop=stop)
        return [done.text for done in self._engine.complete([Request(p) for p in prompts], sampling)]

    def close(self) -> None:
        self._engine.close()


def _weights_type(folder: Path) -> str:
    from arte_edge.models.resolve import from_folder

    return from_folder(folder).quantization
