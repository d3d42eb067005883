"""The shared path against the plain one on the real SmolLM2: logits, argmax, answers, scores."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import Patch

from arte_edge.distill.prompts import ANSWER_PREFILL, ANSWER_STOPS, STEP_BY_STEP, Shot, student_messages
from arte_edge.models.resolve import LocalModel, f16_student
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.prompt_render import render
from arte_edge.tasks.answers import extract
from arte_edge.tasks.loaders import load_task

pytest.importorskip("llama_cpp")
from arte_edge.runtimes.choice_scoring import log_softmax_at
from arte_edge.runtimes.llamacpp import engine as llamacpp
from arte_edge.runtimes.llamacpp.bindings import LlamaContext, Row
from arte_edge.runtimes.llamacpp.engine import LlamaCppEngine

pytestmark = pytest.mark.model
K, NEW = 5, 32
SHOTS = [
    Shot("i am cold in here", "The person is cold, so more heating is wanted. <ans>warmer</ans>"),
    Shot("is it going to rain", "Rain is asked about, which is outside. <ans>weather</ans>"),
]


@pytest.fixture(scope="module")
def engine(smollm2: LocalModel) -> Iterator[LlamaCppEngine]:
    """The student's F16 file, with fewer slots than prompts."""
    base = f16_student(smollm2)
    assert base.gguf is not None
    with Patch.context() as patch:
        patch.setenv("ARTE_EDGE_PROBE", "0")
        engine = LlamaCppEngine(base.gguf, sha256=base.sha256, parallel=10)
        yield engine
        engine.close()


def prompts(engine: LlamaCppEngine, opening: str) -> list[str]:
    task = load_task("home_intents")
    return [
        render(engine, student_messages(task, example.input, [shot]), opening)
        for shot in SHOTS
        for example in task.validation[:K]
    ]


def plain(engine: LlamaCppEngine, tokens: list[int], start: int) -> NDArray[np.float32]:
    """Return the logits after tokens `start` … of one sequence, decoded alone from its first token ``[n, v]``."""
    context = LlamaContext(engine.model, 1, 512, engine.threads)
    try:
        rows = [Row(token, at, 0, at >= start) for at, token in enumerate(tokens)]
        return context.decode(rows).copy()
    finally:
        context.close()


def apart(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the root mean square difference of two arrays of logits ``[n, v]`` for each row ``[n]``."""
    return np.sqrt(np.square(left.astype(np.float64) - right).mean(axis=1))


def test_a_batch_writes_what_each_prompt_gets_alone(engine: LlamaCppEngine, monkeypatch: Patch) -> None:
    seen: dict[int, list[NDArray[np.float32]]] = {}
    writers: list[llamacpp._Writer] = []

    class Watched(llamacpp._Writer):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            writers.append(self)

        def draw(self, logits: NDArray[np.float32]) -> int:
            seen.setdefault(id(self), []).append(logits.copy())
            return super().draw(logits)

    monkeypatch.setattr(llamacpp, "_Writer", Watched)
    texts = prompts(engine, STEP_BY_STEP)
    sampling = Sampling(max_tokens=NEW, stop=ANSWER_STOPS)
    done = engine.complete([Request(text) for text in texts], sampling)
    assert all(c.cached_tokens > 150 for c in done)

    answer = load_task("home_intents").answer
    distances: list[float] = []
    same_step, steps, same_answer = 0, 0, 0
    for writer, completion in zip(writers, done, strict=True):
        shared = np.stack(seen[id(writer)])
        n_prompt = completion.prompt_tokens
        # The plain path is led along the same text, so that one near tie does not end the comparison.
        alone = plain(engine, writer.job.tokens[: n_prompt + len(shared) - 1], n_prompt - 1)
        distances += apart(shared, alone).tolist()
        same_step += int((shared.argmax(1) == alone.argmax(1)).sum())
        steps += len(shared)
        tokens = alone.argmax(1).tolist()
        end = next((i for i, token in enumerate(tokens) if engine.model.is_end(token)), len(tokens))
        text = b"".join(engine.model.piece(token) for token in tokens[:end]).decode(errors="replace")
        same_answer += extract(text, answer) == extract(completion.text, answer)
    assert np.median(distances) < 1e-2  # measured 0.009; the furthest single logit of a row 0.04
    assert same_step >= 0.995 * steps
    assert same_answer >= 0.99 * len(texts)


def test_scores_without_writing_are_those_of_the_slow_way(engine: LlamaCppEngine) -> None:
    """`choose` against one decode a token of each choice, to its end where the choices part for good."""
    choices = ["light_on</ans>", "light_off</ans>", "lock</ans>", "weather</ans>"]
    texts = prompts(engine, ANSWER_PREFILL)[::K]
    scores = engine.choose_each(texts, [choices] * len(texts))
    for text, row in zip(texts, scores, strict=True):
        lists = [engine.model.tokens(text + choice) for choice in choices]
        for tokens, score, end in zip(lists, row, _ends(lists), strict=True):
            start = len(engine.model.tokens(text))
            logits = plain(engine, tokens[: end - 1], start - 1)
            slow = sum(float(log_softmax_at(logits[i], [tokens[start + i]])[0]) for i in range(end - start))
            assert score == pytest.approx(slow, abs=3e-2)


def _ends(lists: list[list[int]]) -> list[int]:
    """Return where each list stands alone: one past the last token that another list begins with."""

    def common(a: list[int], b: list[int]) -> int:
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    assert all(a != b for a, b in pairwise(lists))
    return [max(common(a, b) for b in lists if b is not a) + 1 for a in lists]
