"""Which of llama.cpp's ways of cutting text into words a tokenizer.json asks for.

llama.cpp's converter recognizes a tokenizer by a hash over the ids of one long
string, which breaks as soon as a vocabulary is new. The file itself says how it
cuts: by a regular expression, or by digits. That is compared here, so that any
vocabulary with a known way of cutting converts, and an unknown way is refused
instead of guessed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arte_edge.errors import InputError

__all__ = ["pre_tokenizer_name"]

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_CLITICS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NO_WORD = r"[^\r\n\p{L}\p{N}]?"

# regular expression of a Split -> our name for it
_REGEXES = {
    f"{_WORDS}|\\p{{N}}|{_PUNCTUATION}|{_REST}": "qwen2",
    f"{_WORDS}|\\p{{N}}{{1,3}}|{_PUNCTUATION}|{_REST}": "llama3",
    f"{_NO_WORD}{_UPPER}*{_LOWER}+{_CLITICS}|{_NO_WORD}{_UPPER}+{_LOWER}*{_CLITICS}"
    f"|\\p{{N}}{{1,3}}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n/]*|{_REST}": "gpt-4o",
}
# our name -> tokenizer.ggml.pre, unless the family has its own
_NAMES = {
    "gpt-2": "gpt-2",
    "digits": "smollm",
    "qwen2": "qwen2",
    "llama3": "llama-bpe",
    "llama3-merging": "smaug-bpe",
    "gpt-4o": "gpt-4o",
}
_HINT = "For other tokenizers give your own checkout of llama.cpp with --llama-cpp DIR."


def pre_tokenizer_name(path: Path, tokenizer: dict[str, Any], own_names: dict[str, str]) -> str:
    """Return ``tokenizer.ggml.pre`` for the byte-level tokenizer in `tokenizer`, read from `path`.

    Args:
        own_names: what the family calls a way of cutting that has several names in llama.cpp.

    Raises:
        InputError: a way of cutting, or of changing text first, that llama.cpp does not have.
    """
    normalizer = tokenizer.get("normalizer")
    # NFC is Qwen's. llama.cpp leaves it out, which shows on text with separate accents only.
    if normalizer and normalizer.get("type") != "NFC":
        raise InputError(f"{path}: the normalizer {normalizer.get('type')} has no form in GGUF", _HINT)
    step = tokenizer.get("pre_tokenizer") or {}
    parts = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    name = _recognized(parts)
    if name is None:
        raise InputError(f"{path}: llama.cpp does not cut text as this pre_tokenizer does: {parts}", _HINT)
    # Where a whole word is a token, Llama 3 takes it without merging; llama.cpp ties that to the name.
    if tokenizer["model"].get("ignore_merges") and name != "llama3":
        raise InputError(f"{path}: ignore_merges is known to llama.cpp for Llama 3's splitting only", _HINT)
    if name == "llama3" and not tokenizer["model"].get("ignore_merges"):
        name = "llama3-merging"
    return own_names.get(name, _NAMES[name])


def _recognized(parts: list[dict[str, Any]]) -> str | None:
    *before, last = parts or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    by_regex = last.get("use_regex", True)
    if not before:
        return "gpt-2" if by_regex else None
    if len(before) > 1:
        return None
    first = before[0]
    if first.get("type") == "Digits" and first.get("individual_digits") and by_regex:
        return "digits"
    if first.get("type") == "Split" and not by_regex:
        # Kept what matches, or removed what does not: the same, as the expression matches everything.
        how = (first.get("behavior"), bool(first.get("invert")))
        if how in (("Isolated", False), ("Removed", True)):
            return _REGEXES.get(first.get("pattern", {}).get("Regex", ""))
    return None
