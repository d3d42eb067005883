"""The llama.cpp engine: GGUF files on any CPU, many sequences at once, shared prefixes computed once.

Greedy text equals what llama.cpp generates one prompt at a time, up to the rounding of another batch shape: matrix
products of other shapes sum in another order. The pipeline therefore sends calls in fixed groups, so that a run that
was killed decodes the same groups again (`arte_edge.store`).

Choices are scored as trees of continuations: a question and all its choices in one batch (`run_trees`). A token can
belong to several sequences, so each leaf is a sequence, and an inner token belongs to the sequences of all leaves
behind it. The cache is unified, which makes copies free, and the cells of a batch are freed after it, so that
attention covers the prefix and one batch. Where the cells of a batch are contiguous, flash attention works on tiles
of 64 × 64; in the split cache of `scheduler` each sequence has fewer than 64 rows and would be attended to row by
row, which takes longer than all the rest.

With AVX2 alone llama.cpp widens 16-bit weights for every product, so a small 16-bit model is opened as a float32 copy
of it (`as_float32`): the same weights, texts and scores up to rounding.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arte_edge.cache import cache_subdir
from arte_edge.device.detect import detect
from arte_edge.errors import ArteError
from arte_edge.gguf.quantize import quantize
from arte_edge.gguf.reader import read_model_header
from arte_edge.machine import thread_count
from arte_edge.runtimes.choice_scoring import ChoiceScorer
from arte_edge.runtimes.completion import Completion, EngineIdentity, Request, Sampling
from arte_edge.runtimes.llamacpp.autotune import layout_for
from arte_edge.runtimes.llamacpp.bindings import Grammar, Layout, LlamaContext, LlamaModel, check_cells_fit, check_fits
from arte_edge.runtimes.llamacpp.scheduler import Job, run
from arte_edge.runtimes.prefix_tree import MAX_LEVELS, Group, SharedPrefix, Tree, cells_of, n_cached, plan_groups
from arte_edge.runtimes.sampling import Drawing

TREE_LAYOUT = Layout(unified=True, flash=True, ubatch=512)
MOST_LEAVES = 125  # sequences of one batch; with the prefixes' a power of two below llama.cpp's 256
_CTX_STEP = 256  # tokens; contexts grow in steps, so that few are made
_CELL_STEP = 1024  # likewise, for scoring
_COPY, _COPY_S = "float32-", 600  # name of a copy's folder, and the seconds that making one can take
_WIDENED = (50_000_000, 300_000_000)  # parameters: a copy of at most 1.2 GB, made in seconds when a model is opened


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
        with as_float32(gguf) as path:
            self.model = LlamaModel(path)
        self.model.path, self.model.widened = gguf, path != gguf
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
            Completion("", "error", error=too_long) if writer is None else writer.completion() for writer in writers
        ]

    def choose_each(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        """See `Engine.choose_each`; one batch for all prompts."""
        scorers = ChoiceScorer.each(self.model.tokens, prompts, choices)
        if self.model.can_rewind:
            self._score([tree for scorer in scorers for tree in scorer.trees(MOST_LEAVES)])
        else:
            self._run([job for scorer in scorers for job in scorer.jobs()], 0)
        return [scorer.log_probabilities() for scorer in scorers]

    def _score(self, trees: list[Tree]) -> None:
        """Decode `trees` in a unified context that is as large as they need."""
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
                self.model, MOST_LEAVES + MAX_LEVELS, cells, self.threads, self._adapter, TREE_LAYOUT, cells=cells
            )
        made.clear()
        run_trees(made, groups)

    def _run(self, jobs: list[Job], max_new: int) -> None:
        """Decode `jobs` in a context that depends on them alone, so that results do not depend on earlier calls."""
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
            self._context = made = LlamaContext(self.model, n_seq, n_ctx_seq, self.threads, self._adapter, layout)
        made.clear()
        run(made, jobs)


def widens(n_params: int) -> bool:
    """Return whether 16-bit weights are faster as float32 here: 1.6 times writing, 1.8 times scoring (Zen 2, 135M)."""
    facts = detect()
    able = os.name == "posix" and "avx2" in facts.features and "avx512f" not in facts.features
    return able and _WIDENED[0] <= n_params <= _WIDENED[1]


@contextmanager
def as_float32(gguf: Path) -> Iterator[Path]:
    """Yield a float32 copy of a 16-bit model where `widens` says so, else the file itself.

    The copy is removed at the end: what a process has mapped stays until it closes it. Those that a killed process left
    behind are removed with the next one.
    """
    header = read_model_header(gguf)
    types = {tensor.type for tensor in header.tensors.values()}
    with ExitStack() as stack:
        path = gguf
        if types & {"F16", "BF16"} and types <= {"F16", "BF16", "F32"} and widens(header.parameter_count):
            with suppress(ArteError, OSError):  # no room on the disk: the file itself does
                staging = cache_subdir("staging")
                for left_over in staging.glob(f"{_COPY}*"):
                    if time.time() - left_over.stat().st_mtime > _COPY_S:
                        shutil.rmtree(left_over, ignore_errors=True)
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=_COPY, dir=staging))
                quantize(gguf, Path(folder) / gguf.name, "F32")
                path = Path(folder) / gguf.name
        yield path


class _Writer(Drawing):
    """Generates one completion: draws tokens until a stop string, an end token, a loop or the budget."""

    def __init__(self, model: LlamaModel, request: Request, tokens: list[int], sampling: Sampling) -> None:
        grammar = Grammar(model, sampling.grammar) if sampling.grammar else None
        super().__init__(request, tokens, sampling, lambda token: b"\n" in model.piece(token), grammar)
        self._model = model
        self._stops = [stop.encode() for stop in sampling.stop]
        self._text = bytearray()
        self._finish = ""
        self._n_prompt = len(tokens)
        self.job = Job(tokens=tokens, outputs=frozenset([len(tokens) - 1]), on_logits=self._on_logits)

    def _on_logits(self, position: int, logits: NDArray[np.float32]) -> int | None:
        token = self.draw(logits)
        self._finish = self._reason_to_end(token)
        if not self._finish:
            return token
        self.close()
        return None

    def _reason_to_end(self, token: int) -> str:
        """Append `token` to the text; return why the completion ends with it, empty if it does not."""
        if self._model.is_end(token):
            return "eos"
        self.append(token)
        start = len(self._text)
        self._text += self._model.piece(token)
        for stop in self._stops:
            found = self._text.find(stop, max(0, start - len(stop)))
            if found >= 0:
                del self._text[found + len(stop) :]
                return "stop"
        return self.reason_to_end()

    def completion(self) -> Completion:
        return Completion(
            text=self._text.decode(errors="replace"),
            finish=self._finish,
            prompt_tokens=self._n_prompt,
            completion_tokens=len(self._written),
            cached_tokens=self.job.shared,
        )


def run_trees(context: LlamaContext, groups: Sequence[Group]) -> None:
    """Decode every group in an empty unified context, whose first `MAX_LEVELS` sequences hold prefixes."""
    cached: list[SharedPrefix] = []
    for group in groups:
        cached = _load_prefix(context, group.prefix, cached)
        leaves = range(MAX_LEVELS, MAX_LEVELS + len(group.tree.paths))
        if group.prefix is not None:
            for leaf in leaves:
                context.copy(group.prefix.level, leaf)
        _decode(context, group)
        for leaf in leaves:
            context.drop(leaf)


def _load_prefix(context: LlamaContext, prefix: SharedPrefix | None, cached: list[SharedPrefix]) -> list[SharedPrefix]:
    """Decode the prefixes up to `prefix` that are not cached, drop the others; return the cached ones."""
    path = prefix.path if prefix else []
    same = n_cached(path, cached)
    for level in range(same, len(cached)):
        context.drop(level)
    for one in path[same:]:
        if one.parent is not None:
            context.copy(one.level - 1, one.level)
        for start in range(one.start, one.end, context.n_batch):
            at = np.arange(start, min(start + context.n_batch, one.end), dtype=np.int32)
            tokens = np.array(one.tokens, dtype=np.int32)[at]
            context.decode_arrays(tokens, at, np.full_like(at, one.level), np.zeros(len(at), dtype=np.int8))
    return path


def _decode(context: LlamaContext, group: Group) -> None:
    """Decode the rows of a group, whose leaves are the sequences after those of the prefixes; pass the logits on."""
    paths = group.tree.paths
    for start in range(0, len(group.rows), context.n_batch):
        part = group.rows[start : start + context.n_batch]
        tokens, positions, first, end, output = np.array(part, dtype=np.int32).T
        owners = [np.arange(MAX_LEVELS + a, MAX_LEVELS + b, dtype=np.int32) for _, _, a, b, _ in part]
        logits = context.decode_arrays(tokens, positions, np.concatenate(owners), output.astype(np.int8), end - first)
        contexts = [paths[leaf][: at + 1] for _, at, leaf, _, is_output in part if is_output]
        for path, found in zip(contexts, logits, strict=True):
            for note in group.tree.readers[path]:
                note(path, found)
