"""A tiny random Llama with a real byte-level tokenizer, with and without a begin token of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TEXT = "Is true and false true? no yes maybe the answer is not 0123456789 <ans> </ans> . \n"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Train tiny models on one thread: threads that wait for each other cost more than they bring."""
    import torch

    threads = torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the trainings that a test starts and kills
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    del os.environ["OMP_NUM_THREADS"]


def _save_tokenizer(folder: Path, adds_bos: bool) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<pad>", "<bos>", "<eos>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT] * 20, trainer)
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", inner.token_to_id("<bos>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<|user|>"],
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make the checkpoint folder of a random two-layer model; the same call gives the same folder."""
    made: dict[tuple[bool, str], Path] = {}

    def make(*, adds_bos: bool = False, arch: str = "llama") -> Path:
        if (adds_bos, arch) not in made:
            import torch
            import transformers

            folder = tmp_path_factory.mktemp("tiny") / "base"
            n_vocab = _save_tokenizer(folder, adds_bos)
            shared: dict[str, Any] = {
                "vocab_size": n_vocab,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "initializer_range": 0.2,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
                "tie_word_embeddings": True,
            }
            configs = {
                "llama": transformers.LlamaConfig,
                "qwen2": transformers.Qwen2Config,
                "gemma3": transformers.Gemma3TextConfig,
            }
            torch.manual_seed(5)
            model = transformers.AutoModelForCausalLM.from_config(configs[arch](**shared))
            model.to(torch.bfloat16).save_pretrained(folder)
            made[adds_bos, arch] = folder
        return made[adds_bos, arch]

    return make


@pytest.fixture
def sft_rows() -> list[dict[str, str]]:
    """Prompt and completion pairs of different lengths."""
    return [
        {
            "prompt": f"<|user|>Is {i} true?" + " and" * (i % 5) + "\n",
            "completion": f"<ans>{'yes' if i % 2 else 'no'}</ans>",
        }
        for i in range(12)
    ]
