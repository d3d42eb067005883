"""Checkpoint folders (safetensors) in transformers: loading, batched forward passes, and the engine over them.

Adapters are merged into the weights on loading, or added beside packed ones (`load`). No code from a
checkpoint is run, no pickles are read.

Rows of a batch are aligned at their ends, with padding between the shared prefix and a row's own tokens (left padding
if there is no prefix). The mask hides the padding and positions count real tokens only, so a row's values are those
that it has alone, up to the rounding of another batch shape. On a CPU, models that allow it run in a packed cache
instead (`packed_kv_cache`).

Notation: b rows, s cached positions, n new positions, v vocabulary size.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from arte_edge import transformers_load as hf
from arte_edge.cache import sha256_file
from arte_edge.errors import ArteError, InputError
from arte_edge.extras import need
from arte_edge.model_folder import ADAPTER_WEIGHTS, read_adapter_config
from arte_edge.runtimes.choice_scoring import ChoiceScorer, spans
from arte_edge.runtimes.completion import Completion, EngineIdentity, Request, Sampling
from arte_edge.runtimes.prefix_tree import n_common, plan_groups
from arte_edge.runtimes.transformers import onednn_int8, onednn_prepack
from arte_edge.runtimes.transformers.onednn_prepack import pack
from arte_edge.runtimes.transformers.packed_generate import FLOAT32_ROWS, generate_packed
from arte_edge.runtimes.transformers.packed_kv_cache import MOST_ROWS, run_trees, supports_packing
from arte_edge.runtimes.transformers.placement import Floats, empty_cache, fast_floats, pick_device

if TYPE_CHECKING:
    import torch

    from arte_edge.runtimes.llamacpp.bindings import LlamaModel
    from arte_edge.runtimes.transformers.tokenizer import Writer

_BATCH_TOKENS = (16_384, 262_144)  # rows times length of a batch: on a CPU and the minimum, the maximum
_CACHE_SHARE = 0.3  # of a GPU's free memory for keys and values, which need twice that while they grow


def adapter_sha256(folder: Path) -> str:
    """Return one sha256 of a LoRA adapter: its weights and its configuration without the path of the base.

    Raises InputError: not an adapter folder with safetensors.
    """
    settings = read_adapter_config(folder)
    settings.pop("base_model_name_or_path", None)
    canonical = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(f"{sha256_file(folder / ADAPTER_WEIGHTS)}\n{canonical}".encode()).hexdigest()


def pick_dtype(name: str, device: torch.device, checkpoint: Path | None = None) -> torch.dtype:
    """Return the dtype for `name` on `device`; for auto ``ARTE_EDGE_DTYPE`` decides, then the device."""
    import torch

    if name == "auto":
        name = os.environ.get("ARTE_EDGE_DTYPE", "auto")
    if name == "auto":
        name = fast_floats(device, checkpoint)
    if name not in get_args(Floats):
        raise InputError(f"dtype {name}: unknown", f"One of auto, {', '.join(get_args(Floats))}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def room_tokens(config: Any, device: torch.device) -> int:
    """Return how many tokens one batch may hold, all rows together: a GPU needs far more than a CPU."""
    import torch

    if device.type != "cuda":
        return _BATCH_TOKENS[0]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * 2 * config.num_hidden_layers * heads * width  # keys and values of 16 bits
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return int(min(max(_CACHE_SHARE * free_bytes / bytes_per_token, _BATCH_TOKENS[0]), _BATCH_TOKENS[1]))


def load(folder: Path, adapter: Path | None, dtype: torch.dtype, *, beside: bool = False) -> tuple[Any, Any]:
    """Return model and tokenizer, the adapter merged in, or `beside` the weights.

    Beside packed weights an adapter costs less time than a merge with its check. Merged weights in bfloat16 may round a
    small adapter away, as an alignment is at its first steps: then it stays beside them too. DoRA is always merged: it
    needs the weights that `onednn_int8` and `onednn_prepack` replace.

    Raises InputError: not a checkpoint that transformers loads, or an adapter that does not fit it;
    ArteError: the merged model is another one than base plus adapter.
    """
    import torch

    model, tokenizer = hf.load_model(folder, dtype), hf.load_tokenizer(folder)
    if adapter is None:
        return model, tokenizer
    can_stay = not read_adapter_config(adapter).get("use_dora")
    if not (beside and can_stay):
        before = hf.logits_of(model, [hf.probe_ids(model)])
        live = hf.attach_adapter(model, adapter)
        wanted = hf.logits_of(live, [hf.probe_ids(live)])
        model = hf.merge_attached(live)
        got = hf.logits_of(model, [hf.probe_ids(model)])
        try:
            hf.compare_merge(f"{folder} with {adapter}", before, wanted, got, str(dtype).removeprefix("torch."))
            return model, tokenizer
        except ArteError:
            if not (can_stay and dtype == torch.bfloat16):
                raise
        del model, live
        model = hf.load_model(folder, dtype)
    model = hf.attach_adapter(model, adapter).get_base_model()
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if hasattr(child, "original_module"):  # of a layer that was trained whole
                setattr(module, name, child.modules_to_save[child.active_adapters[0]])
    return model, tokenizer


_SHORTEST_PREFIX = 8  # tokens; sharing fewer costs more than it saves
_NEW_BATCH_TOKENS = 256  # what starting another batch costs, in tokens of prefill


def plan(rows: Sequence[Sequence[int]], new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Return batches of row indices.

    Rows are sorted by their tokens, so that those with a common prefix are neighbours. A batch ends when rows
    times the longest length, `new_tokens` included, would exceed `batch_tokens`, or when the next row would
    shorten the shared prefix by more than a batch of its own costs.
    """
    batches: list[list[int]] = []
    longest = shared = 0
    for index in sorted(range(len(rows)), key=lambda i: list(rows[i])):
        row = rows[index]
        if batches:
            batch = batches[-1]
            kept = min(shared, n_common(rows[batch[-1]], row))
            width = max(longest, len(row)) + new_tokens
            fits = (len(batch) + 1) * width <= batch_tokens
            if fits and (len(batch) - 1) * (shared - kept) <= kept + _NEW_BATCH_TOKENS:
                batch.append(index)
                longest, shared = max(longest, len(row)), kept
                continue
        batches.append([index])
        longest = shared = len(row)
    return batches


def shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens are worth sharing: the common ones, minus one to decode in each row."""
    if len(rows) < 2:
        return 0
    shared = min(min(map(len, rows)) - 1, *(n_common(rows[0], row) for row in rows[1:]))
    return shared if shared >= _SHORTEST_PREFIX else 0


class State:
    """The KV cache of a batch, and which of its positions hold tokens."""

    def __init__(self, cache: Any, mask: torch.Tensor) -> None:
        self.cache = cache
        self.mask = mask  # [b, s], 1 for a token, 0 for padding

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        index = self.mask.new_tensor(rows)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]

    def repeat(self, times: int) -> None:
        """Repeat each row, its copies side by side."""
        self.cache.batch_repeat_interleave(times)
        self.mask = self.mask.repeat_interleave(times, dim=0)


class Forward:
    """Runs a causal language model over batches of token lists."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        # Without it a prefill would compute logits for every position of every row.
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        self._cached: tuple[tuple[int, ...], Any] = ((), None)

    def empty(self) -> State:
        """Return the state of one empty row."""
        import torch

        return State(None, torch.ones((1, 0), dtype=torch.long, device=self._device))

    def prefill(self, rows: Sequence[Sequence[int]], shared: int) -> tuple[torch.Tensor, State]:
        """Decode `rows`, whose first `shared` tokens are the same; return the next logits ``[b, v]``."""
        import torch

        cache = None
        if shared:
            cache = self._prefix(tuple(rows[0][:shared]))
            cache.batch_repeat_interleave(len(rows))
        width = max(len(row) for row in rows) - shared
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros((len(rows), shared + width), dtype=torch.long)
        mask[:, :shared] = 1
        for i, row in enumerate(rows):
            n = len(row) - shared
            ids[i, width - n :] = torch.tensor(row[shared:], dtype=torch.long)
            mask[i, shared + width - n :] = 1
        state = State(cache, mask.to(self._device))
        return self._call(ids, state, **self._last_only)[:, -1].float(), state

    def step(self, state: State, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to each row; return the next logits ``[b, v]``."""
        return self.extend(state, [[token] for token in tokens])[:, -1]

    def extend(self, state: State, tails: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append a tail to each row, short ones padded at the end; return all their logits ``[b, n, v]``."""
        import torch

        width = max(len(tail) for tail in tails)
        ids = torch.tensor([[*tail, *[0] * (width - len(tail))] for tail in tails], dtype=torch.long)
        # What follows a row's last token is never attended to, so the mask need not hide it.
        state.mask = torch.cat([state.mask, state.mask.new_ones(ids.shape)], dim=1)
        return self._call(ids, state).float()

    def _prefix(self, tokens: tuple[int, ...]) -> Any:
        """Return a copy of the cache ``[1, s]`` of the prefix, which is computed once for equal tokens."""
        import torch

        if self._cached[0] != tokens:
            state = State(None, torch.ones((1, len(tokens)), dtype=torch.long, device=self._device))
            self._call(torch.tensor([tokens]), state, **self._last_only)
            self._cached = (tokens, state.cache)
        return copy.deepcopy(self._cached[1])

    def _call(self, ids: torch.Tensor, state: State, **options: int) -> torch.Tensor:
        import torch

        positions = (state.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.inference_mode():
            out = self._model(
                input_ids=ids.to(self._device),
                attention_mask=state.mask,
                position_ids=positions,
                past_key_values=state.cache,
                use_cache=True,
                **options,
            )
        state.cache = out.past_key_values
        logits: torch.Tensor = out.logits
        return logits


_COMPACT_BELOW = 0.75  # of a batch's rows unfinished: then the finished ones are dropped from its cache


class TransformersEngine:
    """An `Engine` over a checkpoint folder, optionally with a PEFT adapter folder."""

    def __init__(
        self,
        folder: Path,
        *,
        sha256: str,
        adapter: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int = 0,
        vocabulary: Path | None = None,
    ) -> None:
        """Load the checkpoint on `device` as `dtype`; auto: see `pick_device` and `pick_dtype`.

        The dtype int8 multiplies in 8-bit integers on the CPU (`onednn_int8`). `vocabulary` is a GGUF file with the
        same tokens, with which grammars are followed.

        `batch_tokens` bounds rows times length in one batch,
        prompts and answers together; 0: what the device has room for.

        Raises InputError: not a checkpoint that transformers loads without running its code; no such dtype;
        ArteError: torch or transformers is not installed.
        """
        need("train", "Running checkpoint folders")
        import torch
        import transformers

        from arte_edge.runtimes.transformers.tokenizer import Text

        self._device = pick_device(device)
        integers = dtype == "int8"
        if integers and not (self._device.type == "cpu" and onednn_int8.supported()):
            raise InputError(
                "engine = 'int8' needs an x86 processor with VNNI or AMX, and no GPU in use",
                "Set teacher.engine = 'llamacpp' for a GGUF file, or 'transformers', and continue with --update.",
            )
        kind = torch.bfloat16 if integers else pick_dtype(dtype, self._device, folder)
        packs = self._device.type == "cpu" and kind == torch.float32 and onednn_prepack.supports_float32()
        self.model, tokenizer = load(folder, adapter, kind, beside=integers or packs)
        self.model.to(self._device).eval()
        self.text = Text(tokenizer, self.model.generation_config.eos_token_id)
        if integers:
            onednn_int8.quantize(self.model, self.text.tokens(onednn_int8.SAMPLE_TEXT))
        elif self._device.type == "cpu":
            pack(self.model)
        self._vocabulary = vocabulary
        self._grammars: LlamaModel | None = None  # opened with the first grammar
        self.forward = Forward(self.model, self._device)
        self._batch_tokens = batch_tokens or room_tokens(self.model.config.get_text_config(), self._device)
        self._template: str | None = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
        config = self.model.config.get_text_config()
        self.context_tokens: int = getattr(config, "max_position_embeddings", None) or 2**31
        # Padding between a prefix and its suffix would count against a sliding window.
        self._window: int = getattr(config, "sliding_window", None) or 2**31
        self.identity = EngineIdentity(
            kind="transformers",
            model=sha256,
            quantization="int8" if integers else str(kind).removeprefix("torch."),
            adapter=adapter_sha256(adapter) if adapter else "",
            runtime=f"transformers {transformers.__version__}, torch {torch.__version__}",
        )

    @property
    def supports_grammar(self) -> bool:
        """Whether grammars are followed, which takes a `vocabulary`."""
        return self._vocabulary is not None

    @property
    def chat_template(self) -> str | None:
        return self._template

    @property
    def special_tokens(self) -> dict[str, str]:
        return {"bos_token": self.text.bos, "eos_token": self.text.eos}

    def count_tokens(self, text: str) -> int:
        return len(self.text.tokens(text))

    def close(self) -> None:
        """Free the model's memory; the engine cannot be used afterwards."""
        vars(self).pop("model", None)
        vars(self).pop("forward", None)
        gc.collect()
        if self._grammars is not None:
            self._grammars.close()
            self._grammars = None
        empty_cache(self._device)

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine.complete`. A prompt too long for the model is a completion with finish "error".

        Raises InputError: a grammar, without the `vocabulary` that it needs.
        """
        if sampling.grammar and not self.supports_grammar:
            raise InputError("A checkpoint follows no grammar", "Use a GGUF file of the model.")
        prompts = [self.text.tokens(request.prompt) for request in requests]
        new = sampling.max_tokens
        done: dict[int, Completion] = {}
        for i, tokens in enumerate(prompts):
            if not tokens or len(tokens) + new > self.context_tokens:
                why = f"exceed the model's context of {self.context_tokens} tokens" if tokens else "are empty"
                done[i] = Completion("", "error", error=f"prompt and answer {why}")
        todo = [i for i in range(len(requests)) if i not in done]
        rows = [prompts[i] for i in todo]
        if self._device.type == "cpu" and rows and self._can_pack(max(map(len, rows)) + new):
            writers = [self._writer(requests[i], prompts[i], sampling) for i in todo]
            draw = partial(_drawing, sampling=sampling)
            most = FLOAT32_ROWS if self.identity.quantization == "float32" else 0
            shares = generate_packed(self.model, self._device, rows, writers, draw, most)
            done |= {i: w.completion(n) for i, w, n in zip(todo, writers, shares, strict=True)}
            return [done[i] for i in range(len(requests))]
        for batch in plan(rows, new, self._batch_tokens):
            own = [rows[j] for j in batch]
            # A prefix shared in the cache is exact only inside the sliding window.
            shared = shared_prefix(own) if max(map(len, own)) + new <= self._window else 0
            writers = [self._writer(requests[todo[j]], rows[j], sampling) for j in batch]
            self._generate(own, shared, writers, sampling)
            done |= {todo[j]: w.completion(shared) for j, w in zip(batch, writers, strict=True)}
        return [done[i] for i in range(len(requests))]

    def _writer(self, request: Request, prompt: Sequence[int], sampling: Sampling) -> Writer:
        from arte_edge.runtimes.transformers.tokenizer import Writer

        grammar = None
        if sampling.grammar and self._vocabulary is not None:
            from arte_edge.runtimes.llamacpp.bindings import Grammar, LlamaModel

            self._grammars = self._grammars or LlamaModel(self._vocabulary, vocabulary_only=True)
            grammar = Grammar(self._grammars, sampling.grammar)
        return Writer(self.text, request, prompt, sampling, grammar)

    def choose_each(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        """See `Engine.choose_each`; one batch for all prompts.

        Raises InputError: no prompt before the choices, or one too long for the model.
        """
        scorers = ChoiceScorer.each(self.text.tokens, prompts, choices)
        longest = max((scorer.longest for scorer in scorers), default=0)
        if longest > self.context_tokens:
            raise InputError(f"A prompt of {longest} tokens exceeds the model's context of {self.context_tokens}")
        if not self._can_pack(longest):
            return [self._choose_plain(prompt, own) for prompt, own in zip(prompts, choices, strict=True)]
        trees = [tree for scorer in scorers for tree in scorer.trees(MOST_ROWS)]
        if trees:
            groups = plan_groups(trees, MOST_ROWS, MOST_ROWS)
            run_trees(self.model, self._device, groups)
        return [scorer.log_probabilities() for scorer in scorers]

    def _choose_plain(self, prompt: str, choices: Sequence[str]) -> NDArray[np.float64]:
        """Score choices ``[n_choice]`` in a batch row each, for models whose cache cannot be packed."""
        import torch

        lists = [self.text.tokens(prompt + choice) for choice in choices]
        ranges = spans(lists, self.text.tokens(prompt))
        tails = [tokens[start:end] for tokens, (start, end) in zip(lists, ranges, strict=True)]
        logits, state = self.forward.prefill([lists[0][: ranges[0][0]]], 0)
        first = torch.log_softmax(logits[0], dim=-1).cpu()
        scores = [float(first[tail[0]]) if tail else 0.0 for tail in tails]
        if max(map(len, tails)) > 1:
            state.repeat(len(tails))
            # The last token of a tail is only predicted, never read.
            rest = torch.log_softmax(self.forward.extend(state, [tail[:-1] for tail in tails]), dim=-1)
            for i, tail in enumerate(tails):
                for j, token in enumerate(tail[1:]):
                    scores[i] += float(rest[i, j, token])
        return np.array(scores, dtype=np.float64)

    def _can_pack(self, longest: int) -> bool:
        """Return whether sequences of so many tokens can share a row of the cache."""
        return longest <= self._window and supports_packing(self.model)

    def _generate(
        self, rows: Sequence[Sequence[int]], shared: int, writers: Sequence[Writer], sampling: Sampling
    ) -> None:
        """Decode a batch until every text is finished."""
        logits, state = self.forward.prefill(rows, shared)
        live = list(writers)
        while True:
            tokens = _draws(logits, live, sampling)
            unfinished = [not w.finish and w.push(t) for w, t in zip(live, tokens, strict=True)]
            if not any(unfinished):
                return
            if sum(unfinished) < _COMPACT_BELOW * len(live):
                keep = [i for i, more in enumerate(unfinished) if more]
                state.keep(keep)
                live, tokens = [live[i] for i in keep], [tokens[i] for i in keep]
            logits = self.forward.step(state, tokens)


def _draws(logits: torch.Tensor, writers: Sequence[Writer], sampling: Sampling) -> list[int]:
    """Return the next token of each row from logits ``[b, v]``; each writer draws with its own generator."""
    draw_row = _drawing(logits, sampling)
    return [0 if writer.finish else draw_row(row, writer) for row, writer in enumerate(writers)]


def _drawing(logits: torch.Tensor, sampling: Sampling) -> Callable[[int, Writer], int]:
    """Return a function that draws a token from a row of logits ``[b, v]`` with its writer's generator."""
    if sampling.temperature > 0.0 or sampling.grammar or sampling.repeat_penalty:
        rows = logits.cpu().numpy()
        return lambda row, writer: writer.draw(rows[row])
    # On a CPU numpy's argmax of a row is ten times faster than torch's.
    greedy = logits.numpy().argmax(axis=-1) if logits.device.type == "cpu" else logits.argmax(dim=-1)
    tokens: list[int] = greedy.tolist()
    return lambda row, _: tokens[row]
