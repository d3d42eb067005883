"""SentencePiece vocabularies: pieces, scores and kinds, from tokenizer.model or from tokenizer.json.

tokenizer.model is a protocol buffer (sentencepiece_model.proto) of which a few
fields matter here, so it is read without the package. Newer transformers save
tokenizer.json alone: its merges are in the order of the scores that were left out,
so scores can be made that let llama.cpp merge in the same order.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge.errors import InputError

__all__ = ["BYTE", "CONTROL", "NORMAL", "UNKNOWN", "UNUSED", "USER_DEFINED", "Pieces", "read_model", "scored"]

# Kinds of token, the same numbers in SentencePiece and in tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM = 1  # TrainerSpec.model_type; 2 is BPE


@dataclass
class Pieces:
    """A vocabulary in the order of its ids. `is_unigram`: pieces win by likelihood, not by merging."""

    texts: list[bytes]
    scores: list[float]
    kinds: list[int]
    is_unigram: bool = False
    adds_space_prefix: bool = True
    removes_extra_spaces: bool = False
    normalizer_map: bytes = b""


def read_model(path: Path) -> Pieces:
    """Return the vocabulary in a tokenizer.model.

    Raises:
        InputError: it cannot be read, is damaged, or splits by words or characters.
    """
    pieces = Pieces([], [], [])
    kind_of_model = _UNIGRAM
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                pieces.texts.append(piece.get(1, b""))
                pieces.scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
                pieces.kinds.append(piece.get(3, NORMAL))
            elif number == 2:
                kind_of_model = dict(_fields(value)).get(3, _UNIGRAM)
            elif number == 3:
                normalizer = dict(_fields(value))
                pieces.normalizer_map = normalizer.get(2, b"")
                pieces.adds_space_prefix = bool(normalizer.get(3, 1))
                pieces.removes_extra_spaces = bool(normalizer.get(4, 1))
    except (OSError, IndexError, ValueError, TypeError, struct.error) as error:
        raise InputError(
            f"{path}: not a readable SentencePiece model", "Fetch the checkpoint again."
        ) from error
    if not pieces.texts or kind_of_model not in (1, 2):
        raise InputError(f"{path}: no SentencePiece model of the BPE or unigram kind", "Fetch it again.")
    pieces.is_unigram = kind_of_model == _UNIGRAM
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of one protocol buffer message; a number is an int, all else bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + length > len(data):
            raise ValueError("cut short")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number without an end")


def scored(path: Path, tokenizer: dict[str, Any], added: Collection[int]) -> Pieces:
    """Return the vocabulary of a tokenizer.json that was made from a SentencePiece model.

    Of a unigram model the scores are there. Of a BPE model a piece's score is minus the rank of
    the first merge that makes it; single characters come after all of them, as in SentencePiece.
    `added` tokens are found before anything is merged, so they take no rank.

    Raises:
        InputError: the vocabulary has gaps or is of no use.
    """
    model = tokenizer["model"]
    if model["type"] == "Unigram":
        texts = [str(piece) for piece, _ in model["vocab"]]
        scores = [float(score) for _, score in model["vocab"]]
        unknown = model.get("unk_id")
    else:
        ids: dict[str, int] = model["vocab"]
        texts = [""] * (max(ids.values(), default=-1) + 1)
        for text, token in ids.items():
            texts[token] = text
        scores = _scores_of_merges(texts, model["merges"], {texts[i] for i in added if i < len(texts)})
        unknown = ids.get(model.get("unk_token") or "")
    if not texts:
        raise InputError(f"{path}: its vocabulary is empty", "Save the tokenizer again.")
    kinds = [BYTE if _is_byte(text) else NORMAL for text in texts]
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    pieces = Pieces([text.encode() for text in texts], scores, kinds, model["type"] == "Unigram")
    pieces.adds_space_prefix = _adds_space(tokenizer)
    return pieces


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _scores_of_merges(texts: list[str], merges: list[Any], added: set[str]) -> list[float]:
    rank: dict[str, int] = {}
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        if (piece := left + right) not in added:
            rank.setdefault(piece, len(rank))
    single = len(rank)
    scores = []
    for text in texts:
        if text in rank:
            scores.append(-float(rank[text]))
        elif _is_byte(text) or len(text) != 1:
            scores.append(0.0)
        else:
            scores.append(-float(single))
            single += 1
    return scores


def _adds_space(tokenizer: dict[str, Any]) -> bool:
    """True if the tokenizer puts a space before a text: by its normalizer, or by its Metaspace."""
    parts = _parts(tokenizer.get("normalizer"), "normalizers")
    if any(part.get("type") == "Prepend" for part in parts):
        return True
    parts = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    return any(
        part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never" for part in parts
    )


def _parts(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if not step:
        return []
    return list(step[key]) if step.get("type") == "Sequence" else [step]
