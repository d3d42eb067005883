"""The transformers engine: checkpoint folders (safetensors), on a GPU where there is one.

The module is not called `transformers`, so that nobody's import of the library finds
it. Adapters are merged into the weights on loading: one model to run, and the one
that is deployed. No code from a checkpoint is run, no pickles are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from arte_edge.engines import hf_tree
from arte_edge.engines.base import Completion, EngineIdentity, Request, Sampling
from arte_edge.engines.batching import plan, shared_prefix
from arte_edge.engines.choices import spans
from arte_edge.engines.chooser import Chooser
from arte_edge.engines.hf_load import adapter_sha256, load, pick_dtype, room_tokens
from arte_edge.engines.hf_pack import pack
from arte_edge.engines.hf_row import takes_rows
from arte_edge.engines.hf_write import write_rows
from arte_edge.engines.sampling import draw
from arte_edge.engines.tree import plan_groups
from arte_edge.errors import InputError
from arte_edge.extras import need

if TYPE_CHECKING:
    import torch

    from arte_edge.engines.hf_text import Writer

__all__ = ["TransformersEngine", "adapter_sha256"]

_COMPACT_BELOW = 0.75  # of a batch's rows still writing: then the finished ones leave its cache


class TransformersEngine:
    """An `Engine` over a checkpoint folder, optionally with a PEFT adapter folder."""

    supports_grammar = False

    def __init__(
        self,
        folder: Path,
        *,
        sha256: str,
        adapter: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int = 0,
    ) -> None:
        """Load the checkpoint as `dtype`: float32, bfloat16, or auto, which is bfloat16 on CUDA and else float32.

        ``ARTE_EDGE_DTYPE`` stands in for auto. `batch_tokens` bounds rows times length in one batch,
        prompts and answers together; 0: what the device has room for.

        Raises:
            InputError: not a checkpoint that transformers loads without running its code; no such dtype.
            ArteError: torch or transformers is not installed.
        """
        need("train", "Running checkpoint folders")
        import torch
        import transformers

        from arte_edge.engines.hf_forward import Forward
        from arte_edge.engines.hf_text import Text

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        kind = pick_dtype(dtype, self._device)
        self._model, tokenizer = load(folder, adapter, kind)
        self._model.to(self._device).eval()
        if self._device.type == "cpu":
            pack(self._model)
        self._text = Text(tokenizer, self._model.generation_config.eos_token_id)
        self._forward = Forward(self._model, self._device)
        self._batch_tokens = batch_tokens or room_tokens(self._model.config.get_text_config(), self._device)
        self._template: str | None = (
            tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
        )
        config = self._model.config.get_text_config()
        self._context: int = getattr(config, "max_position_embeddings", None) or 2**31
        # Padding between a prefix and its suffix would count against a sliding window.
        self._window: int = getattr(config, "sliding_window", None) or 2**31
        self.identity = EngineIdentity(
            kind="transformers",
            model=sha256,
            quantization=str(kind).removeprefix("torch."),
            adapter=adapter_sha256(adapter) if adapter else "",
            runtime=f"transformers {transformers.__version__}, torch {torch.__version__}",
        )

    @property
    def chat_template(self) -> str | None:
        return self._template

    @property
    def special_tokens(self) -> dict[str, str]:
        return {"bos_token": self._text.bos, "eos_token": self._text.eos}

    def count_tokens(self, text: str) -> int:
        return len(self._text.tokens(text))

    def close(self) -> None:
        """Free the model's memory; the engine cannot be used afterwards."""
        import torch

        vars(self).pop("_model", None)
        vars(self).pop("_forward", None)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine.complete`. A prompt too long for the model is a completion with finish "error".

        Raises:
            InputError: a grammar, which this engine does not take.
        """
        return self._complete(requests, sampling, share_all=False)

    def continue_shared(self, prefix: str, suffixes: Sequence[str], sampling: Sampling) -> list[Completion]:
        """See `Engine.continue_shared`. What is shared is found in the tokens, so the seam is exact."""
        return self._complete([Request(prefix + suffix) for suffix in suffixes], sampling, share_all=True)

    def choose(self, prefix: str, suffixes: Sequence[str], choices: Sequence[str]) -> NDArray[np.float64]:
        """Return log-probabilities ``[n_suffix, n_choice]``; see `choices.spans` for which tokens count.

        Raises:
            InputError: no prompt before the choices, or one too long for the model.
        """
        prompts = [prefix + suffix for suffix in suffixes]
        return np.array(self.choose_each(prompts, [choices] * len(prompts))).reshape(-1, len(choices))

    def choose_each(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]]
    ) -> list[NDArray[np.float64]]:
        """`choose` for prompts that each have choices of their own ``[n_choice]``: one batch for all of them."""
        choosers = [Chooser(self._text.tokens, p, own) for p, own in zip(prompts, choices, strict=True)]
        if not all(chooser.has_prompt for chooser in choosers):
            raise InputError("Choices need a prompt before them: a model scores no first token")
        longest = max((chooser.longest for chooser in choosers), default=0)
        if longest > self._context:
            raise InputError(f"A prompt of {longest} tokens exceeds the model's context of {self._context}")
        if not self._in_rows(longest):
            return [self._choose_plain(prompt, own) for prompt, own in zip(prompts, choices, strict=True)]
        trees = [tree for chooser in choosers for tree in chooser.trees(hf_tree.MOST_ROWS)]
        if trees:
            groups = plan_groups(trees, hf_tree.MOST_ROWS, hf_tree.MOST_ROWS)
            hf_tree.run_trees(self._model, self._device, groups)
        return [chooser.log_probabilities() for chooser in choosers]

    def _choose_plain(self, prompt: str, choices: Sequence[str]) -> NDArray[np.float64]:
        """Score choices ``[n_choice]`` by a row for each, for models that cannot be told a tree."""
        lists = [self._text.tokens(prompt + choice) for choice in choices]
        ranges = spans(lists, self._text.tokens(prompt))
        tails = [tokens[start:end] for tokens, (start, end) in zip(lists, ranges, strict=True)]
        scores: NDArray[np.float64] = self._score([lists[0][: ranges[0][0]]], 0, [tails])[0]
        return scores

    def _complete(self, requests: Sequence[Request], sampling: Sampling, share_all: bool) -> list[Completion]:
        if sampling.grammar:
            raise InputError("The transformers engine takes no grammar", "Use a GGUF of the model for that.")
        from arte_edge.engines.hf_text import Writer

        prompts = [self._text.tokens(request.prompt) for request in requests]
        new = sampling.max_tokens
        done: dict[int, Completion] = {}
        for i, tokens in enumerate(prompts):
            if not tokens or len(tokens) + new > self._context:
                why = f"exceed the model's context of {self._context} tokens" if tokens else "are empty"
                done[i] = Completion("", "error", error=f"prompt and answer {why}")
        todo = [i for i in range(len(requests)) if i not in done]
        rows = [prompts[i] for i in todo]
        if self._device.type == "cpu" and rows and self._in_rows(max(map(len, rows)) + new):
            writers = [Writer(self._text, requests[i], prompts[i], sampling) for i in todo]
            shares = write_rows(
                self._model, self._device, rows, writers, lambda logits: _drawing(logits, sampling)
            )
            done |= {i: w.completion(n) for i, w, n in zip(todo, writers, shares, strict=True)}
            return [done[i] for i in range(len(requests))]
        common = shared_prefix(rows) if share_all else None
        for batch in plan(rows, new, self._batch_tokens):
            own = [rows[j] for j in batch]
            shared = self._share(shared_prefix(own) if common is None else common, own, new)
            writers = [Writer(self._text, requests[todo[j]], rows[j], sampling) for j in batch]
            self._write(own, shared, writers, sampling)
            done |= {todo[j]: w.completion(shared) for j, w in zip(batch, writers, strict=True)}
        return [done[i] for i in range(len(requests))]

    def _in_rows(self, longest: int) -> bool:
        """Return whether sequences of so many tokens can stand side by side in one row of the cache."""
        return longest <= self._window and takes_rows(self._model)

    def _share(self, shared: int, rows: Sequence[Sequence[int]], new_tokens: int) -> int:
        """Return how many tokens to take from a prefix: none where it would not be exact."""
        return shared if max(map(len, rows)) + new_tokens <= self._window else 0

    def _write(
        self, rows: Sequence[Sequence[int]], shared: int, writers: Sequence[Writer], sampling: Sampling
    ) -> None:
        """Decode a batch until every writer has enough."""
        logits, state = self._forward.prefill(rows, shared)
        live = list(writers)
        while True:
            tokens = _draws(logits, live, sampling)
            wanted = [not w.finish and w.push(t) for w, t in zip(live, tokens, strict=True)]
            if not any(wanted):
                return
            if sum(wanted) < _COMPACT_BELOW * len(live):
                keep = [i for i, more in enumerate(wanted) if more]
                state.keep(keep)
                live, tokens = [live[i] for i in keep], [tokens[i] for i in keep]
            logits = self._forward.step(state, tokens)

    def _score(
        self, rows: Sequence[Sequence[int]], shared: int, tails: Sequence[Sequence[Sequence[int]]]
    ) -> NDArray[np.float64]:
        """Return the summed log-probabilities ``[b, n_choice]`` of the tails of each row."""
        import torch

        logits, state = self._forward.prefill(rows, shared)
        n_choice = len(tails[0])
        flat = [tail for row in tails for tail in row]  # [b * n_choice]
        first = torch.log_softmax(logits, dim=-1).cpu()
        scores = [float(first[i // n_choice, tail[0]]) if tail else 0.0 for i, tail in enumerate(flat)]
        if max(map(len, flat)) > 1:
            state.repeat(n_choice)
            # The last token of a tail is only predicted, never read.
            rest = torch.log_softmax(self._forward.extend(state, [tail[:-1] for tail in flat]), dim=-1)
            for i, tail in enumerate(flat):
                for j, token in enumerate(tail[1:]):
                    scores[i] += float(rest[i, j, token])
        return np.array(scores, dtype=np.float64).reshape(len(tails), n_choice)


def _draws(logits: torch.Tensor, writers: Sequence[Writer], sampling: Sampling) -> list[int]:
    """Return the next token of each row from logits ``[b, v]``; each writer draws with its own generator."""
    draw_row = _drawing(logits, sampling)
    return [0 if writer.finish else draw_row(row, writer) for row, writer in enumerate(writers)]


def _drawing(logits: torch.Tensor, sampling: Sampling) -> Callable[[int, Writer], int]:
    """Return what draws a token from a row of logits ``[b, v]``, with the generator of who writes it."""
    if sampling.temperature > 0.0:
        rows = logits.cpu().numpy()
        return lambda row, writer: draw(rows[row], sampling, writer.rng)
    # On a processor numpy finds the largest of a row ten times faster than torch.
    greedy = logits.numpy().argmax(axis=-1) if logits.device.type == "cpu" else logits.argmax(dim=-1)
    tokens: list[int] = greedy.tolist()
    return lambda row, _: tokens[row]
