"""Open a checkpoint folder with transformers: safetensors alone, no code of its own, an adapter merged in."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arte_edge.errors import InputError
from arte_edge.models.hashing import sha256_file

if TYPE_CHECKING:
    import torch

__all__ = ["adapter_sha256", "load", "pick_dtype", "room_tokens"]

_BATCH_TOKENS = (16_384, 262_144)  # rows times length of a batch: on a CPU and at least, at most
_CACHE_SHARE = 0.3  # of a GPU's free memory for keys and values; as much again while they grow by a token


def adapter_sha256(folder: Path) -> str:
    """Return one sha256 of a LoRA adapter: its weights, and of its configuration all but the base's place.

    Raises:
        InputError: not an adapter folder with safetensors.
    """
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if not weights.is_file() or not config.is_file():
        raise InputError(
            f"{folder}: no adapter here", f"An adapter folder holds {weights.name} and {config.name}."
        )
    settings = json.loads(config.read_text("utf-8"))
    settings.pop("base_model_name_or_path", None)
    canonical = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(f"{sha256_file(weights)}\n{canonical}".encode()).hexdigest()


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the kind of floats that `wanted`, or the environment in place of auto, stands for on `device`."""
    import torch

    if wanted == "auto":
        wanted = os.environ.get("ARTE_EDGE_DTYPE", "auto")
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    kinds["auto"] = torch.bfloat16 if device.type == "cuda" else torch.float32
    if wanted not in kinds:
        raise InputError(f"dtype {wanted}: not a kind of floats", f"One of {', '.join(kinds)}.")
    return kinds[wanted]


def room_tokens(config: Any, device: torch.device) -> int:
    """Return how many tokens of all rows together one batch may hold: a GPU is fed by far more than a CPU."""
    import torch

    if device.type != "cuda":
        return _BATCH_TOKENS[0]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * 2 * config.num_hidden_layers * heads * width  # keys and values of 16 bits
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return int(min(max(_CACHE_SHARE * free_bytes / bytes_per_token, _BATCH_TOKENS[0]), _BATCH_TOKENS[1]))


def load(folder: Path, adapter: Path | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return model and tokenizer, the adapter merged in."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()  # the command shows progress of its own
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no checkpoint here (config.json is missing)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(
            f"{folder}: transformers cannot load this checkpoint: {first_line}",
            "It needs safetensors weights, a tokenizer, and a family that transformers itself knows.",
        ) from error
    if adapter is not None:
        from peft import PeftModel

        adapter_sha256(adapter)  # refuses a folder with pickled weights before peft would read them
        model = PeftModel.from_pretrained(model, adapter, is_trainable=False).merge_and_unload()
    return model, tokenizer
