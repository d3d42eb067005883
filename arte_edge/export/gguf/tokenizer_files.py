"""The files of a tokenizer, read into what a GGUF says: its vocabulary file, added tokens, special tokens, template.

Where two files speak of the same thing the later speaker wins as in transformers:
tokenizer_config.json over tokenizer.json, chat_template.jinja over both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arte_edge.errors import InputError

__all__ = ["ROLES", "AddedToken", "TokenizerFiles", "read_tokenizer"]

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Added tokens that some checkpoints do not mark as special although nobody means their text.
_CONTROL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_SAVE_AGAIN = "Save the tokenizer beside the model: AutoTokenizer.from_pretrained(…).save_pretrained(…)."


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before the rest is cut. `special`: it is no text but control."""

    text: str
    special: bool
    strips_right: bool = False

    @property
    def is_control(self) -> bool:
        """True if users must not be able to write it; also for those that only look like it."""
        text = self.text
        looks = (text.startswith("<|") and text.endswith("|>")) or (
            text.startswith("<｜") and text.endswith("｜>")
        )
        unused = text.startswith("<unused") and text.endswith(">")
        return self.special or looks or unused or text in _CONTROL


@dataclass(frozen=True)
class TokenizerFiles:
    """What the tokenizer's files say. `special` has the id of each role that has one."""

    folder: Path
    tokenizer: dict[str, Any]  # tokenizer.json, empty where there is none
    config: dict[str, Any]  # tokenizer_config.json
    model: Path | None  # tokenizer.model
    added: dict[int, AddedToken]
    special: dict[str, int]
    templates: dict[str, str] = field(default_factory=dict)  # by name, the usual one is "default"

    @property
    def path(self) -> Path:
        """The file that errors about the vocabulary name."""
        return self.folder / "tokenizer.json" if self.tokenizer else self.model or self.folder


def read_tokenizer(folder: Path, config: dict[str, Any]) -> TokenizerFiles:
    """Read the tokenizer of the checkpoint in `folder`, whose config.json is `config`.

    Raises:
        InputError: there is none, or a file is damaged.
    """
    tokenizer, settings = _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json")
    path = folder / "tokenizer.model"
    model = path if path.is_file() else None
    if not tokenizer and model is None:
        raise InputError(f"{folder}: no tokenizer.json and no tokenizer.model", _SAVE_AGAIN)
    try:
        added = _added(folder, tokenizer, settings)
        special = _special(tokenizer, settings, config, added)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: its tokenizer files are damaged ({error!r})", _SAVE_AGAIN) from error
    for token in special.values():
        if token in added and not added[token].special:
            added[token] = AddedToken(added[token].text, True, added[token].strips_right)
    return TokenizerFiles(folder, tokenizer, settings, model, added, special, _templates(folder, settings))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable JSON ({error})", _SAVE_AGAIN) from error
    return content


def _added(folder: Path, tokenizer: dict[str, Any], settings: dict[str, Any]) -> dict[int, AddedToken]:
    added: dict[int, AddedToken] = {}
    for text, token in _json(folder / "added_tokens.json").items():
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
    ids = {token.text: number for number, token in sorted(added.items(), reverse=True)}
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    vocabulary = vocabulary if isinstance(vocabulary, dict) else {}
    found: dict[str, int] = {}
    for role in ROLES:
        named = settings.get(f"{role}_token")
        text = named.get("content") if isinstance(named, dict) else named
        number = ids.get(text, vocabulary.get(text)) if isinstance(text, str) else None
        if number is None:
            number = config.get(f"{role}_token_id")
        if isinstance(number, list):  # several ends of text: the first is the usual one
            number = number[0] if number else None
        if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
            found[role] = number
    return found


def _templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    file, old = folder / "chat_template.jinja", _json(folder / "chat_template.json")
    given = old.get("chat_template") or settings.get("chat_template")
    if file.is_file():
        try:
            given = file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: not readable text ({error})", _SAVE_AGAIN) from error
    if isinstance(given, str) and given:
        templates = {"default": given}
    elif isinstance(given, list):
        templates = {str(row["name"]): str(row["template"]) for row in given if isinstance(row, dict)}
    else:
        templates = {}
    for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates.setdefault(extra.stem, extra.read_text("utf-8"))
    return templates
