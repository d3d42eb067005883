"""The harness through our runtimes. Its own code runs where it is installed; the rest holds everywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from arte_edge.bench import lm_eval as ours
from arte_edge.bench.lm_eval import harness_model, run_lm_eval
from arte_edge.errors import ArteError, InputError
from arte_edge.models import LocalModel

installed = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""
WRITE = """
task: tiny_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: {sample}}}
metric_list:
  - metric: exact_match
"""


class Bigrams:
    """An `Opened` whose next token depends on the last alone: letters a-z are 1-26, a blank 27, a stop 28; BOS 0."""

    name = "bigrams"
    context_tokens = 16
    eos_tokens = stop_tokens = frozenset([29])
    chat_template: str | None = None
    special_tokens: ClassVar[dict[str, str]] = {"bos_token": "^"}
    letters = "^abcdefghijklmnopqrstuvwxyz .$"

    def __init__(self) -> None:
        self.table = np.random.default_rng(0).normal(size=(30, 30)).astype(np.float32)
        self.reads: list[list[int]] = []

    def tokens(self, text: str) -> list[int]:
        return [0, *(self.letters.index(letter) for letter in text)]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        assert len(ids) <= self.context_tokens
        self.reads.append(list(ids))
        return np.stack([self.table[i] for i in ids])

    def render(self, messages: Sequence[Any]) -> str | None:
        return None

    def generate(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        return ["more text. and more"[: max_tokens + 8] for _ in prompts]

    def close(self) -> None: ...

    def expected(self, before: int, tokens: Sequence[int]) -> float:
        total = 0.0
        for token in tokens:
            row = self.table[before].astype(np.float64)
            total += row[token] - np.log(np.exp(row).sum())
            before = token
        return total


def asked(*args: Any) -> list[Any]:
    return [SimpleNamespace(args=args)]


def test_without_the_harness_the_command_to_install_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(ArteError, match="lm-evaluation-harness") as refused:
        run_lm_eval(tmp_path, ["arc_easy"])
    assert "pip install" in refused.value.hint


@installed
def test_likelihoods_are_those_of_the_tokens_after_the_context() -> None:
    model = Bigrams()
    lm = harness_model(model)  # type: ignore[arg-type]
    found = lm.loglikelihood(asked("ab", " cd"))
    assert found[0][0] == pytest.approx(model.expected(2, model.tokens(" cd")[1:]))
    best = model.letters[int(model.table[2].argmax())]
    assert lm.loglikelihood(asked("ab", best))[0][1] is True
    # a blank at the end of the context belongs to what follows
    assert lm.loglikelihood(asked("ab ", "cd")) == found


@installed
def test_choices_of_one_token_share_one_reading_and_long_contexts_lose_their_beginning() -> None:
    model = Bigrams()
    lm = harness_model(model)  # type: ignore[arg-type]
    lm.loglikelihood([*asked("question", "a"), *asked("question", "b")])
    assert len(model.reads) == 1
    found = lm.loglikelihood(asked("x" * 40 + "ab", "cd"))
    assert len(model.reads[-1]) == 16
    assert found[0][0] == pytest.approx(model.expected(2, [3, 4]))


@installed
def test_a_whole_text_longer_than_the_context_is_read_in_windows() -> None:
    model = Bigrams()
    lm = harness_model(model)  # type: ignore[arg-type]
    text = "the quick brown fox jumps over the lazy dog"
    found = lm.loglikelihood_rolling(asked(text))
    assert found == [pytest.approx(model.expected(0, model.tokens(text)[1:]))]
    assert len(model.reads) > 2


@installed
def test_text_ends_before_the_stop_and_samples_are_refused() -> None:
    lm = harness_model(Bigrams())  # type: ignore[arg-type]
    assert lm.generate_until(asked("ab", {"until": ["."], "max_gen_toks": 9})) == ["more text"]
    with pytest.raises(InputError, match="samples"):
        lm.generate_until(asked("ab", {"until": ["."], "do_sample": True, "temperature": 0.7}))
    with pytest.raises(InputError, match="longer than its context"):
        lm.generate_until(asked("a" * 20, {"until": ["."]}))
    with pytest.raises(InputError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "a"}])


@installed
def test_a_task_of_ones_own_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = Bigrams()
    rows = [{"question": q, "label": i % 2, "written": "more text"} for i, q in enumerate(("aa", "bb", "cc"))]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choice.yaml").write_text(CHOICE.format(data=data))
    (tmp_path / "write.yaml").write_text(WRITE.format(data=data, sample="false"))
    monkeypatch.setattr("arte_edge.verify.opened.open_model", lambda path, threads: model)
    said: list[str] = []
    scores = run_lm_eval(
        tmp_path,
        ["tiny_choice", "tiny_write"],
        include=tmp_path,
        progress=lambda what, done, total: said.append(what),
    )
    by = {score.task: score for score in scores}
    right = 0
    for row in rows:
        last = model.tokens(str(row["question"]))[-1]
        chances = [model.expected(last, model.tokens(word)[1:]) for word in (" yes", " no")]
        right += int(np.argmax(chances)) == row["label"]
    assert (by["tiny_choice"].metric, by["tiny_choice"].n) == ("acc", 3)
    assert by["tiny_choice"].value == pytest.approx(right / 3)
    assert (by["tiny_write"].metric, by["tiny_write"].value) == ("exact_match", 1.0)
    assert by["tiny_choice"].harness.startswith("lm_eval 0.") and not by["tiny_choice"].partial
    assert said
    partial = run_lm_eval(tmp_path, ["tiny_choice"], include=tmp_path, limit=2)
    assert (partial[0].n, partial[0].partial) == (2, True)
    with pytest.raises(InputError, match="no task 'tiny_chioce'"):
        run_lm_eval(tmp_path, ["tiny_chioce"], include=tmp_path)


@installed
@pytest.mark.model
def test_a_gguf_file_finds_the_likelier_word(smollm2: LocalModel) -> None:
    pytest.importorskip("llama_cpp")
    from arte_edge.verify.opened import open_model

    assert smollm2.gguf is not None
    model = open_model(smollm2.gguf)
    lm = harness_model(model)
    pairs = [("The capital of France is", " Paris"), ("The capital of France is", " Rome")]
    paris, rome = lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    model.close()
    assert paris[0] > rome[0] and paris[1] is True
