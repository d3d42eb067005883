"""Many copies of one small student, trained and asked side by side on one GPU.

A student of 135M parameters keeps a GPU waiting: a training step is a few hundred launches of small
kernels. Here every weight carries a leading axis of m copies, and each product of a layer is one
batched product for all of them, so that sixteen students train in little more than one's time.
Llama's architecture (SmolLM2): RMS norm, rotary positions, grouped queries, SwiGLU, tied embeddings.
`score_worth_measure.py` says what it is for.

Notation: m copies, b rows, t tokens, d width, v vocabulary, h heads, g key-value heads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

__all__ = ["Students", "padded"]

IGNORED = -100
Cache = list[tuple[torch.Tensor, torch.Tensor]]


def padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids ``[b, t]`` and which of them are tokens ``[b, t]``."""
    width = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    real = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        real[i, place] = True
    return ids, real


class Students:
    """`m` copies of a checkpoint's weights."""

    def __init__(self, folder: Path, m: int, device: str) -> None:
        from safetensors.torch import load_file

        config = json.loads((folder / "config.json").read_text())
        self.m, self.device = m, device
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.layers, self.eps = config["num_hidden_layers"], config["rms_norm_eps"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.theta = float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
        weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        weights.pop("lm_head.weight", None)  # tied
        self.base = {k.removeprefix("model."): v.to(device) for k, v in weights.items()}
        self.master = {k: v.expand(m, *v.shape).contiguous() for k, v in self.base.items()}

    def reset(self) -> None:
        """Make every copy the base again."""
        for name, weight in self.master.items():
            weight.detach().copy_(self.base[name].expand_as(weight))

    def cast(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the weights in `dtype`; gradients flow back through the cast."""
        return {name: weight.to(dtype) for name, weight in self.master.items()}

    def hidden(
        self, w: dict[str, torch.Tensor], ids: torch.Tensor, real: torch.Tensor, cache: Cache | None = None
    ) -> torch.Tensor:
        """Return the last hidden states ``[m, b, t, d]`` of `ids` ``[m, b, t]``.

        `real` ``[b or m*b, s + t]`` marks what is a token among the s cached positions and these t.
        """
        m, b, t = ids.shape
        rows = real if real.shape[0] == m * b else real.repeat(m, 1)
        positions = (rows.cumsum(1) - 1).clamp(min=0)[:, -t:]
        past = rows.shape[1] - t
        inside = torch.ones((t, t), dtype=torch.bool, device=ids.device).tril()
        seen = torch.cat([torch.ones((t, past), dtype=torch.bool, device=ids.device), inside], 1)
        mask = seen[None, None] & rows[:, None, None, :]
        mask |= torch.eye(t, past + t, dtype=torch.bool, device=ids.device).roll(past, 1)[None, None]
        if t == 1:
            mask = rows[:, None, None, :]
        frequency = self.theta ** -(
            torch.arange(0, self.head_dim, 2, device=ids.device, dtype=torch.float32) / self.head_dim
        )
        angle = positions[:, None, :, None] * frequency  # [m*b, 1, t, head_dim/2]
        angle = torch.cat([angle, angle], -1)
        embed = w["embed_tokens.weight"]
        flat = ids + embed.shape[1] * torch.arange(m, device=ids.device)[:, None, None]
        x = embed.flatten(0, 1)[flat].view(m, b * t, -1)
        turn = (angle.cos().to(x.dtype), angle.sin().to(x.dtype))
        for i in range(self.layers):
            x = self._layer(w, f"layers.{i}.", x, (m, b, t), turn, mask, cache, i)
        return _norm(x, w["norm.weight"], self.eps).view(m, b, t, -1)

    def _layer(
        self,
        w: dict[str, torch.Tensor],
        at: str,
        x: torch.Tensor,
        shape: tuple[int, int, int],
        turn: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        cache: Cache | None,
        i: int,
    ) -> torch.Tensor:
        m, b, t = shape
        y = _norm(x, w[at + "input_layernorm.weight"], self.eps)
        q, k, v = (
            _linear(y, w[f"{at}self_attn.{name}_proj.weight"]).view(m * b, t, -1, self.head_dim).transpose(1, 2)
            for name in "qkv"
        )
        q, k = _turned(q, *turn), _turned(k, *turn)
        if cache is not None:
            end = mask.shape[-1]
            for kept, fresh in zip(cache[i], (k, v), strict=True):
                kept[:, :, end - t : end] = fresh
            k, v = (kept[:, :, :end] for kept in cache[i])
        if t == 1:  # the queries of a group read one key: no copy of the keys for each
            grouped = q.reshape(m * b, self.groups, -1, self.head_dim)
            y = scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)
        else:
            times = self.heads // self.groups
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
            y = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.transpose(1, 2).reshape(m, b * t, -1)
        x = x + _linear(y, w[at + "self_attn.o_proj.weight"])
        y = _norm(x, w[at + "post_attention_layernorm.weight"], self.eps)
        gate = silu(_linear(y, w[at + "mlp.gate_proj.weight"]))
        return x + _linear(gate * _linear(y, w[at + "mlp.up_proj.weight"]), w[at + "mlp.down_proj.weight"])

    def _cache(self, rows: int, length: int, dtype: torch.dtype) -> Cache:
        shape = (2, self.layers, rows, self.groups, length, self.head_dim)
        both = torch.zeros(shape, dtype=dtype, device=self.device)
        return [(both[0, i], both[1, i]) for i in range(self.layers)]

    def train(
        self, batches: Sequence[Sequence[Sequence[tuple[list[int], int]]]], rate: float, warmup: float
    ) -> list[list[float]]:
        """Train every copy on its own examples; return the losses ``[step][m]``.

        Adam, linear warm-up and decay, gradients clipped at norm 1 for each copy: as `train_sft` does.

        Args:
            batches: ``[step][m][b]`` of (tokens, how many of them are the prompt), which carries no loss.
        """
        for weight in self.master.values():
            weight.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.master.values(), lr=rate, weight_decay=0.0, fused=self.device != "cpu")
        n, up = len(batches), int(warmup * len(batches))
        losses = []
        for step, batch in enumerate(batches):
            scale = (step + 1) / up if step < up else (n - step) / max(n - up, 1)
            optimizer.param_groups[0]["lr"] = rate * scale
            loss = self._loss(batch)
            loss.sum().backward()  # the copies share nothing: each gets its own gradient
            squares = sum(p.grad.flatten(1).square().sum(1) for p in self.master.values() if p.grad is not None)
            factor = (1.0 / (torch.as_tensor(squares).sqrt() + 1e-6)).clamp(max=1.0)
            for weight in self.master.values():
                assert weight.grad is not None
                weight.grad *= factor.view(-1, *[1] * (weight.dim() - 1))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        for weight in self.master.values():
            weight.requires_grad_(False)
        return [row.tolist() for row in losses]

    def _loss(self, batch: Sequence[Sequence[tuple[list[int], int]]]) -> torch.Tensor:
        """Return the mean cross-entropy ``[m]`` of the completions' tokens."""
        flat = [row for rows in batch for row in rows]
        ids, real = padded([tokens for tokens, _ in flat], left=False)
        longest = max(len(tokens) - prompt for tokens, prompt in flat)
        where = torch.zeros((len(flat), longest), dtype=torch.long)
        labels = torch.full((len(flat), longest), IGNORED)
        for i, (tokens, prompt) in enumerate(flat):
            n = len(tokens) - prompt
            where[i, :n] = torch.arange(prompt - 1, len(tokens) - 1)
            labels[i, :n] = torch.tensor(tokens[prompt:])
        m, b = self.m, len(flat) // self.m
        w = self.cast(torch.bfloat16 if self.device != "cpu" else torch.float32)
        ids, real = ids.to(self.device).view(m, b, -1), real.to(self.device)
        hidden = self.hidden(w, ids, real)
        index = where.to(self.device).view(m, b, longest, 1).expand(-1, -1, -1, hidden.shape[-1])
        picked = hidden.gather(2, index).view(m, b * longest, -1)
        logits = _linear(picked, w["embed_tokens.weight"]).float()
        target = labels.to(self.device).view(m, -1)
        each = cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none", ignore_index=IGNORED)
        return each.view(m, -1).sum(1) / (target != IGNORED).sum(1)

    @torch.no_grad()
    def next_logp(
        self, w: dict[str, torch.Tensor], rows: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], tokens: int
    ) -> list[list[list[float]]]:
        """Return ``[m][row][wanted]`` log-probabilities of the tokens `wanted` after each row, for every copy."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: list[list[list[float]]] = [[[] for _ in rows] for _ in range(self.m)]
        at = 0
        while at < len(order):
            end = at + 1
            while end < len(order) and (end + 1 - at) * len(rows[order[end]]) * self.m <= tokens:
                end += 1
            mine = order[at:end]
            ids, real = padded([rows[i] for i in mine], left=True)
            ids, real = ids.to(self.device), real.to(self.device)
            last = self.hidden(w, ids.expand(self.m, -1, -1), real)[:, :, -1]
            logp = _linear(last, w["embed_tokens.weight"]).float().log_softmax(-1)
            width = max(len(wanted[i]) for i in mine)
            index = torch.tensor([[*wanted[i], *[0] * (width - len(wanted[i]))] for i in mine], device=self.device)
            values = logp.gather(2, index.expand(self.m, -1, -1)).tolist()
            for copy, table in enumerate(values):
                for i, row in zip(mine, table, strict=True):
                    found[copy][i] = row[: len(wanted[i])]
            at = end
        return found

    @torch.no_grad()
    def write(
        self, w: dict[str, torch.Tensor], rows: Sequence[Sequence[int]], new: int, ends: frozenset[int], tokens: int
    ) -> list[list[list[int]]]:
        """Return what every copy writes after each row, greedily: ``[m][row]`` of up to `new` tokens."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        size = max(1, tokens // (self.m * (len(rows[order[-1]]) + new)))
        written: list[list[list[int]]] = [[[] for _ in rows] for _ in range(self.m)]
        stop = torch.tensor(sorted(ends), device=self.device)
        for start in range(0, len(order), size):
            mine = order[start : start + size]
            ids, real = padded([rows[i] for i in mine], left=True)
            ids = ids.to(self.device).expand(self.m, -1, -1)
            real = real.to(self.device).repeat(self.m, 1)
            cache = self._cache(len(real), ids.shape[2] + new, w["norm.weight"].dtype)
            hidden = self.hidden(w, ids, real, cache)[:, :, -1]
            steps, over = [], torch.zeros(self.m * len(mine), dtype=torch.bool, device=self.device)
            for step in range(new):
                token = _linear(hidden, w["embed_tokens.weight"]).argmax(-1)  # [m, b]
                steps.append(token)
                over |= torch.isin(token.flatten(), stop)
                if step + 1 == new or (step % 8 == 7 and bool(over.all())):
                    break
                real = torch.cat([real, real.new_ones((len(real), 1))], 1)
                hidden = self.hidden(w, token[:, :, None], real, cache)[:, :, -1]
            table = torch.stack(steps, 2).tolist()
            for copy in range(self.m):
                for i, row in zip(mine, table[copy], strict=True):
                    written[copy][i] = row
        return written


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``[m, n, out]`` of x ``[m, n, in]`` and weight ``[m, out, in]``."""
    return torch.bmm(x, weight.transpose(1, 2))


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight[:, None]


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
