"""The llama.cpp engine: GGUF files on any CPU, many sequences at once, shared prefixes computed once.

Greedy text equals what llama.cpp generates one prompt at a time, up to the rounding of another batch shape: matrix
products of other shapes sum in another order. The pipeline therefore sends calls in fixed groups, so that a run that
was killed decodes the same groups again (`arte_edge.store`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arte_edge.runtimes.choice_scoring import ChoiceScorer
from arte_edge.runtimes.completion import Completion, EngineIdentity, Request, Sampling
from arte_edge.runtimes.llamacpp.autotune import layout_for
from arte_edge.runtimes.llamacpp.bindings import Grammar, LlamaContext, LlamaModel
from arte_edge.runtimes.llamacpp.context_memory import check_cells_fit, check_fits
from arte_edge.runtimes.llamacpp.scheduler import Job, run
from arte_edge.runtimes.llamacpp.tree_decode import MOST_LEAVES, TREE_LAYOUT, run_trees
from arte_edge.runtimes.prefix_tree import MAX_LEVELS, Tree, cells_of, plan_groups
from arte_edge.runtimes.sampling import draw, in_loop, request_rng
from arte_edge.threads import thread_count

__all__ = ["LlamaCppEngine"]

_LOOP_EVERY = 16  # tokens between two checks for a loop
_CTX_STEP = 256  # tokens; contexts grow in steps, so that few are made
_CELL_STEP = 1024  # likewise, for scoring


class LlamaCppEngine:
    """An `Engine` over one GGUF file, optionally with a LoRA adapter in GGUF form."""

    supports_grammar = True

    def __init__(
        self,
        gguf: Path,
        *,
        sha256: str,
        quantization: str = "",
        adapter: Path | None = None,
        adapter_sha256: str = "",
        parallel: int = 32,
        threads: int | None = None,
    ) -> None:
        """Load the file. `parallel` is how many sequences decode together at most."""
        self.model = LlamaModel(gguf)
        self.identity = EngineIdentity(
            kind="llamacpp",
            model=sha256,
            quantization=quantization,
            adapter=adapter_sha256,
            runtime=f"{self.model.lib.__name__} {self.model.lib.__version__}",
        )
        self._adapter = adapter
        self._parallel = parallel
        self.threads = thread_count(threads)
        self._context: LlamaContext | None = None
        self._scoring: LlamaContext | None = None

    @property
    def chat_template(self) -> str | None:
        return self.model.metadata("tokenizer.chat_template")

    @property
    def special_tokens(self) -> dict[str, str]:
        return {"bos_token": self.model.special("bos"), "eos_token": self.model.special("eos")}

    def count_tokens(self, text: str) -> int:
        return len(self.model.tokens(text))

    def close(self) -> None:
        for context in (self._context, self._scoring):
            if context is not None:
                context.close()
        self._context = self._scoring = None
        self.model.close()

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine.complete`. A prompt longer than the model's context is an "error" completion."""
        writers: list[_Writer | None] = []
        for request in requests:
            tokens = self.model.tokens(request.prompt)
            fits = 0 < len(tokens) <= self.model.n_ctx_train - sampling.max_tokens
            writers.append(_Writer(self.model, request, tokens, sampling) if fits else None)
        jobs = [writer.job for writer in writers if writer is not None]
        self._run(jobs, sampling.max_tokens)
        too_long = f"an empty prompt, or more than the model's context of {self.model.n_ctx_train} tokens"
        return [
            Completion("", "error", error=too_long) if writer is None else writer.completion()
            for writer in writers
        ]

    def choose_each(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]]
    ) -> list[NDArray[np.float64]]:
        """See `Engine.choose_each`; one batch for all prompts."""
        scorers = [
            ChoiceScorer(self.model.tokens, prompt, own) for prompt, own in zip(prompts, choices, strict=True)
        ]
        if self.model.can_rewind:
            self._score([tree for scorer in scorers for tree in scorer.trees(MOST_LEAVES)])
        else:
            self._run([job for scorer in scorers for job in scorer.jobs()], 0)
        return [scorer.log_probabilities() for scorer in scorers]

    def _score(self, trees: list[Tree]) -> None:
        """Decode `trees` in a unified context that is as large as they need.

        Raises:
            EngineError: no memory for the context.
        """
        if not trees:
            return
        groups = plan_groups(trees, TREE_LAYOUT.ubatch, MOST_LEAVES)
        cells = -(-cells_of(groups) // _CELL_STEP) * _CELL_STEP
        made = self._scoring
        if made is None or made.n_cells != cells:
            if made is not None:
                made.close()
            self._scoring = None
            check_cells_fit(self.model, cells, MOST_LEAVES + MAX_LEVELS, TREE_LAYOUT.ubatch)
            self._scoring = made = LlamaContext(
                self.model,
                MOST_LEAVES + MAX_LEVELS,
                cells,
                self.threads,
                self._adapter,
                TREE_LAYOUT,
                cells=cells,
            )
        made.clear()
        run_trees(made, groups)

    def _run(self, jobs: list[Job], max_new: int) -> None:
        """Decode `jobs` in a context that depends on them alone, so that results do not depend on earlier calls.

        Raises:
            EngineError: no memory for the context.
        """
        if not jobs:
            return
        longest = max(len(job.tokens) for job in jobs) + max_new
        n_ctx_seq = -(-longest // _CTX_STEP) * _CTX_STEP
        # Few prompts need few sequences; powers of two, so that few different contexts are made.
        slots = min(self._parallel, 1 << (len(jobs) - 1).bit_length())
        n_seq = slots + MAX_LEVELS
        made = self._context
        if made is None or (made.n_seq, made.n_ctx_seq) != (n_seq, n_ctx_seq):
            if made is not None:
                made.close()
            self._context = None
            layout = layout_for(self.model, self.identity.model, self.threads)
            check_fits(self.model, n_seq, MAX_LEVELS, n_ctx_seq, layout.ubatch)
            self._context = made = LlamaContext(
                self.model, n_seq, n_ctx_seq, self.threads, self._adapter, layout
            )
        made.clear()
        run(made, jobs)


class _Writer:
    """Generates one completion: draws tokens until a stop string, an end token, a loop or the budget."""

    def __init__(self, model: LlamaModel, request: Request, tokens: list[int], sampling: Sampling) -> None:
        self._model, self._sampling = model, sampling
        self._greedy = sampling.temperature <= 0.0 and not sampling.grammar
        self._rng = None if self._greedy else request_rng(request, sampling)
        self._grammar = Grammar(model, sampling.grammar) if sampling.grammar else None
        self._stops = [stop.encode() for stop in sampling.stop]
        self._text = bytearray()
        self._written: list[int] = []
        self._finish = ""
        self._n_prompt = len(tokens)
        self.job = Job(tokens=tokens, outputs=frozenset([len(tokens) - 1]), on_logits=self._on_logits)

    def _on_logits(self, position: int, logits: NDArray[np.float32]) -> int | None:
        token = self._draw(logits)
        self._finish = self._reason_to_end(token)
        if not self._finish:
            return token
        if self._grammar is not None:
            self._grammar.close()
        return None

    def _reason_to_end(self, token: int) -> str:
        """Append `token` to the text; return why the completion ends with it, empty if it does not."""
        if self._model.is_end(token):
            return "eos"
        self._written.append(token)
        piece = self._model.piece(token)
        start = len(self._text)
        self._text += piece
        for stop in self._stops:
            found = self._text.find(stop, max(0, start - len(stop)))
            if found >= 0:
                del self._text[found + len(stop) :]
                return "stop"
        if len(self._written) >= self._sampling.max_tokens:
            return "length"
        if len(self._written) % _LOOP_EVERY == 0 and in_loop(self._written):
            return "loop"
        return ""

    def _draw(self, logits: NDArray[np.float32]) -> int:
        if self._rng is None:
            return int(logits.argmax())
        if self._grammar is None:
            return draw(logits, self._sampling, self._rng)
        # Most draws are allowed by the grammar already; masking the whole vocabulary is the slow path.
        token = draw(logits, self._sampling, self._rng)
        one = np.array([token])
        if not np.isfinite(self._grammar.mask(one, logits[one])[0]):
            every = np.arange(len(logits))
            token = draw(self._grammar.mask(every, logits), self._sampling, self._rng)
        self._grammar.accept(token)
        return token

    def completion(self) -> Completion:
        return Completion(
            text=self._text.decode(errors="replace"),
            finish=self._finish,
            prompt_tokens=self._n_prompt,
            completion_tokens=len(self._written),
            cached_tokens=self.job.shared,
        )
