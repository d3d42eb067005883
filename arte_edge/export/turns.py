"""What a chat template writes around each turn, found out by rendering it.

Ollama has no Jinja: a Modelfile holds a Go template. Instead of guessing a template's
family by its text, it is rendered with contents that can be found again, and the
pieces between them are read off. Most templates are such pieces and nothing else; for
one that is more (tools, reasoning that is cut out of old turns), the pieces of a plain
conversation are still right, or they contradict each other and there is no answer.

    first U t0                              user alone
    system S between U t0                   system and user
    first U t0 A next V t0                  user, assistant, user
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arte_edge.errors import InputError
from arte_edge.export.chat import Chat
from arte_edge.runtimes.prompt_render import Message

__all__ = ["Turns", "read_turns"]

_S, _U, _A, _V = "Sysstemm", "Usserr", "Asssistantt", "Userragainn"


@dataclass(frozen=True)
class Turns:
    """The pieces. `opening` follows every question: it closes the user's turn and opens the model's."""

    first: str  # before the first user turn without a system message, a default system message included
    system: str  # before the system message
    between: str  # from the system message to the user's
    opening: str
    next: str  # from an answer to the next question

    def text(self, messages: Sequence[Message]) -> str:
        """Return the prompt for alternating `messages` as the pieces make it."""
        system, parts, asked = "", [], False
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                system = content
            elif message["role"] == "user":
                opened = f"{self.system}{system}{self.between}" if system else self.first
                parts += [self.next if asked else opened, content, self.opening]
                asked = True
            else:
                parts.append(content)
        return "".join(parts)


def read_turns(chat: Chat) -> Turns | None:
    """Return the pieces of a chat template, None if there is no template or its pieces contradict each other.

    A begin token that the tokenizer writes itself is left out: the runtime writes it too.
    """
    if chat.chat_template is None:
        return None
    user, system, answer = _message("user", _U), _message("system", _S), _message("assistant", _A)
    try:
        one = _split(chat.render([user]), _U)
        two = _split(chat.render([system, user]), _S, _U)
        many = _split(chat.render([user, answer, _message("user", _V)]), _U, _A, _V)
    except InputError:
        return None
    if one is None or two is None or many is None:
        return None
    if not one[1] == two[2] == many[1] == many[3] or many[0] != one[0]:
        return None
    bos = chat.special_tokens.get("bos_token", "") if chat.adds_bos else ""
    first, before = one[0].removeprefix(bos), two[0].removeprefix(bos)
    return Turns(first, before, two[1], one[1], many[2])


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _split(text: str, *contents: str) -> list[str] | None:
    """Return what stands before, between and after `contents`; None unless each stands once, in order."""
    pieces = []
    for content in contents:
        if text.count(content) != 1:
            return None
        before, _, text = text.partition(content)
        pieces.append(before)
    return [*pieces, text]
