"""A checkpoint folder in transformers on the CPU: the reference that exported files are compared with.

Its 16-bit weights are computed in 32 bits, so the reference adds no rounding of its own and what is measured is
the artifact's. That takes four bytes a parameter; for a model that does not fit, the F16 GGUF file of the same
weights can be the reference. In a benchmark it shows how much faster the exported files are.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.onnx.files import FileTokenizer
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.prompt_render import Conversation
from arte_edge.runtimes.protocol import BaseRuntime, Rendered, RuntimeFacts, check_context, readable, until_stop
from arte_edge.runtimes.transformers.model import State, TransformersEngine

_BATCH = 16  # conversations that the pipeline answers together


class TransformersRuntime(BaseRuntime):
    """`Runtime` of a checkpoint folder."""

    def __init__(self, folder: Path, threads: int | None = None, context_tokens: int = 0) -> None:
        """Load the checkpoint; `context_tokens` is the room that a benchmark needs in the cache.

        Raises InputError: not a checkpoint that transformers loads, or it was made for fewer tokens;
        ArteError: torch or transformers is not installed.
        """
        self._engine = engine = TransformersEngine(folder, sha256="", device="cpu")  # a GPU would take 16 bits
        import torch

        if threads:
            torch.set_num_threads(threads)
        check_context(folder.name, engine.context_tokens, context_tokens)
        self._folder = folder
        self._state: State | None = None
        self.name = folder.resolve().name
        self.chat_template = engine.chat_template
        self.special_tokens = engine.special_tokens
        self.n_vocab = int(engine.model.config.get_text_config().vocab_size)
        self.context_tokens: int = context_tokens or engine.context_tokens
        self.facts = RuntimeFacts(
            runtime=engine.identity.runtime, build=f"{engine.identity.quantization}, {torch.get_num_threads()} threads"
        )
        self.tokenizer_class = f"tokenizer_class {engine.text.class_name}"
        self.eos_tokens = engine.text.declared_ends
        self.stop_tokens = engine.text.ends

    @cached_property
    def quantization(self) -> str:
        from arte_edge.models.resolve import from_folder

        return from_folder(self._folder).quantization

    def clear(self) -> None:
        self._state = None

    def prefill(self, tokens: Sequence[int]) -> int:
        """See `Decoder.prefill`; only a prompt into an empty cache goes without logits of every token."""
        if self._state is None:
            logits, self._state = self._engine.forward.prefill([list(tokens)], 0)
            return int(logits[0].argmax())
        return int(self._engine.forward.extend(self._state, [list(tokens)])[0, -1].argmax())

    def step(self, token: int) -> None:
        if self._state is None:
            self._state = self._engine.forward.prefill([[token]], 0)[1]
        else:
            self._engine.forward.step(self._state, [token])

    @property
    def added_tokens(self) -> tuple[str, ...]:
        return self._engine.text.added_tokens

    def tokenize(self, text: str) -> list[int]:
        return self._engine.text.tokens(text)

    @cached_property
    def _file_tokenizer(self) -> FileTokenizer | None:
        return FileTokenizer(self._folder) if (self._folder / "tokenizer.json").is_file() else None

    def file_tokens(self, text: str) -> list[int] | None:
        """See `Runtime.file_tokens`: some classes of transformers replace the pre-tokenizer of the file."""
        return None if self._file_tokenizer is None else self._file_tokenizer.tokens(text)

    def token_text(self, token: int) -> str:
        return self._engine.text.token_text(token) or f"[{token}]"

    def vocabulary(self) -> list[str]:
        return readable(self._engine.text.vocabulary())

    def renderings(self, conversations: Sequence[Conversation]) -> list[Rendered]:
        return [Rendered.by(self.facts.runtime, self._engine.text.apply_template, conversations)]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        forward = self._engine.forward
        values: NDArray[np.float32] = forward.extend(forward.empty(), [list(ids)])[0].cpu().numpy()
        return values

    def _generate(self, prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        sampling = Sampling(max_tokens=max_tokens, stop=stop)
        return [done.text for done in self._engine.complete([Request(p) for p in prompts], sampling)]

    def _chat(self, conversations: list[list[dict[str, str]]], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        stops = {"stop_sequence": list(stop)} if stop else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings of sampling in the checkpoint, which greedy text does not use
            answers = self._pipeline(
                conversations,
                batch_size=_BATCH,
                max_new_tokens=max_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                return_full_text=False,
                **stops,
            )
        texts = [str(answer[0]["generated_text"]) for answer in answers]
        return [until_stop(text, stop) or text for text in texts]

    @cached_property
    def _pipeline(self) -> Any:
        """The pipeline that transformers' users give messages to; shorter prompts are padded in front."""
        from transformers import pipeline

        from arte_edge.transformers_load import load_tokenizer

        tokenizer = load_tokenizer(self._folder)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model = self._engine.model
        return pipeline("text-generation", model=model, tokenizer=tokenizer, device=model.device)

    def close(self) -> None:
        vars(self).pop("_pipeline", None)
        self._engine.close()
