"""SentencePiece vocabularies: pieces, scores and token types, from tokenizer.model or from tokenizer.json.

tokenizer.model is a protocol buffer (sentencepiece_model.proto) of which a few fields matter here, so it is
read without the package. Newer transformers save tokenizer.json alone: its merges are in the order of the
missing scores, so scores can be made with which llama.cpp merges in the same order.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge.errors import InputError
from arte_edge.protobuf import fields, varint

__all__ = ["CONTROL", "NORMAL", "UNUSED", "USER_DEFINED", "Pieces", "read_model", "scored"]

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
        data = path.read_bytes()
        for number, start, end in fields(data):
            if number not in (1, 2, 3):
                continue
            message = {key: (at, stop) for key, at, stop in fields(data, start, end)}
            if number == 1:
                pieces.texts.append(data[slice(*message.get(1, (0, 0)))])
                score = data[slice(*message[2])] if 2 in message else bytes(4)
                pieces.scores.append(struct.unpack("<f", score)[0])
                pieces.kinds.append(_number(data, message, 3, NORMAL))
            elif number == 2:
                kind_of_model = _number(data, message, 3, _UNIGRAM)
            else:
                pieces.normalizer_map = data[slice(*message.get(2, (0, 0)))]
                pieces.adds_space_prefix = bool(_number(data, message, 3, 1))
                pieces.removes_extra_spaces = bool(_number(data, message, 4, 1))
    except (OSError, IndexError, ValueError, struct.error) as error:
        hint = "Fetch the checkpoint again."
        raise InputError(f"{path}: not a readable SentencePiece model", hint) from error
    if not pieces.texts or kind_of_model not in (1, 2):
        raise InputError(f"{path}: not a SentencePiece model of the BPE or unigram type", "Fetch it again.")
    pieces.is_unigram = kind_of_model == _UNIGRAM
    return pieces


def _number(data: bytes, message: Mapping[int, tuple[int, int]], key: int, default: int) -> int:
    return varint(data, message[key][0])[0] if key in message else default


def scored(path: Path, tokenizer: dict[str, Any], added: Collection[int]) -> Pieces:
    """Return the vocabulary of a tokenizer.json that was made from a SentencePiece model.

    A unigram model has scores. In a BPE model a piece's score is minus the rank of the first merge that makes it;
    single characters come after all of them, as in SentencePiece. `added` tokens are matched before merging, so
    they have no rank.

    Raises:
        InputError: the vocabulary has gaps or is empty.
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
    """True if the tokenizer adds a space before a text: by its normalizer, or by its Metaspace."""
    if any(part.get("type") == "Prepend" for part in _parts(tokenizer.get("normalizer"), "normalizers")):
        return True
    steps = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    spaces = [step for step in steps if step.get("type") == "Metaspace"]
    return any(step.get("prepend_scheme", "always") != "never" for step in spaces)


def _parts(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if not step:
        return []
    return list(step[key]) if step.get("type") == "Sequence" else [step]
