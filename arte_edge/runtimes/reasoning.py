"""Take a model's reasoning out of its text: what stands between ``<think>`` and ``</think>``, and its relatives.

Reasoning is paid for, but it is no part of an answer: a training row or a question that holds it would teach the
student to write it. Servers with a reasoning parser send it in a field of its own; all others leave it in the text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

OUT_OF_BUDGET = "the token budget ran out inside the model's reasoning"
STOPPED_INSIDE = "the answer ended inside the model's reasoning"

_NAME = r"(?:seed:)?(?:think|thinking|thought|reasoning)"
# DeepSeek, Qwen and most others; Mistral; Command A; Kimi; OpenThinker.
_TAG = re.compile(
    rf"(?P<open><{_NAME}>|\[THINK\]|<\|START_THINKING\|>|◁think▷|<\|begin_of_thought\|>)"
    rf"|</{_NAME}>|\[/THINK\]|<\|END_THINKING\|>|◁/think▷|<\|end_of_thought\|>",
    re.IGNORECASE,
)
# gpt-oss, as its template writes it, and as it looks when a server drops special tokens.
_FINAL = re.compile(r"<\|channel\|>final[^<]*<\|message\|>(.*?)(?:<\|(?:end|return|start|channel)\|>|\Z)", re.DOTALL)
_BARE = re.compile(r"\Aanalysis(?=[A-Z\"'<])(?:.*assistant\s*final(?P<final>.*))?", re.DOTALL)


class Split(NamedTuple):
    """A text without its reasoning, the characters that were taken out, and whether the reasoning had an end."""

    text: str
    reasoning_chars: int = 0
    closed: bool = True


def split_reasoning(text: str) -> Split:
    """Take the reasoning out of `text`. A closing tag that nothing opened ends reasoning that the prompt opened."""
    if "<|channel|>" in text:
        finals = _FINAL.findall(text)
        return _split(text, "".join(finals), closed=bool(finals))
    if bare := _BARE.match(text):
        return _split(text, bare["final"] or "", closed=bare["final"] is not None)
    kept, at, inside = "", 0, False
    for tag in _TAG.finditer(text):
        if tag["open"]:
            kept += "" if inside else text[at : tag.start()]
            inside = True
        else:
            kept, inside = kept if inside else "", False
        at = tag.end()
    if not at:
        return Split(text)
    return _split(text, kept if inside else kept + text[at:], closed=not inside)


def _split(text: str, kept: str, *, closed: bool) -> Split:
    return Split(kept.lstrip(), len(text) - len(kept), closed)


def close_thought(prompt: str) -> str:
    """Return a prompt in which the model does not reason: one that ends in an opening tag gets the closing one."""
    tags = list(_TAG.finditer(prompt))
    if not tags or not tags[-1]["open"] or prompt[tags[-1].end() :].strip():
        return prompt
    opening = tags[-1][0]
    closing = opening.replace("START", "END").replace("begin", "end")
    if closing == opening:
        closing = opening[0] + "/" + opening[1:]
    return f"{prompt.rstrip()}\n\n{closing}\n\n"
