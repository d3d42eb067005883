"""The llama.cpp engine: GGUF files on any CPU, many sequences at once, prefixes shared.

Greedy text equals what llama.cpp writes one prompt at a time, up to the rounding that
a batch brings: matrix products of other shapes sum in another order. The pipeline
therefore sends calls in fixed groups, so that a run that was killed decodes the same
groups again (`arte_edge.store`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arte_edge.engines.base import Completion, EngineIdentity, Request, Sampling
from arte_edge.engines.choices import spans
from arte_edge.engines.llama_batch import Job, run
from arte_edge.engines.llama_runtime import Grammar, LlamaContext, LlamaModel, default_threads
from arte_edge.engines.sampling import draw, in_loop, log_softmax_at, request_rng

__all__ = ["LlamaCppEngine"]

_LOOP_EVERY = 16  # tokens between two looks for a loop
_CTX_STEP = 256  # tokens; contexts grow in steps, so that few are made


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
        self.model = LlamaModel(gguf)
        self.identity = EngineIdentity(
            kind="llamacpp",
            model=sha256,
            quantization=quantization,
            adapter=adapter_sha256,
            runtime=f"llama_cpp {self.model.lib.__version__}",
        )
        self._adapter = adapter
        self._parallel = parallel
        self._threads = threads or int(os.environ.get("ARTE_EDGE_THREADS", "0")) or default_threads()
        self._context: LlamaContext | None = None

    @property
    def chat_template(self) -> str | None:
        return self.model.metadata("tokenizer.chat_template")

    @property
    def special_tokens(self) -> dict[str, str]:
        return {"bos_token": self.model.special("bos"), "eos_token": self.model.special("eos")}

    def count_tokens(self, text: str) -> int:
        return len(self.model.tokens(text))

    def close(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None
        self.model.close()

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine.complete`. A prompt longer than the model's context is an "error" completion."""
        writers: list[_Writer | None] = []
        for request in requests:
            tokens = self.model.tokens(request.prompt)
            fits = 0 < len(tokens) <= self.model.n_ctx_train - sampling.max_tokens
            writers.append(_Writer(self.model, request, tokens, sampling) if fits else None)
        jobs = [writer.job for writer in writers if writer is not None]
        shared = self._run(jobs, sampling.max_tokens) if jobs else 0
        too_long = f"an empty prompt, or more than the model's context of {self.model.n_ctx_train} tokens"
        return [
            Completion("", "error", error=too_long) if writer is None else writer.completion(shared)
            for writer in writers
        ]

    def continue_shared(self, prefix: str, suffixes: Sequence[str], sampling: Sampling) -> list[Completion]:
        """See `Engine.continue_shared`. The shared part is found in the tokens, so it is exact at the seam."""
        return self.complete([Request(prefix + suffix) for suffix in suffixes], sampling)

    def choose(self, prefix: str, suffixes: Sequence[str], choices: Sequence[str]) -> NDArray[np.float64]:
        """Return log-probabilities ``[n_suffix, n_choice]``; see `_Chooser` for which tokens count."""
        choosers = [_Chooser(self.model, prefix + suffix, choices) for suffix in suffixes]
        self._run([job for chooser in choosers for job in chooser.jobs], 0)
        return np.array([chooser.log_probabilities() for chooser in choosers])

    def _run(self, jobs: list[Job], max_new: int) -> int:
        """Decode `jobs` in a context that depends on them alone: what ran before must not move a float."""
        longest = max(len(job.tokens) for job in jobs) + max_new
        n_ctx_seq = -(-longest // _CTX_STEP) * _CTX_STEP
        if self._context is None or self._context.n_ctx_seq != n_ctx_seq:
            if self._context is not None:
                self._context.close()
            self._context = LlamaContext(
                self.model, self._parallel + 1, n_ctx_seq, self._threads, self._adapter
            )
        self._context.clear()
        return run(self._context, jobs)


class _Writer:
    """Writes one completion: draws tokens until a stop string, an end token, a loop or the budget."""

    def __init__(self, model: LlamaModel, request: Request, tokens: list[int], sampling: Sampling) -> None:
        self._model, self._sampling = model, sampling
        self._rng = request_rng(request, sampling)
        self._grammar = Grammar(model, sampling.grammar) if sampling.grammar else None
        self._stops = [stop.encode() for stop in sampling.stop]
        self._text = bytearray()
        self._written: list[int] = []
        self._finish = ""
        self._n_prompt = len(tokens)
        self.job = Job(tokens=tokens, wanted=frozenset([len(tokens) - 1]), on_logits=self._on_logits)

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
        if self._grammar is None:
            return draw(logits, self._sampling, self._rng)
        # Most draws fit the grammar already; masking the whole vocabulary is the slow path.
        token = draw(logits, self._sampling, self._rng)
        one = np.array([token])
        if not np.isfinite(self._grammar.mask(one, logits[one])[0]):
            every = np.arange(len(logits))
            token = draw(self._grammar.mask(every, logits), self._sampling, self._rng)
        self._grammar.accept(token)
        return token

    def completion(self, shared: int) -> Completion:
        return Completion(
            text=self._text.decode(errors="replace"),
            finish=self._finish,
            prompt_tokens=self._n_prompt,
            completion_tokens=len(self._written),
            cached_tokens=shared,
        )


class _Chooser:
    """Log-probabilities of several continuations of one prompt, at prefill cost; `choices` says which tokens count."""

    def __init__(self, model: LlamaModel, prompt: str, choices: Sequence[str]) -> None:
        lists = [model.tokens(prompt + choice) for choice in choices]
        # What to add up for each choice: (tokens before, next token) pairs.
        self._terms = [
            [(tuple(tokens[:i]), tokens[i]) for i in range(start, end)]
            for tokens, (start, end) in zip(lists, spans(lists, model.tokens(prompt)), strict=True)
        ]
        contexts = {before for terms in self._terms for before, _ in terms}
        self._score: dict[tuple[int, ...], dict[int, float]] = {}
        self.jobs = [
            self._job(context, contexts)
            for context in sorted(contexts)
            # A context that another one begins with gets its logits on the way.
            if not any(other != context and other[: len(context)] == context for other in contexts)
        ]

    def _job(self, tokens: tuple[int, ...], contexts: set[tuple[int, ...]]) -> Job:
        wanted = frozenset(i for i in range(len(tokens)) if tokens[: i + 1] in contexts)

        def on_logits(position: int, logits: NDArray[np.float32]) -> None:
            before = tokens[: position + 1]
            ids = sorted({token for terms in self._terms for ctx, token in terms if ctx == before})
            self._score[before] = dict(zip(ids, log_softmax_at(logits, ids).tolist(), strict=True))

        return Job(tokens=list(tokens), wanted=wanted, on_logits=on_logits)

    def log_probabilities(self) -> list[float]:
        return [sum(self._score[before][token] for before, token in terms) for terms in self._terms]
