"""A second opinion on a file's answers: EleutherAI's lm-evaluation-harness, asked through our own runtimes.

The harness asks three things of a model: how likely a continuation is, how likely a whole text is,
and what comes next, greedily. All of them follow from logits and `generate`, so every format
works, and torch is not needed. Tokens are the runtime's own. What does not work: tasks that
draw samples (temperature above zero), and tasks whose data must be fetched where there is no network.

https://github.com/EleutherAI/lm-evaluation-harness (`pip install lm_eval`; it brings `datasets`,
scikit-learn and much else, so it is an extra of its own and no part of the device's install).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import ArteError, InputError
from arte_edge.verify.opened import Opened

__all__ = ["HarnessScore", "harness_model", "run_lm_eval"]

Progress = Callable[[str, int, int], None]

_GENERATE_TOKENS = 256  # the harness' own default


@dataclass(frozen=True)
class HarnessScore:
    """One figure of one task, as the harness names and computes it."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int
    partial: bool
    harness: str  # lm_eval 0.4.13


def run_lm_eval(
    path: Path,
    tasks: Sequence[str],
    *,
    threads: int | None = None,
    limit: int = 0,
    n_shot: int | None = None,
    chat: bool = False,
    include: Path | None = None,
    progress: Progress | None = None,
) -> list[HarnessScore]:
    """Let the harness evaluate the model at `path` and return its figures.

    Args:
        path: a GGUF file, an ONNX folder or a checkpoint folder.
        tasks: names as of ``lm_eval ls tasks``, or of the files in `include`.
        limit: examples a task, for trying out; 0: all.
        n_shot: worked examples before each; None takes the task's own number.
        chat: put the requests into the model's chat template.
        include: a folder of task files (YAML) of one's own. They may hold Python code, which the harness runs.
        progress: is told which requests are done.

    Raises:
        ArteError: the harness is not installed, or fails.
        InputError: no such task, or a task that asks for what we do not do.
    """
    if find_spec("lm_eval") is None:
        raise ArteError(
            "--lm-eval needs lm-evaluation-harness, which is not installed",
            "pip install 'arte-edge[lm-eval]'",
        )
    import importlib

    from arte_edge.verify.opened import open_model

    evaluator: Any = importlib.import_module("lm_eval.evaluator")
    manager = _manager(tasks, include)
    model = open_model(path, threads)
    try:
        results: dict[str, Any] = evaluator.simple_evaluate(
            model=harness_model(model, progress),
            tasks=list(tasks),
            num_fewshot=n_shot,
            limit=limit or None,
            apply_chat_template=chat,
            task_manager=manager,
            log_samples=False,
        )
    except ArteError:
        raise
    except Exception as error:  # whatever a task, its data or its metric raises
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArteError(
            f"lm-evaluation-harness failed on {', '.join(tasks)}: {first}",
            "A task's data comes from the Hub: is it reachable, or in the cache?",
        ) from error
    finally:
        model.close()
    return _scores(results, limit)


def _manager(tasks: Sequence[str], include: Path | None) -> Any:
    """Return the harness' index of tasks, of one's own alone where they are enough: all of it takes long to read."""
    import importlib

    make: Any = importlib.import_module("lm_eval.tasks").TaskManager
    folder = None if include is None else str(include)
    unknown = list(tasks)
    for defaults in (False, True) if folder else (True,):
        manager = make(include_path=folder, include_defaults=defaults)
        known = set(manager.all_tasks)
        unknown = [task for task in tasks if task not in known]
        if not unknown:
            return manager
    raise InputError(
        f"lm-evaluation-harness has no task '{unknown[0]}'", "lm_eval ls tasks lists those it has."
    )


def _scores(results: dict[str, Any], limit: int) -> list[HarnessScore]:
    import importlib.metadata

    version = f"lm_eval {importlib.metadata.version('lm_eval')}"
    scores = []
    for task, values in results["results"].items():
        counts = results["n-samples"].get(task, {})
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, bool | str):
                continue
            error = values.get(f"{metric}_stderr,{name}")
            scores.append(
                HarnessScore(
                    task=task,
                    metric=metric,
                    filter=name,
                    value=float(value),
                    stderr=float(error) if isinstance(error, int | float) else None,
                    n=int(counts.get("effective", 0)),
                    partial=bool(limit) and counts.get("effective", 0) < counts.get("original", 0),
                    harness=version,
                )
            )
    return scores


def harness_model(model: Opened, progress: Progress | None = None) -> Any:
    """Return `model` as the harness' ``TemplateLM``."""
    import importlib

    base: Any = importlib.import_module("lm_eval.api.model").TemplateLM
    utils: Any = importlib.import_module("lm_eval.utils")

    class Harnessed(base):  # type: ignore[misc]
        """What the harness calls; names and argument order are its own."""

        tokenizer = None

        def __init__(self) -> None:
            super().__init__()
            ends = sorted(model.eos_tokens or model.stop_tokens)
            self._end = ends[0] if ends else 0
            # What the runtime puts before every text: BOS, for families that have one.
            self._begin = list(model.tokens(""))
            # A text without a context is scored after BOS, even where the runtime adds none (as the harness' hf does).
            bos = model.special_tokens.get("bos_token", "")
            named = list(model.tokens(bos))[-1:] if bos else []
            self._prefix = (self._begin[:1] or named or [self._end])[0]
            self._last: tuple[list[int], NDArray[np.float32]] | None = None

        @property
        def eot_token_id(self) -> int:
            return self._end

        @property
        def prefix_token_id(self) -> int:
            return self._prefix

        @property
        def tokenizer_name(self) -> str:
            return str(model.name)

        def chat_template(self, chat_template: bool | str = False) -> str:
            return model.chat_template or ""

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            if not add_generation_prompt:
                raise InputError(f"{model.name}: this task starts the answer itself, which --lm-eval cannot")
            text = model.render(chat_history)
            if text is None:
                raise InputError(f"{model.name} has no chat template", "Evaluate it without.")
            return text

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            ids = list(model.tokens(string))
            n = len(self._begin)
            return ids[n:] if add_special_tokens is False and n and ids[:n] == self._begin else ids

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return found

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            return [self._one(i, len(requests), *request[1:]) for i, request in enumerate(requests)]

        def _one(
            self, number: int, total: int, context: list[int], continuation: list[int]
        ) -> tuple[float, bool]:
            if progress is not None:
                progress(f"likelihoods of {model.name}", number, total)
            ids = (context + continuation)[-(model.context_tokens + 1) :][:-1]
            if self._last is None or self._last[0] != ids:  # choices of one token share their context
                self._last = (ids, model.logits(ids))
            rows = self._last[1][len(ids) - len(continuation) :]
            return _log_probability(rows, continuation)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for i, request in enumerate(requests):
                windows = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=model.context_tokens,
                    context_len=1,
                )
                pairs = [utils.make_disjoint_window(window) for window in windows]
                totals.append(sum(self._one(i, len(requests), *window)[0] for window in pairs))
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [self._write(i, len(requests), *request.args) for i, request in enumerate(requests)]

        def _write(self, number: int, total: int, context: str, options: dict[str, Any]) -> str:
            if progress is not None:
                progress(f"answers of {model.name}", number, total)
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise InputError("This task draws samples, and --lm-eval writes greedily", "Leave it out.")
            until = options.get("until") or ()
            stops = tuple(filter(None, [until] if isinstance(until, str) else until))
            room = model.context_tokens - len(model.tokens(context))
            if room < 1:
                raise InputError(f"{model.name}: a prompt of this task is longer than its context")
            most = min(room, int(options.get("max_gen_toks", _GENERATE_TOKENS)))
            text = model.generate([context], most, stops)[0]
            found = [at for stop in stops if (at := text.find(stop)) >= 0]
            return text[: min(found)] if found else text

    return Harnessed()


def _log_probability(logits: NDArray[np.float32], tokens: Sequence[int]) -> tuple[float, bool]:
    """Return Σ log p of `tokens` under the rows of `logits` ``[n, v]``, and whether each is the most likely one."""
    total, greedy = 0.0, True
    for row, token in zip(logits, tokens, strict=True):
        values = row.astype(np.float64)
        top = values.max()
        total += float(values[token] - top - np.log(np.exp(values - top).sum()))
        greedy = greedy and int(values.argmax()) == token
    return total, greedy
