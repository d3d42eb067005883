from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.asking.form import Form, instruction, with_instruction
from arte_edge.errors import ArteError, InputError
from arte_edge.runtimes.prompt_render import render
from arte_edge.tasks.task import Answer, Example, Task
from arte_edge.verify.check import thresholds_for
from arte_edge.verify.logits import (
    MAX_PROMPT_TOKENS,
    built_in_prompts,
    compare_logits,
    fidelity_checks,
    measure_answers,
    measure_fidelity,
    prompts_from_file,
    summarize,
    task_prompts,
)


def logits(rows: int, vocabulary: int, seed: int, scale: float = 2.0) -> Any:
    return (scale * np.random.default_rng(seed).standard_normal((rows, vocabulary))).astype(np.float32)


def test_divergence_and_perplexity_match_a_calculation_by_hand() -> None:
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 + 1/4 ln 1/2 = 1/4 ln 2
    p, q = np.log([[0.5, 0.25, 0.25]] * 2), np.log([[0.25, 0.5, 0.25]] * 2)
    found = compare_logits(p.astype(np.float32), q.astype(np.float32), [2, 1])
    np.testing.assert_allclose(found.kl, np.log(2) / 4, rtol=1e-6)
    assert not found.same_top.any()
    total = summarize([found])
    # the following token is 1: 1/4 for p, 1/2 for q
    assert total.perplexity_reference == pytest.approx(4.0)
    assert total.perplexity_ratio == pytest.approx(0.5)
    assert total.n_tokens == 2


def test_a_long_text_gives_the_same_as_its_parts() -> None:
    ids = list(np.random.default_rng(1).integers(0, 30, 200))
    p, q = logits(200, 30, 2), logits(200, 30, 3)
    whole = compare_logits(p, q, ids)
    rows = [compare_logits(p[i : i + 1], q[i : i + 1], [0]).kl[0] for i in range(200)]
    np.testing.assert_allclose(whole.kl, rows)


@given(st.integers(0, 10_000), st.floats(0.0, 40.0), st.floats(-50, 50))
def test_divergence_is_never_negative_and_zero_for_equal_distributions(seed: int, scale: float, shift: float) -> None:
    p, q = logits(3, 17, seed, scale), logits(3, 17, seed + 1, scale)
    assert (compare_logits(p, q, [1, 2, 3]).kl >= 0).all()
    same = compare_logits(p, p + np.float32(shift), [1, 2, 3])  # a constant added to all logits changes nothing
    np.testing.assert_allclose(same.kl, 0.0, atol=1e-9)
    assert summarize([compare_logits(p, p, [1, 2, 3])]).perplexity_ratio == 1.0


def test_a_vocabulary_padded_on_one_side_is_compared_on_the_tokens_both_have() -> None:
    p = logits(4, 20, 5)
    padded = np.concatenate([p, np.full((4, 12), 3.0, dtype=np.float32)], axis=1)
    assert summarize([compare_logits(p, padded, [1, 2, 3, 4])]).kl_mean < 1e-9


@pytest.mark.parametrize(("side", "value", "kl"), [("p", -np.inf, "finite"), ("q", np.nan, "inf"), ("p", np.nan, "")])
def test_values_that_are_not_finite(side: str, value: float, kl: str) -> None:
    p, q = logits(3, 6, 7), logits(3, 6, 8)
    (p if side == "p" else q)[1, 5] = value
    with np.errstate(invalid="ignore"):
        compared = [compare_logits(p, q, [1, 2, 3])]
        if not kl:  # a damaged reference
            with pytest.raises(ArteError, match="reference"):
                summarize(compared)
            return
        found = summarize(compared)
    if kl == "finite":  # a token of probability zero
        assert np.isfinite(found.kl_mean)
    else:
        assert found.kl_mean == found.kl_p99 == found.perplexity_ratio == float("inf")
        assert found.top1 == 0.0


def test_a_wrong_number_of_rows_is_rejected() -> None:
    with pytest.raises(ValueError, match="3 tokens"):
        compare_logits(logits(3, 5, 0), logits(2, 5, 0), [1, 2, 3])


def test_the_error_of_the_ratio_shrinks_with_the_square_root_of_the_prompts() -> None:
    rng = np.random.default_rng(0)

    def error(n_prompts: int) -> float:
        ids = rng.integers(0, 12, (n_prompts, 20)).tolist()
        pairs = ((logits(20, 12, i), logits(20, 12, i + 999)) for i in range(n_prompts))
        found = summarize([compare_logits(p, q, ids[i]) for i, (p, q) in enumerate(pairs)])
        return found.perplexity_ratio_error

    assert np.isnan(error(1))
    assert error(256) == pytest.approx(error(16) / 4, rel=0.5)


def test_a_shift_of_one_token_in_all_prompts_counts_as_noise() -> None:
    # Sixteen prompts with one token each that the artifact finds less likely: one observation, not sixteen.
    def error(tokens: list[int]) -> float:
        p = np.zeros((2, 40), dtype=np.float32)
        pairs = []
        for i, token in enumerate(tokens):
            q = p.copy()
            q[0, token] = -1.0 if i % 2 else 0.0
            pairs.append(compare_logits(p, q, [1, token]))
        return summarize(pairs).perplexity_ratio_error

    shared = error([7 if i % 2 else 8 for i in range(16)])
    assert shared > 2 * error(list(range(2, 18)))


@dataclass
class FakeRuntime:
    """A runtime whose tokens are letters and whose logits depend on the whole text before."""

    noise: float = 0.0
    context_tokens: int = 10_000
    seen: list[list[int]] = field(default_factory=list)

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) % 32 for letter in text]

    def logits(self, ids: Sequence[int]) -> Any:
        self.seen.append(list(ids))
        rows = [np.random.default_rng([*ids[: i + 1]]).standard_normal(32) for i in range(len(ids))]
        extra = [self.noise * np.random.default_rng([7, *ids[: i + 1]]).standard_normal(32) for i in range(len(ids))]
        return (np.array(rows) + np.array(extra)).astype(np.float32)


def measure(prompts: list[str], **options: Any) -> Any:
    return measure_fidelity(FakeRuntime(**options), FakeRuntime(0.3), prompts)  # type: ignore[arg-type]


def test_a_shared_prefix_counts_once() -> None:
    head = "you are a helpful assistant "
    found = measure([head + "one two", head + "three"])
    assert found.n_tokens == len(head + "one two") + len("three")
    assert found.n_prompts == 2
    twice = measure([head + "one two", head + "three", head + "one two"])
    assert twice.kl_mean == found.kl_mean and twice.n_prompts == 2


def test_a_long_prompt_is_truncated_and_a_short_one_skipped() -> None:
    assert measure(["ab" * 600, "a", ""]).n_tokens == MAX_PROMPT_TOKENS
    assert measure(["ab" * 600], context_tokens=64).n_tokens == 64
    with pytest.raises(InputError, match="two tokens"):
        measure(["a", ""])


QUESTIONS = [chr(97 + i % 26) * (i % 7 + 1) + chr(97 + i // 7) + "?" for i in range(40)]


@dataclass
class Drifts(FakeRuntime):
    """Differs from the reference on one side of the question mark alone."""

    on_prompts: bool = True

    def logits(self, ids: Sequence[int]) -> Any:
        good, drifted = FakeRuntime().logits(ids), super().logits(ids)
        first = ids.index(ord("?") % 32)
        drifts = (np.arange(len(ids)) < first) == self.on_prompts
        return np.where(drifts[:, None], drifted, good)


@pytest.mark.parametrize(
    ("type", "drift", "on_prompts", "failing"),
    [
        ("Q4_K_M", 0.95, True, set()),
        ("Q4_K_M", 2.0, True, {"kl mean"}),  # more than any tuning: a wrong tensor
        ("Q4_K_M", 0.8, False, {"kl mean, answers", "top-1 agreement, answers"}),
        ("F16", 0.95, True, {"kl mean", "kl p99", "top-1 agreement", "perplexity ratio"}),
        ("BF16", 0.95, True, {"kl mean", "kl p99", "top-1 agreement", "perplexity ratio"}),
    ],
)
def test_where_answers_are_compared_they_are_held_to_the_limits_except_for_full_width(
    type: str, drift: float, on_prompts: bool, failing: set[str]
) -> None:
    pair: Any = FakeRuntime(), Drifts(drift, on_prompts=on_prompts)
    texts = [(question, "yes") for question in QUESTIONS]
    answers = measure_answers(*pair, texts)
    assert answers is not None and (answers.n_prompts, answers.n_tokens) == (40, 160), "y, e, s and the end"
    assert (answers.kl_mean == 0) == on_prompts
    whole = replace(measure_fidelity(*pair, [*map("".join, texts)]), answers=answers)
    assert whole.kl_mean > 0.2 if on_prompts else whole.kl_mean > 0
    checks = fidelity_checks(whole, thresholds_for(type))
    assert {check.name for check in checks if not check.passed} == failing
    assert {check.name for check in checks} >= {"kl mean", "perplexity ratio"}, "reported all the same"
    assert measure_answers(*pair, texts[:31]) is None, "too few to decide"


CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


class Chat:
    special_tokens = {"bos_token": "<s>"}  # noqa: RUF012

    def __init__(self, chat_template: str | None = CHAT) -> None:
        self.chat_template = chat_template

    def render(self, messages: Sequence[Any]) -> str | None:
        return None if self.chat_template is None else render(self, messages)


def test_built_in_prompts_have_questions_and_answers_in_the_model_s_format() -> None:
    chat, plain = built_in_prompts(Chat()), built_in_prompts(Chat(None))
    assert len(chat) == len(plain) >= 12
    assert all("[assistant]" in prompt and not prompt.endswith("[assistant]") for prompt in chat)
    assert all(prompt.startswith("<s>Question: ") and "[assistant]" not in prompt for prompt in plain)


def parity(n: int = 9) -> Task:
    def fail() -> tuple[Example, ...]:
        raise AssertionError("the test split was read")

    return Task(
        name="t",
        description="Say it.",
        answer=Answer(kind="boolean"),
        techniques=(),
        seed=(),
        validation=tuple(Example(f"q{i}", "True") for i in range(n)),
        test_loader=fail,
    )


@pytest.mark.parametrize(
    ("form", "answer"),
    [("answer", "True"), ("answer-first", "<ans>True</ans>"), ("reasoning-first", "<ans>True</ans>")],
)
def test_task_prompts_are_bare_validation_examples_with_answers_as_the_student_writes_them(
    form: Form, answer: str
) -> None:
    text = instruction(parity(), form)
    prompts = task_prompts(Chat(with_instruction(CHAT, text, {})), parity(), 4)
    assert prompts == [f"[system]{text}[user]q{i}[assistant]{answer}" for i in range(4)]


def test_other_models_are_shown_the_instruction() -> None:
    text = instruction(parity(), "answer")
    assert task_prompts(Chat(), parity(), 1) == [f"[system]{text}[user]q0[assistant]True"]
    assert task_prompts(Chat(None), parity(), 1) == [f"<s>{text}\n\nQuestion: q0\nAnswer:\nTrue"]


def test_prompts_come_from_lines_or_rows(tmp_path: Path) -> None:
    lines, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    lines.write_text("one two\n\nthree\n", encoding="utf-8")
    rows.write_text('{"prompt": "p"}\n{"text": "t"}\n{"input": "i", "target": "x"}\n"s"\n', encoding="utf-8")
    assert prompts_from_file(lines) == ["one two", "three"]
    assert prompts_from_file(rows) == ["p", "t", "i", "s"]


@pytest.mark.parametrize("text", ["", "{", '{"label": 1}', "[1]", '{"text": 3}'])
def test_rows_without_text_are_rejected(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.jsonl"):
        prompts_from_file(path)
