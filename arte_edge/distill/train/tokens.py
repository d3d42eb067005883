"""Prompts and completions as the token ids that training sees: the very ids that an engine decodes.

A prompt is tokenized alone, as an engine does it, with exactly one begin token
where the model wants one (a rendered chat template may have written it already).
The completion's ids follow it. Tokenizing both as one text could merge a token
across the seam, and the model would learn to go on from a prompt it never sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arte_edge.errors import InputError
from arte_edge.runtimes.transformers.tokenizer import Text

__all__ = ["Encoder", "check_rows"]


@dataclass(frozen=True)
class Encoder:
    """A transformers tokenizer, used as the engines use it."""

    tokenizer: Any

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a rendered prompt."""
        return Text(self.tokenizer, None).tokens(text)

    def completion(self, prompt: str, text: str) -> list[int]:
        """Return the ids that write `text` after `prompt`, closed by the end token.

        Raises:
            InputError: the tokenizer has no end token.
        """
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise InputError(
                "The model's tokenizer has no end token", "Set eos_token in tokenizer_config.json."
            )
        start, whole = self.prompt(prompt), self.prompt(prompt + text)
        seam_holds = whole[: len(start)] == start
        ids: list[int] = whole[len(start) :] if seam_holds else self._plain(text)
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def check_rows(rows: Sequence[Mapping[str, str]], keys: Sequence[str], what: str) -> None:
    """Raise unless every row has exactly the texts `keys`, none of them empty.

    Raises:
        InputError: names the first row that is wrong, counted from 1.
    """
    if not rows:
        raise InputError(f"There is no {what} to train on", "The stage before this one kept nothing.")
    for number, row in enumerate(rows, start=1):
        missing = [key for key in keys if not isinstance(row.get(key), str) or not row[key]]
        if missing or set(row) != set(keys):
            named = missing[0] if missing else sorted(set(row) - set(keys))[0]
            raise InputError(
                f"{what} {number}: '{named}' is missing, empty or unknown", f"Keys: {', '.join(keys)}."
            )
