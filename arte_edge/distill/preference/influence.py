"""Influence: how far one training step on a draft moves the student towards the right answers, to first order.

A step of Adam changes every weight by the learning rate η against the sign of the draft's gradient g, as its first step
does (Kingma and Ba 2015, algorithm 1). An objective J with gradient v then changes by −η sign(g)·v. J is the mean
log-probability of the right answers to the preference set, without an example in the prompt; on a closed answer set
among its answers, and without what the student prefers whatever the question is (`scoring`). LESS ranks training data
by such products (Xia et al. 2024, arXiv 2402.04333). v is computed once for a student, g by one backward pass a draft.

Both may be of the upper layers alone, which saves the backward pass through the others.

Notation: k questions, dealt to p parts. Each part has its share of v, so a draft has p products: their sum is its
score, their spread says how much that depends on the choice of questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.distill.train.common import Encoder, load
from arte_edge.distill.train.completion_head import attends_fully
from arte_edge.runtimes.transformers.placement import pick_device

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
PARTS = 2  # each holds a copy of v in float32: with weights and gradients 16 bytes a weight
_PACK_TOKENS = 600  # of the questions in one forward pass


@dataclass(frozen=True)
class Question:
    """A question of the preference set: its prompt up to the answer, the choices, and which of them is right."""

    prompt: str
    choices: tuple[str, ...]
    right: int


class Influence:
    """A student and the gradient v of what it should learn.

    Args:
        checkpoint: folder of the student.
        questions: the preference set; an open question has its right answer as the only choice.
        free: closed answers: without each answer's mean log-probability over the questions.
        layers: share of the layers, from the top, whose weights count.
        progress: called with the number of questions done, of how many.
    """

    def __init__(
        self,
        checkpoint: Path,
        questions: Sequence[Question],
        *,
        free: bool,
        layers: float = 1.0,
        progress: Callable[[int], None] = lambda n: None,
    ) -> None:
        self._model, tokenizer = load(checkpoint, frozen=False)
        self._model.to(pick_device()).eval()
        self._encoder = Encoder(tokenizer)
        self.names, self._weights = _upper(self._model, layers)
        self._v = self._objective_gradient(questions, free, progress)

    def of(self, prompt: str, completion: str) -> Floats:
        """Return the products ``[p]`` of a draft, rendered as the student is trained on it, for a rate of 1."""
        products: Floats = self.by_weight(prompt, completion).sum(axis=0)
        return products

    def by_weight(self, prompt: str, completion: str) -> Floats:
        """Return the products ``[n_weight, p]`` of each weight matrix in `names`."""
        start = self._encoder.prompt(prompt)
        row = [*start, *self._encoder.completion(prompt, completion)]
        gain = self._log_probabilities([(row, len(start))])  # its sign is that of the loss, turned round
        products = [(v @ g.sign().flatten()).tolist() for v, g in zip(self._v, self._gradients(gain), strict=True)]
        return np.array(products, dtype=float)

    def _gradients(self, value: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradient of the sum of `value` by each weight matrix, zero where it does not depend on one."""
        import torch

        found = torch.autograd.grad(value.sum(), self._weights, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(found, self._weights, strict=True)]

    def _objective_gradient(
        self, questions: Sequence[Question], free: bool, progress: Callable[[int], None]
    ) -> list[torch.Tensor]:
        """Return v ``[p, n]`` of each weight matrix of n numbers."""
        import torch

        rows = [[self._choice_row(q.prompt, choice) for choice in q.choices] for q in questions]
        most = max(len(ids) for own in rows for ids, _ in own)
        n = max(1, _PACK_TOKENS // most) if attends_fully(self._model.config) else 1
        parts = [range(part, len(rows), PARTS) for part in range(PARTS)]
        packs = [[part[i : i + n] for i in range(0, len(part), n)] for part in parts]
        slopes = [[1 / len(rows)] for _ in rows]
        if any(len(q.choices) > 1 for q in questions):
            logp = np.full((len(rows), max(map(len, rows))), np.nan)
            for pack in [pack for part in packs for pack in part]:
                with torch.no_grad():
                    found = self._log_probabilities([row for i in pack for row in rows[i]]).tolist()
                for i in pack:
                    logp[i, : len(rows[i])], found = found[: len(rows[i])], found[len(rows[i]) :]
                progress(len(pack))
            slopes = _slopes(logp, [q.right for q in questions], free=free)
        v = [torch.zeros(PARTS, w.numel(), device=w.device) for w in self._weights]
        for number, part in enumerate(packs):
            for pack in part:
                weight = torch.tensor([x for i in pack for x in slopes[i]], device=v[0].device)
                logp_each = self._log_probabilities([row for i in pack for row in rows[i]])
                for total, g in zip(v, self._gradients(logp_each * weight), strict=True):
                    total[number] += g.flatten()
                progress(len(pack))
        return v

    def _choice_row(self, prompt: str, choice: str) -> tuple[list[int], int]:
        """Return the tokens of prompt and choice, and how many belong to the prompt alone."""
        start, whole = self._encoder.prompt(prompt), self._encoder.prompt(prompt + choice)
        same = (i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b)
        return whole, next(same, min(len(start), len(whole) - 1))

    def _log_probabilities(self, rows: Sequence[tuple[list[int], int]]) -> torch.Tensor:
        """Return the log-probability ``[n_row]`` of each row's tokens from its place on."""
        import torch

        model, device = self._model, self._weights[0].device
        packed = _Packed([ids for ids, _ in rows]) if attends_fully(model.config) else None
        if packed:
            inputs = packed.inputs(model.base_model.dtype, device)
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
        else:  # padding on the right is seen by no token that counts
            width = max(len(ids) for ids, _ in rows)
            padded = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows], device=device)
            hidden = model.base_model(input_ids=padded, use_cache=False).last_hidden_state.flatten(0, 1)
        at = [(i, t) for i, (ids, start) in enumerate(rows) for t in range(start, len(ids))]
        sources = [packed.places[i][t - 1] if packed else i * width + t - 1 for i, t in at]
        # the whole head, so that logits are what the family's forward makes of them
        logits = model.get_output_embeddings()(hidden[sources]).float()
        targets = torch.tensor([rows[i][0][t] for i, t in at], device=device)
        logp = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return logp.new_zeros(len(rows)).index_add(0, torch.tensor([i for i, _ in at], device=device), logp)


class _Packed:
    """Several token lists in one row that holds each common beginning once; `places` are those of their tokens."""

    def __init__(self, lists: Sequence[Sequence[int]]) -> None:
        self._ids: list[int] = []
        self._parents: list[int] = []
        self._positions: list[int] = []
        known: dict[tuple[int, int], int] = {}
        self.places: list[list[int]] = []
        for tokens in lists:
            places, parent = [], -1
            for position, token in enumerate(tokens):
                place = known.setdefault((parent, token), len(self._ids))
                if place == len(self._ids):
                    self._ids.append(token)
                    self._parents.append(parent)
                    self._positions.append(position)
                places.append(parent := place)
            self.places.append(places)

    def inputs(self, dtype: Any, device: Any) -> dict[str, torch.Tensor]:
        """Return a model's inputs: each token attends to itself and to what stands before it in its list."""
        import torch

        n = len(self._ids)
        given = {
            "input_ids": torch.tensor([self._ids], device=device),
            "position_ids": torch.tensor([self._positions], device=device),
        }
        if self._positions == list(range(n)):
            return given
        seen = torch.eye(n, dtype=torch.bool)
        for place, parent in enumerate(self._parents):
            if parent >= 0:
                seen[place] |= seen[parent]
        mask = torch.zeros(1, 1, n, n, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        return given | {"attention_mask": mask.to(device)}


def standard_error(products: Floats) -> float:
    """Return the standard error of a draft's score over the choice of questions, from products ``[d, p]``.

    It is that of comparisons between drafts, so what all drafts share in a part does not count; pooled over the
    drafts, as few parts say little about one.
    """
    d, p = products.shape
    own = products - products.mean(axis=0) if d > 1 else products
    return float(np.sqrt(p * own.var(axis=1, ddof=1).mean() * d / max(d - 1, 1)))


def _slopes(logp: Floats, right: Sequence[int], *, free: bool) -> list[list[float]]:
    """Return the derivative of J by each choice's log-probability in `logp` ``[k, n_choice]``, NaN for no choice.

    J is the mean log-probability of the right choices among the choices; `free` with each column's mean taken out.
    """
    there = np.isfinite(logp)
    own = logp - np.nanmean(logp, axis=0) if free else logp
    share = np.where(there, np.exp(own - np.nanmax(own, axis=1, keepdims=True)), 0.0)
    slope = -share / share.sum(axis=1, keepdims=True)
    slope[np.arange(len(logp)), right] += 1.0
    if free:
        slope -= np.where(there, slope.sum(axis=0) / there.sum(axis=0), 0.0)
    return [list(row[mask] / len(logp)) for row, mask in zip(slope, there, strict=True)]


def _upper(model: Any, share: float) -> tuple[list[str], list[torch.Tensor]]:
    """Return names and weights of the upper `share` of the layers, and switch the gradients of all others off.

    With the whole share the embedding counts as well; so do the weights of a model whose layers have other names.
    """
    layers = getattr(model.base_model, "layers", None)
    if layers is not None and share < 1:
        model.requires_grad_(False)
        for layer in layers[len(layers) - max(1, round(share * len(layers))) :]:
            layer.requires_grad_(True)
    found = [(name, w) for name, w in model.named_parameters() if w.requires_grad]
    return [name for name, _ in found], [w for _, w in found]
