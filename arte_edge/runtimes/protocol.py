"""What a runtime does: the one protocol behind which llama.cpp, ONNX Runtime and transformers run a model.

`Decoder` is the part that works on token ids, which is what a benchmark times. `Runtime` adds the text side:
tokenizer, chat template, logits, greedy text. What distillation needs on top, many prompts at once, is
`arte_edge.runtimes.completion.Engine`.

A new backend is one file with a `Runtime`, most easily a subclass of `BaseRuntime`, and its entry in
`arte_edge.runtimes.loader`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import InputError, first_line
from arte_edge.runtimes.prompt_render import Conversation, Message, render

_Asked = TypeVar("_Asked")  # a prompt, or a conversation


@dataclass(frozen=True)
class RuntimeFacts:
    """Which runtime runs the model and with which settings; the fields go into a speed row as they are."""

    runtime: str
    build_commit: str = ""
    build: str = ""
    n_batch: int = 0
    n_ubatch: int = 0
    type_k: str = ""
    type_v: str = ""
    flash_attn: bool | None = None
    use_mmap: bool | None = None
    bos: int | None = None  # the token that the model expects at the start of every text
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Rendered:
    """What a program that runs a model makes of conversations, with the model's template and its own engine."""

    program: str  # name and version
    texts: tuple[str | None, ...] = ()  # a prompt for each conversation, None where the program refuses it
    refusal: str = ""  # why, of the first that it refuses; alone: why it does not start with this template
    begin: str = ""  # text of the token that the program itself puts in front, and so leaves out of prompts
    unable: str = ""  # why nothing could be learned of the program
    instead: str = ""  # where it is known to put its own text in place of this right template: what to do

    @classmethod
    def by(cls, program: str, render: Callable[[Conversation], str], conversations: Sequence[Conversation]) -> Rendered:
        """Call `render` for each conversation; whatever it raises is a refusal."""
        texts: list[str | None] = []
        refusal = ""
        for conversation in conversations:
            try:
                texts.append(render(conversation))
            except Exception as error:  # a template is a program, and each engine has its own errors
                texts.append(None)
                refusal = refusal or first_line(error)
        return cls(program, tuple(texts), refusal)


@dataclass(frozen=True)
class Served:
    """What a server that users start on a model answers to conversations, without the text that stopped it."""

    program: str
    texts: tuple[str, ...] = ()
    unable: str = ""  # why it gave no answers
    remark: str = ""  # what a client has to know of this server
    own: bool = False  # it runs the very library of the runtime that it is compared with


class Decoder(Protocol):
    """An open model with one KV cache of `context_tokens` tokens, empty at first.

    Nothing is sampled or detokenized in `prefill` and `step`, as in llama-bench: what is timed is the model.
    """

    @property
    def facts(self) -> RuntimeFacts: ...

    @property
    def n_vocab(self) -> int: ...

    @property
    def context_tokens(self) -> int: ...

    def clear(self) -> None:
        """Empty the cache."""

    def prefill(self, tokens: Sequence[int]) -> int:
        """Append `tokens` to the cache; return the most likely next token, its logits computed."""

    def step(self, token: int) -> object:
        """Append one token to the cache and compute the next logits; the return value is not used."""

    def close(self) -> None: ...


class Runtime(Decoder, Protocol):
    """A model with its text side, as a user of this runtime meets it. n tokens of input, v vocabulary size.

    The text is tokenized by the runtime's own tokenizer and rendered by the model's own chat template: an
    export whose weights are right and whose tokenizer is not is broken all the same.
    """

    @property
    def name(self) -> str:
        """The name of the file or folder, without its path."""

    @property
    def quantization(self) -> str:
        """``Q4_K_M``, ``BF16``, ``int4`` and the like; empty if the file does not say."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the model's own chat template, or None."""

    @property
    def special_tokens(self) -> dict[str, str]:
        """``bos_token`` and ``eos_token`` as text, for the template."""

    @property
    def tokenizer_class(self) -> str:
        """What reads the tokenizer file where `file_tokens` is a second reading of it, for messages."""

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """Tokens beside the learned vocabulary, in the order of their ids."""

    @property
    def eos_tokens(self) -> frozenset[int]:
        """Ids that the model's own files declare to end a text."""

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Ids at which the runtime stops generating: the declared ones, and those that it knows by name."""

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a prompt: special tokens parsed, BOS in front if the model adds one."""

    def token_text(self, token: int) -> str:
        """Return one token as text for a message; never raises for an id out of range."""

    def file_tokens(self, text: str) -> list[int] | None:
        """Return the ids that the model's tokenizer file means, where the runtime reads the file with its own code.

        None where there is no second reading to compare with.
        """

    def vocabulary(self) -> list[str]:
        """Return the text of each token that is text by itself (not half a character), special ones left out."""

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the next-token logits ``[n, v]`` after each of `ids`."""

    def generate(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Return what the model writes greedily after each prompt, a stop string included."""

    def chat(self, conversations: Sequence[Sequence[Message]], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Return what the model answers greedily to each conversation, a stop string included.

        It is asked as its users ask it: through the runtime's own chat function, which renders the model's template
        and tokenizes the prompt by itself.

        Raises InputError: the model has no chat template, or it does not render these messages.
        """

    def served(
        self, conversations: Sequence[Sequence[Message]], max_tokens: int, stop: Sequence[str] = ()
    ) -> list[Served]:
        """Return what the servers that users start on this model answer, as far as they are installed here."""

    def constrained(
        self, messages: Sequence[Message], grammar: str, max_tokens: int, stop: Sequence[str] = ()
    ) -> str | None:
        """Return what the model answers greedily if it may write nothing but what `grammar`, in GBNF, permits.

        None: this runtime follows no grammars.
        """

    def render(self, messages: Sequence[Message]) -> str | None:
        """Return the prompt that the model's own chat template makes, None without a template.

        Raises InputError: the template does not render these messages.
        """

    def renderings(self, conversations: Sequence[Conversation]) -> list[Rendered]:
        """Return what the programs that users run this model with make of its template; one row a program."""


class BaseRuntime(ABC):
    """What every `Runtime` does in the same way."""

    chat_template: str | None
    special_tokens: dict[str, str]
    tokenizer_class = "tokenizer"

    def file_tokens(self, text: str) -> list[int] | None:
        return None

    def constrained(
        self, messages: Sequence[Message], grammar: str, max_tokens: int, stop: Sequence[str] = ()
    ) -> str | None:
        return None

    def render(self, messages: Sequence[Message]) -> str | None:
        return None if self.chat_template is None else render(self, messages)

    def renderings(self, conversations: Sequence[Conversation]) -> list[Rendered]:
        return []

    def served(
        self, conversations: Sequence[Sequence[Message]], max_tokens: int, stop: Sequence[str] = ()
    ) -> list[Served]:
        return []

    @cached_property
    def _known(self) -> dict[Hashable, str]:
        return {}

    def generate(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """See `Runtime.generate`. Texts are cached: one reference is compared with many artifacts."""
        keys = [(prompt, max_tokens, tuple(stop)) for prompt in prompts]
        return self._remembered(keys, prompts, lambda new: self._generate(new, max_tokens, tuple(stop)))

    def chat(self, conversations: Sequence[Sequence[Message]], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """See `Runtime.chat`. Texts are cached, as those of `generate`."""
        if self.chat_template is None:
            raise InputError("The model has no chat template", "Give it one, or ask with a rendered prompt.")
        asked = [[dict(message) for message in messages] for messages in conversations]
        keys = [(*(tuple(m.items()) for m in messages), max_tokens, tuple(stop)) for messages in asked]
        return self._remembered(keys, asked, lambda new: self._chat(new, max_tokens, tuple(stop)))

    def _remembered(
        self, keys: Sequence[Hashable], asked: Sequence[_Asked], answer: Callable[[list[_Asked]], list[str]]
    ) -> list[str]:
        """Return the text of each key; `answer` is called with those of `asked` that have no text yet."""
        new = {key: one for key, one in zip(keys, asked, strict=True) if key not in self._known}
        if new:
            self._known.update(zip(new, answer(list(new.values())), strict=True))
        return [self._known[key] for key in keys]

    @abstractmethod
    def _generate(self, prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[str]: ...

    def _chat(self, conversations: list[list[dict[str, str]]], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        """Answer through the model's template and the runtime's tokenizer, for runtimes without chat function."""
        return self._generate([render(self, messages) for messages in conversations], max_tokens, stop)


def check_context(name: str, limit: int, context_tokens: int) -> None:
    """Raise if a cache of `context_tokens` is larger than the model's own `limit`; 0: not known, or not asked for.

    Raises InputError: it is.
    """
    if 0 < limit < context_tokens:
        raise InputError(f"{name} was made for {limit} tokens, the test needs {context_tokens}", "Lower -p, -n or -d.")


def readable(texts: Iterable[str]) -> list[str]:
    """Return the texts of tokens that are whole characters."""
    return [text for text in texts if text and "\ufffd" not in text]


def until_stop(text: str, stop: Sequence[str]) -> str | None:
    """Return `text` up to and with the first stop string in it, None if there is none."""
    found = [(at, s) for s in stop if (at := text.find(s)) >= 0]
    if not found:
        return None
    at, first = min(found)
    return text[: at + len(first)]
