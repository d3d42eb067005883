"""A checkpoint's tokenizer as GGUF metadata: tokens, token types, merges or scores, special tokens, chat template.

llama.cpp has two tokenizers of use here: ``gpt2`` (byte-level BPE with a named pre-tokenizer) and ``llama``
(SentencePiece BPE). tokenizer.json decides which one a checkpoint needs, not the family: a Phi-3 has the second, a
Phi-4-mini the first. Where two files define the same thing, tokenizer_config.json
wins, as in transformers.

llama.cpp's converter recognizes a pre-tokenizer by a hash over the token ids of one long string, which fails for every
new vocabulary. Here the splitting rule itself is compared, so any vocabulary with a known rule is converted, and an
unknown rule is rejected instead of guessed.

A SentencePiece vocabulary comes from tokenizer.model, a protocol buffer of which a few fields matter here, so it is
read without the package; or from tokenizer.json, which newer transformers save alone: its merges are in the order of
the missing scores, so scores are made with which llama.cpp merges in the same order.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arte_edge import protobuf
from arte_edge.errors import InputError, reading
from arte_edge.files import read_json
from arte_edge.gguf.names import OTHER_CONVERTER, Family
from arte_edge.gguf.reader import ARRAY, BOOL, FLOAT32, INT32, STRING, UINT32, Field
from arte_edge.model_folder import chat_templates, end_ids, tokenizer_files

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Added tokens that are control tokens although some checkpoints do not mark them as special.
_CONTROL_TEXTS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_SAVE_AGAIN = "Save the tokenizer beside the model: AutoTokenizer.from_pretrained(…).save_pretrained(…)."
_ADDED_SCORE, _PAD_SCORE = -1000.0, -10000.0
# What GGUF calls the roles; the misspelling is the format's
_GGUF_ROLES = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
# Tokens at which llama.cpp stops because of their text, whatever the file declares ("special_eog_ids").
ENDS_BY_NAME = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<turn|>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
    *("<end_of_turn>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"),
)
# Kinds of token, the same numbers in SentencePiece and in tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2  # TrainerSpec.model_type; 1, its default, is unigram
_SPACE = "\u2581"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_CLITICS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NO_WORD = r"[^\r\n\p{L}\p{N}]?"
# regular expression of a Split -> our name of the splitting rule
_REGEXES = {
    f"{_WORDS}|\\p{{N}}|{_PUNCTUATION}|{_REST}": "qwen2",
    f"{_WORDS}|\\p{{N}}{{1,3}}|{_PUNCTUATION}|{_REST}": "llama3",
    f"{_NO_WORD}{_UPPER}*{_LOWER}+{_CLITICS}|{_NO_WORD}{_UPPER}+{_LOWER}*{_CLITICS}"
    f"|\\p{{N}}{{1,3}}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n/]*|{_REST}": "gpt-4o",
}
# our name -> tokenizer.ggml.pre, unless the family has its own
_NAMES = {"gpt-2": "gpt-2", "digits": "smollm", "qwen2": "qwen2", "gpt-4o": "gpt-4o"}
_NAMES |= {"llama3": "llama-bpe", "llama3-merging": "smaug-bpe"}


def vocabulary(files: TokenizerFiles, family: Family, n_vocab: int) -> dict[str, Field]:
    """Return ``tokenizer.*`` for a model with `n_vocab` rows in its embedding.

    Raises InputError: a kind of tokenizer that llama.cpp does not have, or more tokens than rows.
    """
    with reading(files.path, _SAVE_AGAIN):
        return _vocabulary(files, family, n_vocab)


def _vocabulary(files: TokenizerFiles, family: Family, n_vocab: int) -> dict[str, Field]:
    model = files.tokenizer.get("model") or {}
    kind = model.get("type")
    byte_level = kind == "BPE" and not model.get("byte_fallback")
    if files.tokenizer and kind != "BPE":
        raise InputError(f"{files.path}: a {kind} tokenizer is not supported in GGUF", OTHER_CONVERTER)
    fields = _byte_level(files, family, n_vocab) if byte_level else _pieces(files, family, n_vocab)
    for role, token in (*files.special.items(), *end_tokens(files)[0].items()):
        if token < n_vocab:
            fields[f"tokenizer.ggml.{_GGUF_ROLES.get(role, role)}_token_id"] = Field(UINT32, token)
    for role in ("bos", "eos"):
        fields[f"tokenizer.ggml.add_{role}_token"] = Field(BOOL, _is_added(files, role))
    return fields | template_fields(files.templates)


def end_tokens(files: TokenizerFiles) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the end tokens that a file must name beside ``eos``, as role -> id, and the texts that find no place.

    llama.cpp stops at ``eos``, ``eot`` and ``eom``, and at tokens that it knows by their text.
    """
    texts = {token: text for text, token in files.ids.items()}
    own = [token for token in files.ends if token != files.special.get("eos")]
    own = [token for token in dict.fromkeys(own) if texts.get(token, "") not in ENDS_BY_NAME]
    return dict(zip(("eot", "eom"), own, strict=False)), tuple(texts.get(token, "") for token in own[2:])


def _byte_level(files: TokenizerFiles, family: Family, n_vocab: int) -> dict[str, Field]:
    model = files.tokenizer["model"]
    pre = _pre_tokenizer_name(files.path, files.tokenizer, family.pre_tokenizers)
    texts: list[str | None] = [None] * n_vocab
    kinds = [_UNUSED] * n_vocab
    _check_ids(files, n_vocab, max(model["vocab"].values(), default=-1))
    for text, token in model["vocab"].items():
        texts[token], kinds[token] = text, _NORMAL
    for token, added in files.added.items():
        texts[token] = added.text if added.is_control else added.text.replace(_SPACE, " ")
        kinds[token] = _CONTROL if added.is_control else _USER_DEFINED
    tokens = [f"[PAD{i}]".encode() if text is None else text.encode() for i, text in enumerate(texts)]
    fields = _head("gpt2", pre, tokens, kinds)
    fields["tokenizer.ggml.merges"] = Field(ARRAY, [_merge(merge) for merge in model["merges"]], STRING)
    return fields


def _merge(merge: str | list[str]) -> bytes:
    """Return a merge in GGUF form: two pieces with a space between; a space inside a piece becomes its byte symbol."""
    return (merge if isinstance(merge, str) else " ".join(p.replace(" ", "\u0120") for p in merge)).encode()


def _pieces(files: TokenizerFiles, family: Family, n_vocab: int) -> dict[str, Field]:
    pieces = _read_model(files.model) if files.model else _scored(files.path, files.tokenizer, files.added)
    _check_ids(files, n_vocab, len(pieces.texts) - 1)
    missing = n_vocab - len(pieces.texts)
    pieces.texts += [f"[PAD{n_vocab - missing + i}]".encode() for i in range(missing)]
    pieces.scores += [_PAD_SCORE] * missing
    pieces.kinds += [_UNUSED] * missing
    for token, kind in enumerate(pieces.kinds):
        if kind == _USER_DEFINED:  # matched in the raw text, so with real spaces
            pieces.texts[token] = pieces.texts[token].replace(_SPACE.encode(), b" ")
    for token, added in files.added.items():
        text = added.text if added.is_control else added.text.replace(_SPACE, " ")
        pieces.texts[token], pieces.scores[token] = text.encode(), _ADDED_SCORE
        pieces.kinds[token] = _CONTROL if added.is_control else _USER_DEFINED
    fields = _head("llama", "default", pieces.texts, pieces.kinds)
    fields["tokenizer.ggml.scores"] = Field(ARRAY, pieces.scores, FLOAT32)
    return fields | _space_fields(files, family, pieces)


def _space_fields(files: TokenizerFiles, family: Family, pieces: _Pieces) -> dict[str, Field]:
    adds = family.add_space_prefix
    if adds is None:
        adds = pieces.adds_space_prefix
        if files.model and isinstance(files.config.get("add_prefix_space"), bool):
            adds = files.config["add_prefix_space"]
    return {"tokenizer.ggml.add_space_prefix": Field(BOOL, adds)}


def _head(model: str, pre: str, tokens: list[bytes], kinds: list[int]) -> dict[str, Field]:
    return {
        "tokenizer.ggml.model": Field(STRING, model.encode()),
        "tokenizer.ggml.pre": Field(STRING, pre.encode()),
        "tokenizer.ggml.tokens": Field(ARRAY, tokens, STRING),
        "tokenizer.ggml.token_type": Field(ARRAY, kinds, INT32),
    }


def _check_ids(files: TokenizerFiles, n_vocab: int, highest: int) -> None:
    highest = max(highest, max(files.added, default=-1))
    if highest >= n_vocab:
        raise InputError(
            f"{files.path}: has a token {highest}, but the model's embedding has {n_vocab} rows",
            "Call model.resize_token_embeddings(len(tokenizer)) before training, or give its own tokenizer.",
        )


def _is_added(files: TokenizerFiles, role: str) -> bool:
    """True if the tokenizer adds this token to a text: by its post-processor, else by its settings."""
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


def template_fields(templates: Mapping[str, str]) -> dict[str, Field]:
    """Return the metadata for chat templates by name; the standard one is "default"."""
    fields: dict[str, Field] = {}
    others = []
    for name, template in templates.items():
        if name == "default":
            fields["tokenizer.chat_template"] = Field(STRING, template.encode())
        elif safe := "".join(c if c.isascii() and c.isalnum() else "_" for c in name):
            fields[f"tokenizer.chat_template.{safe}"] = Field(STRING, template.encode())
            others.append(safe.encode())
    if others:
        fields["tokenizer.chat_templates"] = Field(ARRAY, sorted(others), STRING)
    return fields


def _pre_tokenizer_name(path: Path, tokenizer: dict[str, Any], own_names: dict[str, str]) -> str:
    """Return ``tokenizer.ggml.pre`` for the byte-level tokenizer in `tokenizer`, read from `path`.

    `own_names` has the family's name of a splitting rule that has several names in llama.cpp.
    """
    normalizer = tokenizer.get("normalizer")
    # NFC is Qwen's. llama.cpp skips it, which matters for text with combining accents only.
    if normalizer and normalizer.get("type") != "NFC":
        what = f"{path}: the normalizer {normalizer.get('type')} is not supported in GGUF"
        raise InputError(what, OTHER_CONVERTER)
    step = tokenizer.get("pre_tokenizer") or {}
    parts = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    name = _recognized(parts)
    if name is None:
        raise InputError(f"{path}: llama.cpp has no such pre_tokenizer: {parts}", OTHER_CONVERTER)
    # Llama 3 uses a word that is a token as a whole, without merges; llama.cpp decides that by the name.
    ignore_merges = tokenizer["model"].get("ignore_merges")
    if ignore_merges and name != "llama3":
        what = f"{path}: ignore_merges is known to llama.cpp for Llama 3's splitting only"
        raise InputError(what, OTHER_CONVERTER)
    if name == "llama3" and not ignore_merges:
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
        # "Isolated" and inverted "Removed" are the same here, because the expression matches everything.
        how = (first.get("behavior"), bool(first.get("invert")))
        if how in (("Isolated", False), ("Removed", True)):
            return _REGEXES.get(first.get("pattern", {}).get("Regex", ""))
    return None


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched before the rest of a text is tokenized. `special`: a control token, not text."""

    text: str
    special: bool
    strips_right: bool = False

    @property
    def is_control(self) -> bool:
        """True for special tokens and for those that have the form of one: users must not be able to write them."""
        forms = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
        looks = any(self.text.startswith(start) and self.text.endswith(end) for start, end in forms)
        return self.special or looks or self.text in _CONTROL_TEXTS


@dataclass(frozen=True)
class TokenizerFiles:
    """The content of the tokenizer's files. `special` has the id of each role that has one."""

    folder: Path
    tokenizer: dict[str, Any]  # tokenizer.json, empty if it is missing
    config: dict[str, Any]  # tokenizer_config.json
    model: Path | None  # tokenizer.model
    added: dict[int, AddedToken]
    special: dict[str, int]
    templates: dict[str, str] = field(default_factory=dict)  # by name; the standard one is "default"
    ends: tuple[int, ...] = ()  # the end tokens that generation_config.json names, else config.json

    @property
    def ids(self) -> dict[str, int]:
        """The ids of the tokens by their texts."""
        return _ids(self.tokenizer, self.added)

    @property
    def path(self) -> Path:
        """The file that errors about the vocabulary name."""
        return self.folder / "tokenizer.json" if self.tokenizer else self.model or self.folder


def read_tokenizer(folder: Path, config: dict[str, Any]) -> TokenizerFiles:
    """Read the tokenizer of the checkpoint in `folder`, whose config.json is `config`.

    Raises InputError: there is none, or a file is damaged.
    """
    tokenizer, settings = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    path = folder / "tokenizer.model"
    model = path if path.is_file() else None
    if not tokenizer and model is None:
        raise InputError(f"{folder}: no tokenizer.json and no tokenizer.model", _SAVE_AGAIN)
    with reading(folder / "tokenizer.json", _SAVE_AGAIN):
        added = _added(folder, tokenizer, settings)
        special = _special(tokenizer, settings, config, added)
        templates = chat_templates(tokenizer_files(folder))
    for token in special.values():
        if token in added and not added[token].special:
            added[token] = AddedToken(added[token].text, True, added[token].strips_right)
    return TokenizerFiles(folder, tokenizer, settings, model, added, special, templates, tuple(end_ids(folder)))


def _added(folder: Path, tokenizer: dict[str, Any], settings: dict[str, Any]) -> dict[int, AddedToken]:
    added: dict[int, AddedToken] = {}
    for text, token in read_json(folder / "added_tokens.json").items():
        added[int(token)] = AddedToken(str(text), False)
    for row in tokenizer.get("added_tokens") or ():
        added[int(row["id"])] = _token(row)
    for token, row in (settings.get("added_tokens_decoder") or {}).items():
        added[int(token)] = _token(row)
    return added


def _token(row: dict[str, Any]) -> AddedToken:
    return AddedToken(str(row["content"]), bool(row.get("special")), bool(row.get("rstrip")))


def _special(
    tokenizer: dict[str, Any], settings: dict[str, Any], config: dict[str, Any], added: dict[int, AddedToken]
) -> dict[str, int]:
    """Return role -> id: the token that tokenizer_config.json names, else the id in config.json."""
    ids = _ids(tokenizer, added)
    found: dict[str, int] = {}
    for role in _ROLES:
        named = settings.get(f"{role}_token")
        text = named.get("content") if isinstance(named, dict) else named
        number = ids.get(text) if isinstance(text, str) else None
        if number is None:
            number = config.get(f"{role}_token_id")
        if isinstance(number, list):  # several end tokens: the first is the usual one
            number = number[0] if number else None
        if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
            found[role] = number
    return found


def _ids(tokenizer: dict[str, Any], added: dict[int, AddedToken]) -> dict[str, int]:
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    known = vocabulary if isinstance(vocabulary, dict) else {}  # a list in other kinds than BPE
    return {**known, **{token.text: number for number, token in sorted(added.items(), reverse=True)}}


@dataclass
class _Pieces:
    """A vocabulary in the order of its ids."""

    texts: list[bytes]
    scores: list[float]
    kinds: list[int]
    adds_space_prefix: bool = True


def _read_model(path: Path) -> _Pieces:
    """Return the vocabulary in a tokenizer.model."""
    pieces = _Pieces([], [], [])
    kind_of_model = 0
    try:
        data = path.read_bytes()
        for number, start, end in protobuf.fields(data):
            if number not in (1, 2, 3):
                continue
            message = {key: (at, stop) for key, at, stop in protobuf.fields(data, start, end)}
            if number == 1:
                pieces.texts.append(data[slice(*message.get(1, (0, 0)))])
                score = data[slice(*message[2])] if 2 in message else bytes(4)
                pieces.scores.append(struct.unpack("<f", score)[0])
                pieces.kinds.append(_number(data, message, 3, _NORMAL))
            elif number == 2:
                kind_of_model = _number(data, message, 3, 0)
            else:
                pieces.adds_space_prefix = bool(_number(data, message, 3, 1))
    except (OSError, IndexError, ValueError, struct.error) as error:
        hint = "Fetch the checkpoint again."
        raise InputError(f"{path}: not a readable SentencePiece model", hint) from error
    if not pieces.texts or kind_of_model != _BPE:
        raise InputError(f"{path}: not a SentencePiece model of the BPE type", OTHER_CONVERTER)
    return pieces


def _number(data: bytes, message: Mapping[int, tuple[int, int]], key: int, default: int) -> int:
    return protobuf.varint(data, message[key][0])[0] if key in message else default


def _scored(path: Path, tokenizer: dict[str, Any], added: Collection[int]) -> _Pieces:
    """Return the vocabulary of a tokenizer.json that was made from a SentencePiece model.

    A piece's score is minus the rank of the first merge that makes it; single characters come after all of them, as
    in SentencePiece. `added` tokens are matched before merging, so they have no rank.
    """
    model = tokenizer["model"]
    ids: dict[str, int] = model["vocab"]
    texts = [""] * (max(ids.values(), default=-1) + 1)
    for text, token in ids.items():
        texts[token] = text
    scores = _scores_of_merges(texts, model["merges"], {texts[i] for i in added if i < len(texts)})
    unknown = ids.get(model.get("unk_token") or "")
    if not texts:
        raise InputError(f"{path}: its vocabulary is empty", "Save the tokenizer again.")
    kinds = [_BYTE if _is_byte(text) else _NORMAL for text in texts]
    if unknown is not None:
        kinds[unknown] = _UNKNOWN
    pieces = _Pieces([text.encode() for text in texts], scores, kinds)
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
