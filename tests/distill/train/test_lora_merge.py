import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import Folders, hf_logits, relative_error, save_adapter

from arte_edge.checkpoint import read_config, shapes_of
from arte_edge.distill.train.common import load
from arte_edge.distill.train.lora_merge import (
    check_merge,
    merge,
    merge_adapter,
    read_adapter,
    sixteen_bits,
    write_checkpoint,
)
from arte_edge.errors import ArteError, InputError
from arte_edge.gguf.convert import convert
from arte_edge.gguf.reader import read_model_header

IDS = list(range(20, 60))
PROMPTS = ["<|user|>Is true and false true?\n", "the answer is not maybe", "no " * 20]


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint: Any, tmp_path_factory: Folders) -> Path:
    """A LoRA with random matrices, of the size of a short training."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(tiny_checkpoint(), folder, IDS, target_modules="all-linear")
    return folder


BOTH = ["embed_tokens", "lm_head"]
MERGED = {  # settings of the adapter, and whether output and embedding are one matrix after it
    "trained matrices": ({"modules_to_save": BOTH}, False),
    "trained head": ({"modules_to_save": ["lm_head"]}, False),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "tied": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [5, 6, 7]}}, True),
    "norms": ({"modules_to_save": ["norm"]}, True),
    "dora": ({"use_dora": True}, True),
    "rslora": ({"use_rslora": True, "r": 16}, True),
    "patterns": ({"rank_pattern": {"layers.1.self_attn.q_proj": 8}}, True),
    "more tokens": ({"modules_to_save": BOTH, "more_tokens": 3}, False),
    "more tokens, targets": ({"target_modules": ["q_proj", *BOTH], "more_tokens": 3}, False),
}


@pytest.mark.parametrize("kind", MERGED)
def test_a_merged_checkpoint_is_the_model_that_was_trained(tiny_checkpoint: Any, tmp_path: Path, kind: str) -> None:
    lora, tied = MERGED[kind]
    base, adapter, ids = tiny_checkpoint(), tmp_path / "adapter", [*IDS, 5, 6, 7]
    wanted = save_adapter(base, adapter, ids, **lora)
    merged = merge_adapter(base, adapter, tmp_path / "merged")
    assert relative_error(hf_logits(merged, ids), wanted) < 5e-3
    check_merge(base, adapter, merged, PROMPTS)
    assert read_config(merged)["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in shapes_of(merged)) is not tied
    assert shapes_of(merged)["model.embed_tokens.weight"][0] == wanted.shape[1]
    gguf = convert(merged, tmp_path / "x.gguf", "F32")
    assert ("output.weight" in read_model_header(gguf).tensors) is not tied


@pytest.mark.parametrize(
    ("lora", "old", "new", "message"),
    [
        ({}, "layers.1.", "layers.7.", r"no place for .*layers\.7"),
        ({}, "self_attn", "attention", "no place for"),
        ({}, "layers.0.self_attn.q_proj.lora_A", "", "is missing"),
        ({}, "model.layers.0.self_attn.q_proj.lora_A", "score", "score"),
        ({"lora_bias": True}, "nothing", "", "lora_bias"),
        ({"modules_to_save": BOTH, "more_tokens": 3}, "base_model", "", "does not fit"),
        ({"more_tokens": 3}, "embed_tokens|lm_head", "", r"has \d+ tokens, .* embeddings for \d+"),
    ],
)
def test_an_adapter_that_does_not_fit_in_every_tensor_is_rejected(
    tiny_checkpoint: Any, tmp_path: Path, lora: dict[str, Any], old: str, new: str, message: str
) -> None:
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / "adapter"
    save_adapter(tiny_checkpoint(), adapter, IDS, **lora)
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {re.sub(old, new, name): t for name, t in tensors.items() if new or not re.search(old, name)}
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message):
        merge_adapter(tiny_checkpoint(), adapter, tmp_path / "merged")


def test_a_merged_checkpoint_is_base_plus_adapter_and_closer_in_float16_than_in_bfloat16(
    tiny_checkpoint: Any, adapter: Path, tmp_path: Path
) -> None:
    lost = {}
    for dtype in ("auto", "bfloat16"):
        merged = merge_adapter(tiny_checkpoint(), adapter, tmp_path / dtype, dtype)
        check = check_merge(tiny_checkpoint(), adapter, merged, PROMPTS)
        lost[dtype] = check.mean_abs_diff
        assert check.tokens > 30 and check.top1_agreement >= 0.95
    assert 0 < lost["auto"] < 0.02 * check.update_mean_abs
    assert lost["bfloat16"] > 4 * lost["auto"]


@pytest.mark.parametrize("mistake", ["forgot", "double"])
def test_a_merge_without_the_adapter_or_with_a_wrong_scale_is_an_error(
    mistake: str, tiny_checkpoint: Any, adapter: Path, tmp_path: Path
) -> None:
    base = tiny_checkpoint()
    if mistake == "forgot":
        wrong = write_checkpoint(load(base, frozen=False)[0], base, tmp_path / "wrong")
    else:
        double = tiny.edited_json(adapter, tmp_path / "double", "adapter_config.json", lora_alpha=16)
        wrong = merge_adapter(base, double, tmp_path / "wrong")
    with pytest.raises(ArteError, match="not the same model"):
        check_merge(base, adapter, wrong, PROMPTS)


def test_weights_that_diverged_or_overflow_are_named(tiny_checkpoint: Any, tmp_path: Path) -> None:
    import torch

    for dtype in ("bfloat16", "float16"):
        model, _ = load(tiny_checkpoint(), frozen=False)
        with torch.no_grad():
            model.model.norm.weight[0] = 1e6
        if dtype == "bfloat16":
            write_checkpoint(model, tiny_checkpoint(), tmp_path / "out", dtype)
    with pytest.raises(ArteError, match=r"model\.norm\.weight"):
        write_checkpoint(model, tiny_checkpoint(), tmp_path / "out", "float16")


def test_gemma_is_written_as_bfloat16(tiny_checkpoint: Any) -> None:
    assert sixteen_bits(tiny_checkpoint(), "auto") == "float16"
    assert sixteen_bits(tiny_checkpoint(arch="gemma3"), "auto") == "bfloat16"
    assert sixteen_bits(tiny_checkpoint(), "bfloat16") == "bfloat16"


def test_a_merge_is_checked_by_logits_and_appears_whole(tiny_checkpoint: Any, adapter: Path, tmp_path: Path) -> None:
    found = read_adapter(adapter)
    (tmp_path / ".merged.partial").mkdir()  # left by a killed process
    check = merge(found, found.base.checkpoint(), tmp_path / "merged", PROMPTS)
    assert check.top1_agreement >= 0.95 and check.tokens > 20
    assert 0 < check.mean_abs_diff < 0.1 * check.update_mean_abs
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tiny_checkpoint() / name).read_bytes()


def test_after_a_failed_merge_nothing_remains(tiny_checkpoint: Any, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = tiny.save_checkpoint(tmp_path / "other", AutoTokenizer.from_pretrained(tiny_checkpoint()), hidden_size=64)
    with pytest.raises((InputError, ArteError)):
        merge(read_adapter(adapter, base=str(other)), other, tmp_path / "merged", PROMPTS)
    assert not (tmp_path / "merged").exists()
