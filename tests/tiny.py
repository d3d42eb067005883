"""The one place where tiny models are made: random weights, a few layers, tokenizers trained in code, GGUF files.

Everything is the same at every call with the same arguments. Tests say `import tiny`: pytest has `tests/` on its path.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arte_edge.tasks.loaders import load_task

__all__ = [
    "SPECIAL",
    "TASK",
    "TEMPLATE",
    "bpe",
    "chat_tokenizer",
    "finish",
    "gguf_writer",
    "save_checkpoint",
    "word_tokenizer",
    "write_base",
    "write_gguf",
    "write_student",
    "write_tokenizer",
]

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|begin|>", "<|im_start|>", "<|im_end|>")
TASK = "home_intents"
# Sizes of every model here unless a test says otherwise.
SIZES = {"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def bpe(
    corpus: Iterable[str],
    special: Sequence[str],
    vocab_size: int,
    *,
    begin: str = "",
    alphabet: Sequence[str] | None = None,
    words: Sequence[str] = (),
    cut: Any = None,
    **model: Any,
) -> Any:
    """Train a byte-level BPE tokenizer.

    Args:
        corpus: texts from which the merges are learned.
        special: control tokens, the first ids.
        vocab_size: tokens in all, `words` left out.
        begin: the special token that is put in front of every text.
        alphabet: characters that are tokens; all bytes if not given.
        words: more entries of the vocabulary, which no merge makes.
        cut: a pre-tokenizer in place of GPT-2's.
        model: of `tokenizers.models.BPE`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=alphabet or pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if words:
        whole = json.loads(tokenizer.to_str())
        for word in words:
            whole["model"]["vocab"][word] = len(whole["model"]["vocab"])
        tokenizer = Tokenizer.from_str(json.dumps(whole))
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    return tokenizer


def word_tokenizer(words: Sequence[str], *, unk: str) -> Any:
    """Return a tokenizer whose tokens are `words`, in this order."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def chat_tokenizer(inner: Any, template: str | None = None, **roles: Any) -> Any:
    """Wrap a tokenizer as transformers does; `roles` are ``bos_token`` and the like."""
    from transformers import PreTrainedTokenizerFast

    more = {"chat_template": template} if template else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **more, **roles)


def save_checkpoint(
    folder: Path,
    tokenizer: Any,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float16",
    vary: bool = False,
    shard: str = "",
    **config: Any,
) -> Path:
    """Write a random model of transformers' `family` and its tokenizer (or only the model: None) to `folder`.

    Args:
        vary: move norms and biases, which are all alike when fresh, so that a mix-up shows.
        shard: greatest size of a weight file.
        config: of the model; `SIZES` and 64 wide where it says nothing.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {} if tokenizer is None else {"vocab_size": len(tokenizer)}
    settings = AutoConfig.for_model(family, **({"hidden_size": 64} | SIZES | known | config))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings).to(getattr(torch, dtype))
    if vary:
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.ndim == 1:
                    tensor.add_(0.3 * torch.randn_like(tensor))
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> int:
    """Train a byte-level tokenizer on the task's words and save it; return its size."""
    tokenizer = _task_tokenizer(template)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _task_tokenizer(template: str | None = TEMPLATE) -> Any:
    inner = bpe([seed.input for seed in load_task(TASK).seed], SPECIAL, 420, begin=SPECIAL[0])
    return chat_tokenizer(inner, template, bos_token=SPECIAL[0], eos_token=SPECIAL[2])


def write_student(folder: Path, seed: int = 4) -> Path:
    """Write a random two-layer Llama in float16 to `folder`."""
    return save_checkpoint(
        folder,
        _task_tokenizer(),
        seed=seed,
        max_position_embeddings=1024,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=2,
        tie_word_embeddings=True,
    )


def gguf_writer(path: Path, arch: str = "llama", **sizes: int) -> Any:
    """Return GGML's own writer with the sizes of a model set: ``context_length=128``, ``head_count=4``, ..."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    for name, value in sizes.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-6)
    return writer


def write_base(writer: Any, arch: str, shapes: Mapping[str, Sequence[int]], n_layer: int = 2) -> None:
    """Finish a GGUF with zeros for weights, named as llama.cpp names transformers' tensors."""
    import gguf

    table = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], n_layer)
    for name, shape in shapes.items():
        writer.add_tensor(
            table.get_name(name, (".weight", ".bias")), np.zeros(tuple(shape), dtype=np.float32)
        )
    finish(writer)


def write_gguf(path: Path) -> Path:
    """Write a random two-layer Llama in F16 with single characters for tokens: it runs in no time."""
    import gguf

    n_vocab, width, heads, n_ff, layers = 96, 64, 4, 96, 2
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(33 + i) if i < 90 else f"<{i}>" for i in range(n_vocab)])
    writer.add_token_types([gguf.TokenType.NORMAL] * 90 + [gguf.TokenType.CONTROL] * (n_vocab - 90))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(n_vocab - 2)
    writer.add_eos_token_id(n_vocab - 1)
    writer.add_add_bos_token(True)
    writer.add_vocab_size(n_vocab)
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    rng = np.random.default_rng(5)
    shapes = {"token_embd": (n_vocab, width), "output": (n_vocab, width)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{name}": (n_ff, width) for name in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down"] = (width, n_ff)
    norms = ["output_norm", *(f"blk.{i}.{n}_norm" for i in range(layers) for n in ("attn", "ffn"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.3, shape).astype(np.float16))
    finish(writer)
    return path


def finish(writer: Any) -> None:
    """Write what a GGUF writer holds, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
