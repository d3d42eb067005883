import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from arte_edge.runtimes.protocol import RuntimeFacts
from arte_edge.verify.check import Thresholds
from arte_edge.verify.tokenizer import HARD_STRINGS, check_stops, check_tokens, check_vocabulary, excerpt, hard_strings


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@dataclass
class Fake:
    """A runtime that tokenizes with `cut`; ids below 10 are special tokens by name."""

    cut: Callable[[str], list[int]] = letters
    names: tuple[str, ...] = ("<s>", "<|im_end|>", "<|endoftext|>", "<|fim_pad|>")
    eos_tokens: frozenset[int] = frozenset([1])
    stop_tokens: frozenset[int] = frozenset([1, 2])
    facts = RuntimeFacts("fake 1.0")
    file_cut: Callable[[str], list[int]] | None = None
    learned: list[str] = field(default_factory=lambda: ["one", " two", "three"])

    n_vocab: int = 1 << 20

    @property
    def added_tokens(self) -> tuple[str, ...]:
        return self.names

    def tokenize(self, text: str) -> list[int]:
        return [self.names.index(text)] if text in self.names else self.cut(text)

    def file_tokens(self, text: str) -> list[int] | None:
        return None if self.file_cut is None else self.file_cut(text)

    def token_text(self, token: int) -> str:
        return self.names[token] if token < len(self.names) else chr(token)

    def vocabulary(self) -> list[str]:
        return self.learned


def tokens(artifact: Fake, reference: Fake | None = None, strings: tuple[str, ...] = HARD_STRINGS) -> Any:
    return check_tokens(reference or Fake(), artifact, strings, Thresholds())  # type: ignore[arg-type]


def stops(artifact: Fake, reference: Fake | None = None) -> Any:
    return check_stops(reference or Fake(), artifact, 0)  # type: ignore[arg-type]


def test_there_are_at_least_200_hard_strings_of_every_kind() -> None:
    assert len(HARD_STRINGS) == len(set(HARD_STRINGS)) >= 200
    text = "".join(HARD_STRINGS)
    kinds = {unicodedata.category(letter) for letter in text}
    assert {"Cc", "Cf", "Mn", "Nd", "No", "Lo", "Sc", "So", "Zs", "Zl", "Zp", "Co"} <= kinds
    assert max(map(len, HARD_STRINGS)) >= 1000 and "" in HARD_STRINGS
    assert any(unicodedata.normalize("NFC", s) != s for s in HARD_STRINGS)
    assert all(sign in text for sign in ("🙂", "漢", "<|im_end|>", "    ", "\t", "\r\n", "\x00", "م", "ש"))


def test_the_models_own_added_tokens_join_the_hard_strings() -> None:
    assert {"<x>", "a<x>b", "one <x> two"} <= set(hard_strings(["<x>"]))
    many = [f"<reserved_{i}>" for i in range(5000)]
    assert len(hard_strings(many)) < 500
    assert {many[0], many[-1]} <= set(hard_strings(many))


@pytest.mark.parametrize(
    ("cut", "sentence"),
    [
        (lambda t: [0, *letters(t)], "puts a token '<s>' in front"),
        (lambda t: [*letters(t), 1], "an end token after every prompt"),
        (lambda t: [5 if c.isdigit() else ord(c) for c in t], "numbers are split differently"),
        (lambda t: letters(t.replace("the", "teh")), "a merge, a vocabulary entry"),
        (lambda t: [ord(c) + 1 for c in t], "another model's tokenizer"),
    ],
)
def test_a_failing_check_says_what_is_most_likely_wrong(cut: Any, sentence: str) -> None:
    strings = ("the cat", "12 cats", "no", "yes", "other", "word") if "digit" not in sentence else HARD_STRINGS
    check = tokens(Fake(cut), strings=tuple(s for s in strings if s))
    assert not check.passed
    assert sentence in check.note


def test_the_first_difference_is_shown_with_both_lists_of_ids() -> None:
    check = tokens(Fake(lambda t: letters(t.replace("q", "Q"))), strings=("plain", "a quick one", "quite"))
    assert check.measured == 2
    for part in ("2 of 3", "'a quick one'", "[97, 32, 113, 117, 105, 99…]", "[97, 32, 81, 117, 105, 99…]"):
        assert part in check.note


def test_text_that_differs_only_in_composition_is_reported_and_passes() -> None:
    composing = Fake(lambda t: letters(unicodedata.normalize("NFC", t)))
    check = tokens(Fake(), composing, ("e\u0301", "plain"))
    assert check.passed and check.measured == 0
    assert "1 of 2 strings" in check.note and "NFC" in check.note
    other = Fake(lambda t: [n + 1 for n in letters(t)])
    assert tokens(other, composing, ("e\u0301",)).measured == 1


def test_a_few_differences_of_the_runtime_itself_are_reported_and_many_fail() -> None:
    runtime = Fake(lambda t: letters(t.replace("½", "")), file_cut=letters)
    few = tokens(runtime, strings=("½", "a½b", "plain"))
    assert few.passed and few.measured == 0
    assert "2 of 3 strings" in few.note and "fake itself" in few.note
    many = tokens(runtime, strings=tuple(f"{i}½" for i in range(9)))
    assert not many.passed and many.measured == 9
    broken_file = Fake(lambda t: letters(t.replace("½", "")), file_cut=lambda t: letters(t.replace("½", "")))
    assert not tokens(broken_file, strings=("½",)).passed


def test_one_vocabulary_entry_that_differs_is_found_and_named() -> None:
    words = [f"w{i}x" for i in range(1000)]
    broken = Fake(lambda t: letters(t.replace("w777x", "W777x")))
    check = check_vocabulary(Fake(learned=words), broken, Thresholds())  # type: ignore[arg-type]
    assert (check.measured, check.passed) == (1, False)
    assert check.note.startswith("1 of 1000 tokens, first 'w777x'")
    good = check_vocabulary(Fake(learned=words), Fake(), Thresholds())  # type: ignore[arg-type]
    assert good.passed and good.note == "1000 tokens"


def test_equal_stop_tokens_pass_and_so_do_those_that_a_runtime_knows_by_name() -> None:
    assert stops(Fake()).passed
    assert stops(Fake(stop_tokens=frozenset([1, 2, 3]))).passed  # <|fim_pad|>: llama.cpp always stops there
    assert not stops(Fake(stop_tokens=frozenset([1, 2, 4]))).passed
    assert stops(Fake(stop_tokens=frozenset([1]))).passed  # <|endoftext|> is not declared


@pytest.mark.parametrize(
    ("artifact", "sentence"),
    [
        (Fake(eos_tokens=frozenset([2]), stop_tokens=frozenset([2])), "never stops at <|im_end|> (1)"),
        (Fake(stop_tokens=frozenset([1, 2, 65])), "stops at A (65)"),
        (Fake(eos_tokens=frozenset([65]), stop_tokens=frozenset([1, 2, 65])), "stops at A (65)"),
        (Fake(eos_tokens=frozenset([2])), "declares <|endoftext|> (2) as its stop token"),
        (Fake(eos_tokens=frozenset(), stop_tokens=frozenset()), "never stops at <|im_end|> (1)"),
    ],
)
def test_a_stop_that_is_missing_new_or_swapped_is_named(artifact: Fake, sentence: str) -> None:
    check = stops(artifact)
    assert not check.passed and check.measured and check.measured >= 1
    assert sentence in check.note


def test_a_declared_list_covers_an_artifact_that_names_one_of_it() -> None:
    listed = Fake(eos_tokens=frozenset([1, 2]))
    assert stops(Fake(eos_tokens=frozenset([1])), listed).passed


def test_an_excerpt_escapes_invisible_characters() -> None:
    assert excerpt("a\x00b") == r"'a\x00b'"
    assert excerpt("x" * 100, 50).startswith("…'xxx") and excerpt("x" * 100, 50).endswith("…")
