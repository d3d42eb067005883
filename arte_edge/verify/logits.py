"""Fidelity metrics: an artifact's next-token distributions against the reference's, their checks, and the prompts.

With p the reference's distribution at a position and q the artifact's, over v tokens:

- divergence: KL(p‖q) = Σ p·(log p − log q) in nats (S. Kullback and R. A. Leibler, Ann. Math. Stat. 22 (1951)
  79–86); its mean, and its 99th percentile over all positions (type 7 of R. J. Hyndman and Y. Fan, Am. Stat.
  50 (1996) 361–365).
- agreement: share of positions at which both have the same most likely token.
- perplexity: exp of the mean negative log-probability of the following token (F. Jelinek et al., J. Acoust.
  Soc. Am. 62 (1977) S63). The ratio is exp(mean(log p(x) − log q(x))): paired token by token, so it is far
  less noisy than either perplexity.

A student that is tuned on answers alone drifts on the tokens of prompts, which its training does not weigh: there it
is sharp at random, so rounding costs many nats of what nobody reads. Where enough answers were compared, those are held
to the limits, and all tokens to looser ones: two swapped tensors of a tuned SmolLM2-135M left 28 of 32 answers as they
were, with 0.08 nats a token, but cost 1.07 over all tokens (a good Q4_K_M file: 0.006 and 0.09).

The prompts are a task's held-out examples, rendered as for the student and followed by the correct answer as the
student writes it; or a user's file; or built-in dialogues, which were written for this and are in no training set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from arte_edge.asking.form import Asking, held_form, plain_template
from arte_edge.errors import ArteError, InputError
from arte_edge.files import json_loads
from arte_edge.runtimes.prompt_render import Message, Templated, render
from arte_edge.runtimes.protocol import Runtime
from arte_edge.tasks.task import Task
from arte_edge.verify.check import Check, Thresholds
from arte_edge.verify.tokenizer import first_difference

Progress = Callable[[str, int, int], None]  # (step, done, total)
_ROWS = 64  # positions per block: sums are 64-bit, and a vocabulary may have 262,144 tokens
MAX_PROMPT_TOKENS = 512
_TASK_PROMPTS = 48
_DIALOGUES: list[dict[str, str]] = json_loads(Path(__file__).with_name("dialogues.json").read_text("utf-8"))
_ENOUGH_ANSWERS = 32  # a hundred positions or so, for labels


@dataclass(frozen=True)
class Compared:
    """One prompt of n tokens, position by position."""

    kl: NDArray[np.float64]  # [n], nats
    same_top: NDArray[np.bool_]  # [n]
    nll_reference: NDArray[np.float64]  # [n - 1], nats, of the following tokens
    nll_artifact: NDArray[np.float64]  # [n - 1]
    following: NDArray[np.intp]  # [n - 1], those tokens

    def after(self, n: int) -> Compared:
        """Return the comparison without the first `n` positions."""
        return Compared(
            self.kl[n:], self.same_top[n:], self.nll_reference[n:], self.nll_artifact[n:], self.following[n:]
        )


@dataclass(frozen=True)
class Fidelity:
    """Metrics over all prompts. Divergences in nats per token; infinite if the artifact's logits are not finite."""

    n_prompts: int
    n_tokens: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    perplexity_reference: float
    perplexity_ratio: float
    perplexity_ratio_error: float = field(metadata={"is": "standard error of log(perplexity_ratio)"})
    answers: Fidelity | None = None  # where the reference writes its answers, see `measure_answers`


def compare_logits(reference: NDArray[np.float32], artifact: NDArray[np.float32], ids: Sequence[int]) -> Compared:
    """Compare logits ``[n, v]`` after each of n `ids`, on the tokens that both vocabularies have.

    Raises ValueError: the two do not have n rows each.
    """
    n = len(ids)
    if reference.shape[0] != n or artifact.shape[0] != n:
        raise ValueError(f"{n} tokens, but {reference.shape[0]} and {artifact.shape[0]} rows of logits")
    width = min(reference.shape[1], artifact.shape[1])
    kl, same, nll_p, nll_q = np.empty(n), np.empty(n, dtype=np.bool_), np.empty(n), np.empty(n)
    following = np.append(np.asarray(ids[1:], dtype=np.intp), 0)  # the last position has none
    for start in range(0, n, _ROWS):
        part = slice(start, min(start + _ROWS, n))
        log_p, log_q = _log_softmax(reference[part, :width]), _log_softmax(artifact[part, :width])
        p = np.exp(log_p)
        # A token with p = 0 adds nothing, whatever its q.
        terms = np.multiply(p, log_p - log_q, out=np.zeros_like(p), where=p > 0)
        kl[part] = terms.sum(axis=1)
        same[part] = log_p.argmax(axis=1) == log_q.argmax(axis=1)
        rows = np.arange(log_p.shape[0])
        nll_p[part], nll_q[part] = -log_p[rows, following[part]], -log_q[rows, following[part]]
    # KL is never negative; rounding gives -1e-17 for equal distributions.
    return Compared(np.maximum(kl, 0.0), same, nll_p[:-1], nll_q[:-1], following[:-1])


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    values: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return values


def measure_fidelity(
    reference: Runtime, artifact: Runtime, prompts: Sequence[str], progress: Progress | None = None
) -> Fidelity:
    """Compare both models on the first 512 tokens of each prompt, tokenized by the reference.

    Positions of a prefix that several prompts share count once.

    Raises InputError: no prompt has two tokens, or the artifact lacks one of the tokens.
    """
    limit = min(MAX_PROMPT_TOKENS, reference.context_tokens, artifact.context_tokens)
    texts = [ids[:limit] for ids in map(reference.tokenize, prompts) if len(ids) > 1]
    texts = [ids for i, ids in enumerate(texts) if _shared_prefix(ids, texts[:i]) < len(ids) - 1]
    if not texts:
        raise InputError("No usable prompt: each needs at least two tokens", "Give longer prompts with --prompts.")
    compared = []
    for done, ids in enumerate(texts):
        if progress is not None:
            progress("comparing logits", done, len(texts))
        with np.errstate(invalid="ignore", over="ignore"):  # damaged weights give NaN: that is a result
            found = compare_logits(reference.logits(ids), artifact.logits(ids), ids)
        compared.append(found.after(_shared_prefix(ids, texts[:done])))
    return summarize(compared)


def measure_answers(
    reference: Runtime, artifact: Runtime, answers: Sequence[tuple[str, str]], progress: Progress | None = None
) -> Fidelity | None:
    """Compare both models at the positions where the reference writes: on its own `answers`, each behind its prompt.

    The end of an answer is one of them. None: there are fewer than 32 in texts that are short enough.
    """
    limit = min(MAX_PROMPT_TOKENS, reference.context_tokens, artifact.context_tokens)
    compared = []
    for done, (prompt, text) in enumerate(answers):
        if progress is not None:
            progress("comparing answers", done, len(answers))
        ids = reference.tokenize(prompt + text)
        first = max(0, first_difference(reference.tokenize(prompt), ids) - 1)  # predicts the first token
        if len(ids) <= limit:
            with np.errstate(invalid="ignore", over="ignore"):
                rows, others = (model.logits(ids)[first:] for model in (reference, artifact))
                compared.append(compare_logits(rows, others, ids[first:]))
    return summarize(compared) if len(compared) >= _ENOUGH_ANSWERS else None


def _shared_prefix(ids: Sequence[int], earlier: Sequence[Sequence[int]]) -> int:
    """Return the length of the longest prefix of `ids` that begins an earlier text too.

    Otherwise the system turn of all chat prompts would be counted once a prompt, and a few positions would
    determine the 99th percentile.
    """
    return max((first_difference(ids, other) for other in earlier), default=0)


def summarize(compared: Sequence[Compared]) -> Fidelity:
    """Compute the metrics over all prompts.

    Raises ArteError: the reference's own logits are not finite.
    """
    kl = np.concatenate([c.kl for c in compared])
    nll_p = np.concatenate([c.nll_reference for c in compared])
    if not np.isfinite(nll_p).all():
        raise ArteError("The reference model's own logits are not finite", "Its weights are damaged.")
    gap = np.concatenate([c.nll_artifact for c in compared]) - nll_p
    finite = bool(np.isfinite(kl).all() and np.isfinite(gap).all())
    return Fidelity(
        n_prompts=len(compared),
        n_tokens=len(kl),
        kl_mean=float(kl.mean()) if finite else float("inf"),
        kl_p99=float(np.percentile(kl, 99)) if finite else float("inf"),
        kl_max=float(kl.max()) if finite else float("inf"),
        top1=float(np.concatenate([c.same_top for c in compared]).mean()) if finite else 0.0,
        perplexity_reference=float(np.exp(min(nll_p.mean(), 700.0))),
        perplexity_ratio=float(np.exp(min(gap.mean(), 700.0))) if finite else float("inf"),
        perplexity_ratio_error=_ratio_error(compared) if finite else float("inf"),
    )


def _ratio_error(compared: Sequence[Compared]) -> float:
    """Return the standard error of the mean log-ratio over all tokens, NaN for a single prompt.

    Tokens of one prompt vary together, and so do occurrences of one token (the answer format is in every prompt). With
    both clusterings the variance is that over prompts plus that over token ids minus that over their intersections (A.
    C. Cameron, J. B. Gelbach and D. L. Miller, J. Bus. Econ. Stat. 29 (2011) 238–249), and not less than either alone.
    """
    if len(compared) < 2:
        return float("nan")
    gap = np.concatenate([c.nll_artifact - c.nll_reference for c in compared])
    prompt = np.repeat(np.arange(len(compared)), [len(c.following) for c in compared])
    token = np.concatenate([c.following for c in compared])
    residual = gap - gap.mean()
    over_prompts, over_tokens = _variance(residual, prompt), _variance(residual, token)
    both = _variance(residual, prompt * (int(token.max()) + 1) + token)
    return float(np.sqrt(max(over_prompts + over_tokens - both, over_prompts, over_tokens)))


def _variance(residual: NDArray[np.float64], cluster: NDArray[np.intp]) -> float:
    """Return the variance of a mean whose terms are correlated within clusters."""
    _, index = np.unique(cluster, return_inverse=True)
    sums = np.bincount(index, weights=residual)
    k = len(sums)
    return float(k / max(k - 1, 1) * np.sum(sums**2) / len(residual) ** 2)


_ONE_SIDED_95 = 1.645  # standard normal quantile
_GIBBERISH_KL = 1.0  # nats: more than 2-bit types lose on the models measured


def fidelity_checks(found: Fidelity, limits: Thresholds) -> list[Check]:
    """Return the checks, with the most likely cause if they fail: of all tokens, and of the answers if compared.

    Answers are held to `limits`, and all tokens to `limits.drift` times the mean divergence alone, unless that is 1.
    The perplexity ratio fails only if it exceeds its threshold by more than its noise (one-sided, 95 %): on a thousand
    tokens the noise can be as large as the threshold of an 8-bit type. That of answers is not checked: the reference
    chose their tokens, so the artifact's can only be worse.
    """
    if found.answers is None or limits.drift == 1:
        return _checks(found, limits)
    mean = None if limits.kl_mean is None or limits.drift is None else limits.drift * limits.kl_mean
    drifted = Thresholds(kl_mean=mean)
    return [*_checks(found, drifted), *_checks(found.answers, limits, ", answers")[:3]]


def _checks(found: Fidelity, limits: Thresholds, of: str = "") -> list[Check]:
    cause = _cause(found)
    noise = found.perplexity_ratio_error if math.isfinite(found.perplexity_ratio_error) else 0.0
    least_ratio = found.perplexity_ratio * math.exp(-_ONE_SIDED_95 * noise)
    sample = f"{found.n_tokens} tokens of {found.n_prompts} {'answers' if of else 'prompts'}"
    rows: tuple[tuple[str, float, float | None, bool, str], ...] = (
        ("kl mean", found.kl_mean, limits.kl_mean, _within(found.kl_mean, limits.kl_mean), sample),
        ("kl p99", found.kl_p99, limits.kl_p99, _within(found.kl_p99, limits.kl_p99), f"max {found.kl_max:.3g}"),
        ("top-1 agreement", found.top1, limits.top1, _within(-found.top1, limits.top1, -1), ""),
        (
            "perplexity ratio",
            found.perplexity_ratio,
            limits.perplexity_ratio,
            _within(least_ratio, limits.perplexity_ratio),
            f"standard error {noise:.2%}",
        ),
    )
    checks: list[Check] = []
    for name, value, limit, passed, note in rows:
        bound: Literal["at least", "at most"] = "at least" if name == "top-1 agreement" else "at most"
        if not passed:
            is_first = all(check.passed for check in checks)  # give the cause only once
            note = f"{value:.4g}, not {bound} {limit:g}" + (f": {cause}." if is_first else ".")
        checks.append(Check(name + of, value, limit, passed, note, bound))
    return checks


def _within(value: float, limit: float | None, sign: int = 1) -> bool:
    return limit is None or value <= sign * limit


def _cause(found: Fidelity) -> str:
    if found.kl_mean == float("inf"):
        return "the artifact's logits are not finite, so a tensor holds damaged values"
    if found.kl_mean > _GIBBERISH_KL or found.top1 < 0.3:
        return (
            "far more than rounding errors: weights are damaged, missing, of another model, "
            "or in the wrong layout (such as attention heads that were not permuted)"
        )
    return (
        "more than this type may lose. Either the type is too small for this model (use a larger one, or an "
        "importance matrix), or the weights were rounded twice (such as an adapter merged into a 4-bit base), "
        "a tensor is damaged, or the weights are not the reference's"
    )


class Prompted(Templated, Protocol):
    """A model with its own chat template, or without one; `render` as in `arte_edge.runtimes.protocol.Runtime`."""

    def render(self, messages: Sequence[Message]) -> str | None: ...


def built_in_prompts(reference: Templated) -> list[str]:
    """Return sixteen short dialogues with answers in the reference's own format: about 1,500 tokens."""
    return [
        rendered(reference, [{"role": "user", "content": dialogue["question"]}]) + dialogue["answer"]
        for dialogue in _DIALOGUES
    ]


def task_prompts(reference: Prompted, task: Task, limit: int = _TASK_PROMPTS) -> list[str]:
    """Return the prompts of up to `limit` validation examples, each with its correct answer.

    Raises InputError: the task has no validation examples.
    """
    if not task.validation:
        raise InputError(f"Task '{task.name}' has no validation examples", "Label some in validation.jsonl.")
    form = held_form(reference, task)
    asking = Asking.of(task, form or "answer", len)  # of its budget nothing is used
    front = [] if form else [{"role": "system", "content": asking.instruction}]
    return [
        rendered(reference, [*front, *asking.messages(example.input)]) + asking.completion(example.target)
        for example in task.validation[:limit]
    ]


def rendered(model: Templated, messages: Sequence[Message]) -> str:
    """Return the prompt of a conversation; without a chat template a model gets `plain_template`'s.

    Raises InputError: the template does not render.
    """
    if model.chat_template is None:
        model = _Plain(plain_template(model.special_tokens), model.special_tokens)
    return render(model, messages)


@dataclass(frozen=True)
class _Plain:
    chat_template: str
    special_tokens: dict[str, str]


def prompts_from_file(path: Path) -> list[str]:
    """Return the rendered prompts in a file: ``prompt``, ``text`` or ``input`` of ``.jsonl`` rows, else lines.

    Raises InputError: the file cannot be read, or is empty.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}", "Give a UTF-8 text file.") from error
    prompts = [_row(path, n, line) for n, line in enumerate(lines, 1)] if path.suffix == ".jsonl" else lines
    if not prompts:
        raise InputError(f"{path}: contains no prompts", "Write one prompt a line.")
    return prompts


def _row(path: Path, number: int, line: str) -> str:
    try:
        row = json_loads(line)
    except ValueError as error:
        raise InputError(f"{path}:{number}: not JSON: {error}", "Write one JSON object a line.") from error
    texts = [row[key] for key in ("prompt", "text", "input") if key in row] if isinstance(row, dict) else [row]
    if not texts or not isinstance(texts[0], str):
        raise InputError(f"{path}:{number}: no text", "A row needs `prompt`, `text` or `input`, or is a string.")
    return texts[0]


def prompts_for(model: Prompted, task: Task | None, file: Path | None) -> list[str]:
    """Return the prompts of a user's file if given, else of the task, else the built-in ones."""
    if file is not None:
        return prompts_from_file(file)
    return built_in_prompts(model) if task is None else task_prompts(model, task)
