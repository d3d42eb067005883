"""From text to tokens and back, with a transformers tokenizer.

Special tokens in a prompt are parsed, because a rendered prompt holds them as text. The begin token is added only where
the tokenizer adds it by itself and the prompt, whose template may have written it, does not have it already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arte_edge.runtimes.completion import Completion, Request, Sampling
from arte_edge.runtimes.prompt_render import Conversation
from arte_edge.runtimes.protocol import until_stop
from arte_edge.runtimes.sampling import Constraint, Drawing

# llama.cpp ends generation at any of these, whatever the model's own configuration says.
_END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|return|>",
    "<EOT>",
)
_SEAM = 4  # tokens of the prompt decoded with an answer, so that its leading space is not trimmed


class Text:
    """One tokenizer, and what ends a text."""

    def __init__(self, tokenizer: Any, generation_ends: int | Sequence[int] | None) -> None:
        self._tokenizer = tokenizer
        self.class_name = type(tokenizer).__name__
        self.bos: str = tokenizer.bos_token or ""
        self.eos: str = tokenizer.eos_token or ""
        self._adds_bos = bool(self.bos) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        ends = [generation_ends] if isinstance(generation_ends, int) else list(generation_ends or ())
        # What the model's own files declare to end a text.
        self.declared_ends = frozenset(ends) | frozenset(
            [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        )
        added = tokenizer.get_added_vocab()
        ends += [added[token] for token in (*_END_TOKENS, self.eos) if token in added]
        self.ends = self.declared_ends | frozenset(ends)
        self._line_ends: dict[int, bool] = {}

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """Tokens beside the learned vocabulary, in the order of their ids."""
        added: dict[str, int] = self._tokenizer.get_added_vocab()
        return tuple(sorted(added, key=added.__getitem__))

    def token_text(self, token: int) -> str:
        """Return one token as the vocabulary writes it, empty for an id out of range."""
        found = self._tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(self._tokenizer) else None
        return str(found or "")

    def vocabulary(self) -> list[str]:
        """Return the text of each learned token; special ones have none."""
        texts: list[str] = self._tokenizer.batch_decode(
            [[token] for token in range(self._tokenizer.vocab_size)],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return texts

    def ends_line(self, token: int) -> bool:
        """Return whether there is a line break in a token."""
        if token not in self._line_ends:
            self._line_ends[token] = "\n" in self._plain([token])
        return self._line_ends[token]

    def tokens(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._adds_bos and not text.startswith(self.bos):
            return [self._tokenizer.bos_token_id, *ids]
        return ids

    def apply_template(self, what: Conversation) -> str:
        """Return the prompt that transformers makes of a conversation; it may raise anything."""
        tools = what.tools and list(what.tools)
        return str(
            self._tokenizer.apply_chat_template(
                list(what.messages), tools=tools, tokenize=False, add_generation_prompt=True
            )
        )

    def decode(self, ids: Sequence[int], before: Sequence[int]) -> str:
        """Return the text that `ids` add to `before`; special tokens are left out."""
        seam = list(before[-_SEAM:])
        return self._plain([*seam, *ids])[len(self._plain(seam)) :]

    def _plain(self, ids: list[int]) -> str:
        decoded: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded


class Writer(Drawing):
    """Gathers one completion until a stop string, an end token, a loop or the budget."""

    def __init__(
        self, text: Text, request: Request, prompt: Sequence[int], sampling: Sampling, grammar: Constraint | None = None
    ) -> None:
        super().__init__(request, prompt, sampling, text.ends_line, grammar)
        self._text, self._prompt = text, list(prompt)
        self._answer = ""
        self.finish = ""
        # A token is a byte or more, so a stop string of n bytes ends within the last n + 1 tokens.
        self._window = 1 + max((len(stop.encode()) for stop in sampling.stop), default=0)

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn at random."""
        return self._sampling.temperature > 0.0

    @property
    def room(self) -> int:
        """How many tokens may still be written."""
        return self._sampling.max_tokens - len(self._written)

    def push(self, token: int) -> bool:
        """Append the next token; return whether the text continues."""
        if token in self._text.ends:
            return self._end("eos")
        self.append(token)
        if self._sampling.stop and self._stopped():
            self.close()
            return False
        return self._end(reason) if (reason := self.reason_to_end()) else True

    def _stopped(self) -> bool:
        n = min(self._window, len(self._written))
        before = [*self._prompt, *self._written[:-n]][-_SEAM:]
        tail = self._text.decode(self._written[-n:], before)
        if not any(stop in tail for stop in self._sampling.stop):
            return False
        answer = self._text.decode(self._written, self._prompt)
        if (whole := until_stop(answer, self._sampling.stop)) is None:
            return False
        self._answer, self.finish = whole, "stop"
        return True

    def _end(self, finish: str) -> bool:
        self._answer, self.finish = self._text.decode(self._written, self._prompt), finish
        self.close()
        return False

    def completion(self, shared: int) -> Completion:
        return Completion(
            text=self._answer,
            finish=self.finish,
            prompt_tokens=len(self._prompt),
            completion_tokens=len(self._written),
            cached_tokens=shared,
        )
