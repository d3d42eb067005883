"""Make sure that a converted tokenizer cuts text as the GGUF's own runtime does.

A GGUF names its way of cutting text into words (``tokenizer.ggml.pre``); a
converter that overlooks it gives a model tokens it was not trained on, without any
error. Student and teacher are measured in one runtime and trained in another, so
the two must agree.
"""

from __future__ import annotations

from typing import Any

from arte_edge.errors import ArteError
from arte_edge.models.gguf_header import GgufHeader

__all__ = ["PROBES", "check_tokenizer", "mend_pre_tokenizer"]

# What prompts are made of, and what tokenizers stumble over: digits, spaces, quotes, newlines, other scripts.
PROBES = (
    "There are 1234567 apples, 12 pears and 3.14159 pies on 2024-05-06.",
    "Hello  world\n\n\tI'm   here, you'll see; DON'T.",
    "not ( True ) and ( False ) is<ans>True</ans>",
    "<Question_4><input>x=12;y=[1,2,3]\n    return 007</input>",
    "Ünïcödé, 日本語テキスト, مرحبا, 🙂 ½ ²",
    "a\r\nb and some more  ",
)


def mend_pre_tokenizer(tokenizer: Any, header: GgufHeader) -> None:
    """Put back what transformers drops of ``tokenizer.ggml.pre``: SmolLM's split of numbers into digits."""
    from tokenizers import pre_tokenizers

    if header.metadata.get("tokenizer.ggml.pre") != "smollm":
        return
    parts = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)


def check_tokenizer(tokenizer: Any, header: GgufHeader) -> None:
    """Raise unless `tokenizer` and llama.cpp cut every probe into the same tokens.

    Raises:
        ArteError: they differ; shows the text.
    """
    from llama_cpp import Llama

    runtime = Llama(str(header.path), vocab_only=True, verbose=False)
    try:
        for text in PROBES:
            ours = tokenizer(text)["input_ids"]
            theirs = runtime.tokenize(text.encode("utf-8"), add_bos=True, special=True)
            if ours != theirs:
                raise ArteError(
                    f"{header.path}: transformers and llama.cpp cut {text!r} into different tokens",
                    "Training would teach tokens the device never reads. Give the original checkpoint.",
                )
    finally:
        runtime.close()
