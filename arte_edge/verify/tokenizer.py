"""Tokenizer checks: both models must tokenize texts equally and stop at the same tokens.

A converter that misses a pre-tokenizer, a merge or an added token gives the model wrong ids without any error. Each
group in ``hard_strings.json`` covers a known kind of fault: digits (split one by one, in threes, or not at all), runs
of blanks, special tokens in text, scripts without spaces, combining marks, characters that normalizers drop.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from arte_edge.gguf.tokenizer import ENDS_BY_NAME
from arte_edge.runtimes.protocol import Runtime
from arte_edge.verify.check import Check, Thresholds

# Others, fill-in-the-middle marks among them: an artifact may stop at these.
_MORE_ENDS = (
    *("<|end_of_turn|>", "<|fim_pad|>", "<fim_pad>", "<fim-pad>", "<PRE>", "<|repo_name|>"),
    *("<reponame>", "<|file_sep|>", "<fim_repo>", "<file_sep>", "<REP>"),
)
_MAX_ADDED = 48  # added tokens to test; some models have thousands of reserved ones
_GROUPS: dict[str, list[str]] = json.loads(Path(__file__).with_name("hard_strings.json").read_text("utf-8"))
_LONG = "lorem ipsum dolor sit amet " * 1000  # longer than a limit that a tokenizer may have been saved with
HARD_STRINGS: tuple[str, ...] = tuple(dict.fromkeys(chain(*_GROUPS.values(), [_LONG])))
_BATCH = 32  # vocabulary entries per call
_SHOWN = 6  # ids shown in a message
_EXCERPT = 32  # characters of a text shown there


class _Difference(NamedTuple):
    text: str
    reference: list[int]
    artifact: list[int]


def hard_strings(added: Sequence[str] = ()) -> tuple[str, ...]:
    """Return `HARD_STRINGS`, then each of the model's `added` tokens alone, inside a word and between blanks.

    If there are many, the first and the last: the reserved ones between them are alike.
    """
    half = _MAX_ADDED // 2
    chosen = tuple(added) if len(added) <= _MAX_ADDED else (*added[:half], *added[-half:])
    placed = (text for token in chosen for text in (token, f"a{token}b", f"one {token} two", f"{token}\n{token}"))
    return tuple(dict.fromkeys(chain(HARD_STRINGS, placed)))


def check_tokens(reference: Runtime, artifact: Runtime, strings: Sequence[str], limits: Thresholds) -> Check:
    """Compare the ids of every string, tokenized as prompts: special tokens parsed, BOS if the model adds one.

    Two kinds of differences are counted separately, since no exporter can change them: strings that agree in
    Unicode's composed form (NFC), which the reference's tokenizer applies and the runtime does not; and strings
    for which the artifact's tokenizer file is right and its runtime is not. A few of the latter are allowed.
    """
    return _compare("tokens", reference, artifact, strings, f"{len(strings)} strings", limits)


def check_vocabulary(reference: Runtime, artifact: Runtime, limits: Thresholds) -> Check:
    """Compare the ids of every token's own text, so that each wrong merge or vocabulary entry is found.

    The test strings use only a few thousand of a tokenizer's merges.
    """
    entries = reference.vocabulary()
    suspects: list[str] = []
    for start in range(0, len(entries), _BATCH):
        part = entries[start : start + _BATCH]
        joined = "\n".join(part)
        if reference.tokenize(joined) != artifact.tokenize(joined):
            alone = [entry for entry in part if reference.tokenize(entry) != artifact.tokenize(entry)]
            suspects += alone or [joined]
    return _compare("vocabulary", reference, artifact, suspects, f"{len(entries)} tokens", limits)


def _compare(
    name: str, reference: Runtime, artifact: Runtime, texts: Sequence[str], out_of: str, limits: Thresholds
) -> Check:
    differences: list[_Difference] = []
    runtime: list[_Difference] = []
    composed = 0
    for text in texts:
        ours, theirs = reference.tokenize(text), artifact.tokenize(text)
        if ours == theirs:
            continue
        nfc = unicodedata.normalize("NFC", text)
        if nfc != text and reference.tokenize(nfc) == ours and artifact.tokenize(nfc) == ours:
            composed += 1
        elif artifact.file_tokens(text) == ours:
            runtime.append(_Difference(text, ours, theirs))
        else:
            differences.append(_Difference(text, ours, theirs))
    allowed = limits.token_differences
    many = limits.runtime_differences is not None and len(runtime) > limits.runtime_differences
    passed = (allowed is None or len(differences) <= allowed) and not many
    program = artifact.facts.runtime.split()[0]
    note = out_of
    if differences:
        cause = _cause(reference, artifact, differences, out_of)
        note = f"{len(differences)} of {out_of}, first {_example(differences[0])}; {cause}."
    elif runtime:
        note = (
            f"{len(runtime)} of {out_of} are tokenized differently by {program} itself, though the tokenizer "
            f"file is right, first {_example(runtime[0])}."
        )
    elif composed:
        note = f"{composed} of {out_of} agree only in composed form (NFC), which {program} does not apply."
    measured = len(differences) + (len(runtime) if many else 0)
    return Check(name, measured, allowed, passed, note)


def _example(found: _Difference) -> str:
    _, ours, theirs = found
    return f"{excerpt(found.text)}: reference {_ids(ours, theirs)}, artifact {_ids(theirs, ours)}"


def _cause(reference: Runtime, artifact: Runtime, differences: list[_Difference], out_of: str) -> str:
    front = reference.token_text(differences[0].reference[0]) if differences[0].reference else ""
    if front in reference.added_tokens and all(d.reference[1:] == d.artifact for d in differences):
        return f"the artifact lacks the begin token {front!r}"
    if all(d.artifact and d.artifact[1:] == d.reference for d in differences):
        return f"the artifact puts a token {artifact.token_text(differences[0].artifact[0])!r} in front"
    if all(d.reference == d.artifact[:-1] for d in differences):
        return "the artifact puts an end token after every prompt"
    if reader := _class_that_departs(reference, [(d.text, d.artifact) for d in differences]):
        return f"{reader}, which the artifact follows: write that class's pre-tokenizer into tokenizer.json"
    if all(any(token in d.text for token in reference.added_tokens) for d in differences):
        return "an added or special token is missing, or is no longer one token"
    if all(any(c.isnumeric() for c in d.text) for d in differences):
        return (
            "numbers are split differently: most likely the wrong pre-tokenizer (tokenizer.ggml.pre of a GGUF, "
            "pre_tokenizer of a tokenizer.json)"
        )
    if 2 * len(differences) > int(out_of.split()[0]):
        return "most likely another model's tokenizer, or the wrong kind of tokenizer"
    return "most likely a merge, a vocabulary entry or the pre-tokenizer differs"


def _class_that_departs(model: Runtime, texts: Sequence[tuple[str, list[int]]]) -> str:
    """Return a sentence if the tokenizer file of `model` gives these ids, and the class that reads it others."""
    if all(model.file_tokens(text) == ids for text, ids in texts):
        return f"the reference's {model.tokenizer_class} does not do what its tokenizer.json says"
    return ""


def check_stops(reference: Runtime, artifact: Runtime, allowed: int | None) -> Check:
    """Compare the tokens that end a generation.

    The artifact must stop at every token that the reference's files declare, declare no others, and stop
    nowhere else except at tokens that runtimes know by name.
    """
    missing = reference.eos_tokens - artifact.stop_tokens
    undeclared = artifact.eos_tokens - reference.eos_tokens - reference.stop_tokens
    extra = artifact.stop_tokens - reference.stop_tokens
    by_name = {t for t in extra if t < reference.n_vocab and reference.token_text(t) in (*ENDS_BY_NAME, *_MORE_ENDS)}
    odd = (extra - by_name) | undeclared
    # If one file declares a single stop token and the other a list, the list must contain it.
    swapped = set()
    if not missing and not odd and artifact.eos_tokens.isdisjoint(reference.eos_tokens):
        swapped = set(artifact.eos_tokens or reference.eos_tokens)
    n = len(missing) + len(odd) + len(swapped)
    parts = []
    if missing:
        parts.append(f"never stops at {_names(reference, missing)}, so it would continue after its answer")
    if odd:
        parts.append(f"stops at {_names(artifact, odd)}, which does not stop the reference")
    if swapped:
        parts.append(f"declares {_names(artifact, swapped)} as its stop token, the reference does not")
    if parts:
        note = f"The artifact {' and '.join(parts)}; most likely its end-of-sequence id was set wrongly."
    else:
        note = _names(artifact, artifact.stop_tokens)
    return Check("stop tokens", n, allowed, allowed is None or n <= allowed, note)


def _names(model: Runtime, tokens: set[int] | frozenset[int]) -> str:
    shown = [f"{model.token_text(token)} ({token})" for token in sorted(tokens)]
    return ", ".join(shown[:_SHOWN]) + (", …" if len(shown) > _SHOWN else "")


def _ids(ids: list[int], other: list[int]) -> str:
    """Return the ids around the first one that differs from `other`."""
    at = first_difference(ids, other)
    start = max(0, at - 2)
    shown = ids[start : start + _SHOWN]
    before, after = "…" if start else "", "…" if start + _SHOWN < len(ids) else ""
    return f"[{before}{', '.join(map(str, shown))}{after}]"


def first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the length of the common prefix of two sequences."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def excerpt(text: str, at: int = 0) -> str:
    """Return `text` around the position `at`, quoted, with escapes for invisible characters."""
    start = max(0, at - _EXCERPT // 4)
    part = text[start : start + _EXCERPT]
    before, after = "…" if start else "", "…" if start + _EXCERPT < len(text) else ""
    return f"{before}{part!a}{after}" if not part.isprintable() else f"{before}{part!r}{after}"
