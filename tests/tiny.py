"""Tiny models made in code: random weights, two layers, a tokenizer trained on a shipped task's words."""

from __future__ import annotations

from pathlib import Path

from arte_edge.tasks.loaders import load_task

__all__ = ["SPECIAL", "TASK", "TEMPLATE", "write_student", "write_tokenizer"]

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|begin|>", "<|im_start|>", "<|im_end|>")
TASK = "home_intents"


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> int:
    """Train a byte-level tokenizer on the task's words and save it; return its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([seed.input for seed in load_task(TASK).seed], trainer)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=SPECIAL[0], eos_token=SPECIAL[2], chat_template=template
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_student(folder: Path, seed: int = 4) -> Path:
    """Write a random two-layer Llama in float16 to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=write_tokenizer(folder),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    return folder
