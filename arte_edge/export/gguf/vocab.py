"""A checkpoint's tokenizer as GGUF metadata: tokens, kinds, merges or scores, special tokens, chat template.

llama.cpp has three tokenizers of use here: ``gpt2`` (byte-level BPE, with a named
way of cutting words), ``llama`` (SentencePiece BPE) and ``t5`` (SentencePiece
unigram). Which one a checkpoint needs is read from its tokenizer.json, not from
its family: a Phi-3 has the second, a Phi-4-mini the first.
"""

from __future__ import annotations

from typing import Any

from arte_edge.errors import InputError
from arte_edge.export.gguf.checkpoint import OTHER_CONVERTER
from arte_edge.export.gguf.hparams import FLOAT32, STRING, UINT32
from arte_edge.export.gguf.pretokenizer import pre_tokenizer_name
from arte_edge.export.gguf.sentencepiece import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Pieces,
    read_model,
    scored,
)
from arte_edge.export.gguf.tokenizer_files import TokenizerFiles
from arte_edge.models.families import Family
from arte_edge.models.gguf_fields import Field

__all__ = ["vocabulary"]

_INT32, _BOOL, _ARRAY = 5, 7, 9
_ADDED_SCORE, _PAD_SCORE = -1000.0, -10000.0
# What GGUF calls the roles; the misspelling is the format's
_GGUF_ROLES = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
_SPACE = "\u2581"


def vocabulary(files: TokenizerFiles, family: Family, n_vocab: int) -> dict[str, Field]:
    """Return ``tokenizer.*`` for a model with `n_vocab` rows in its embedding.

    Raises:
        InputError: a kind of tokenizer that llama.cpp does not have, or more tokens than rows.
    """
    model = files.tokenizer.get("model") or {}
    kind = model.get("type")
    byte_level = kind == "BPE" and not model.get("byte_fallback")
    if files.tokenizer and not byte_level and kind not in ("BPE", "Unigram"):
        raise InputError(f"{files.path}: a {kind} tokenizer has no form in GGUF here", OTHER_CONVERTER)
    fields = _byte_level(files, family, n_vocab) if byte_level else _pieces(files, family, n_vocab)
    for role, token in files.special.items():
        if token < n_vocab:
            fields[f"tokenizer.ggml.{_GGUF_ROLES.get(role, role)}_token_id"] = Field(UINT32, token)
    for role in ("bos", "eos"):
        fields[f"tokenizer.ggml.add_{role}_token"] = Field(_BOOL, _is_added(files, role))
    return fields | _template_fields(files.templates)


def _byte_level(files: TokenizerFiles, family: Family, n_vocab: int) -> dict[str, Field]:
    model = files.tokenizer["model"]
    pre = pre_tokenizer_name(files.path, files.tokenizer, family.pre_tokenizers)
    texts: list[str | None] = [None] * n_vocab
    kinds = [UNUSED] * n_vocab
    _check_ids(files, n_vocab, max(model["vocab"].values(), default=-1))
    for text, token in model["vocab"].items():
        texts[token], kinds[token] = text, NORMAL
    for token, added in files.added.items():
        texts[token] = added.text if added.is_control else added.text.replace(_SPACE, " ")
        kinds[token] = CONTROL if added.is_control else USER_DEFINED
    tokens = [f"[PAD{i}]".encode() if text is None else text.encode() for i, text in enumerate(texts)]
    fields = _head("gpt2", pre, tokens, kinds)
    fields["tokenizer.ggml.merges"] = Field(_ARRAY, [_merge(merge) for merge in model["merges"]], STRING)
    return fields


def _merge(merge: str | list[str]) -> bytes:
    """Return a merge as GGUF has it, two pieces with a space between; a space inside is the byte's own sign."""
    if isinstance(merge, str):
        return merge.encode()
    left, right = merge
    if " " in left or " " in right:
        left, right = left.replace(" ", "\u0120"), right.replace(" ", "\u0120")
    return f"{left} {right}".encode()


def _pieces(files: TokenizerFiles, family: Family, n_vocab: int) -> dict[str, Field]:
    pieces = read_model(files.model) if files.model else scored(files.path, files.tokenizer, files.added)
    _check_ids(files, n_vocab, len(pieces.texts) - 1)
    missing = n_vocab - len(pieces.texts)
    pieces.texts += [f"[PAD{n_vocab - missing + i}]".encode() for i in range(missing)]
    pieces.scores += [_PAD_SCORE] * missing
    pieces.kinds += [UNUSED] * missing
    for token, kind in enumerate(pieces.kinds):
        if kind == USER_DEFINED:  # found in the text as it is written, so with spaces for their sign
            pieces.texts[token] = pieces.texts[token].replace(_SPACE.encode(), b" ")
    for token, added in files.added.items():
        text = added.text if added.is_control else added.text.replace(_SPACE, " ")
        pieces.texts[token], pieces.scores[token] = text.encode(), _ADDED_SCORE
        pieces.kinds[token] = CONTROL if added.is_control else USER_DEFINED
    fields = _head("t5" if pieces.is_unigram else "llama", "default", pieces.texts, pieces.kinds)
    fields["tokenizer.ggml.scores"] = Field(_ARRAY, pieces.scores, FLOAT32)
    return fields | _space_fields(files, family, pieces)


def _space_fields(files: TokenizerFiles, family: Family, pieces: Pieces) -> dict[str, Field]:
    adds = family.add_space_prefix
    if adds is None:
        adds = pieces.adds_space_prefix
        if files.model and isinstance(files.config.get("add_prefix_space"), bool):
            adds = files.config["add_prefix_space"]
    fields = {"tokenizer.ggml.add_space_prefix": Field(_BOOL, adds)}
    if pieces.is_unigram:
        fields["tokenizer.ggml.remove_extra_whitespaces"] = Field(_BOOL, pieces.removes_extra_spaces)
        if pieces.normalizer_map:
            chars = list(pieces.normalizer_map)
            fields["tokenizer.ggml.precompiled_charsmap"] = Field(_ARRAY, chars, 0)
    return fields


def _head(model: str, pre: str, tokens: list[bytes], kinds: list[int]) -> dict[str, Field]:
    return {
        "tokenizer.ggml.model": Field(STRING, model.encode()),
        "tokenizer.ggml.pre": Field(STRING, pre.encode()),
        "tokenizer.ggml.tokens": Field(_ARRAY, tokens, STRING),
        "tokenizer.ggml.token_type": Field(_ARRAY, kinds, _INT32),
    }


def _check_ids(files: TokenizerFiles, n_vocab: int, highest: int) -> None:
    highest = max(highest, max(files.added, default=-1))
    if highest >= n_vocab:
        raise InputError(
            f"{files.path}: has a token {highest}, but the model's embedding has {n_vocab} rows",
            "Call model.resize_token_embeddings(len(tokenizer)) before training, or give its own tokenizer.",
        )


def _is_added(files: TokenizerFiles, role: str) -> bool:
    """True if the tokenizer puts this token around a text: by its post-processor, else by its settings."""
    step = files.tokenizer.get("post_processor") or {}
    parts = step.get("processors", []) if step.get("type") == "Sequence" else [step]
    for part in parts:
        if part.get("type") == "TemplateProcessing":
            single: list[dict[str, Any]] = part.get("single") or [{}]
            edge = single[0 if role == "bos" else -1].get("SpecialToken", {}).get("id")
            ids = (part.get("special_tokens", {}).get(edge) or {}).get("ids", [])
            return files.special.get(role) in ids
        if part.get("type") in ("RobertaProcessing", "BertProcessing"):
            return True
    if files.tokenizer:
        return False
    return bool(files.config.get(f"add_{role}_token", role == "bos"))


def _template_fields(templates: dict[str, str]) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    others = []
    for name, template in templates.items():
        if name == "default":
            fields["tokenizer.chat_template"] = Field(STRING, template.encode())
        elif safe := "".join(c if c.isascii() and c.isalnum() else "_" for c in name):
            fields[f"tokenizer.chat_template.{safe}"] = Field(STRING, template.encode())
            others.append(safe.encode())
    if others:
        fields["tokenizer.chat_templates"] = Field(_ARRAY, sorted(others), STRING)
    return fields
