"""Tiny random models as a checkpoint and as GGUF, and llama.cpp's own word on their logits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

VOCAB = 96
ARCHS = ("llama", "qwen2", "gemma3")


@dataclass(frozen=True)
class TinyModel:
    """A random two-layer model: a checkpoint in bfloat16, and a GGUF file of its shape as the base."""

    arch: str
    checkpoint: Path
    base_gguf: Path  # right metadata and shapes; its weights are zeros

    def hf_logits(self, ids: Sequence[int], adapter: Path | None = None) -> NDArray[np.float32]:
        """Return transformers' logits ``[n_token, n_vocab]`` in float32."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            logits: NDArray[np.float32] = model.eval()(torch.tensor([list(ids)])).logits[0].numpy()
        return logits


def _config(arch: str, tied: bool) -> object:
    import transformers as t

    shared = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    if arch == "gemma3":
        return t.Gemma3TextConfig(**shared, query_pre_attn_scalar=16, sliding_window=64)
    return t.LlamaConfig(**shared) if arch == "llama" else t.Qwen2Config(**shared)


def _write_base(path: Path, arch: str, shapes: dict[str, tuple[int, ...]]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("Tiny base")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_string("quantize.imatrix.file", "/home/somebody/imatrix.dat")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_freq_base(1_000_000.0 if arch == "gemma3" else 10_000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-6)
    if arch == "gemma3":
        writer.add_sliding_window(64)
    table = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], 2)
    for name, shape in shapes.items():
        writer.add_tensor(table.get_name(name, (".weight", ".bias")), np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """Make the tiny model of an architecture; the same call gives the same model."""
    made: dict[tuple[str, bool], TinyModel] = {}

    def make(arch: str, tied: bool = True) -> TinyModel:
        if (arch, tied) not in made:
            import torch
            from transformers import AutoModelForCausalLM

            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(_config(arch, tied)).to(torch.bfloat16)
            with torch.no_grad():  # fresh norms are all alike and fresh biases zero: a mix-up would not show
                for tensor in model.parameters():
                    if tensor.ndim == 1:
                        tensor.add_(0.3 * torch.randn_like(tensor))
            folder = tmp_path_factory.mktemp(f"tiny-{arch}")
            model.save_pretrained(folder / "checkpoint")
            shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
            _write_base(folder / "base.gguf", arch, shapes)
            made[arch, tied] = TinyModel(arch, folder / "checkpoint", folder / "base.gguf")
        return made[arch, tied]

    return make


@pytest.fixture(scope="session")
def llama_logits() -> Callable[..., NDArray[np.float32]]:
    """Ask llama.cpp for the logits ``[n_token, n_vocab]`` of a GGUF file, with a LoRA adapter if given."""
    import llama_cpp as lib

    silent = lib.llama_log_callback(lambda level, text, data: None)

    def logits(path: Path, ids: Sequence[int], adapter: Path | None = None) -> NDArray[np.float32]:
        lib.llama_log_set(silent, ctypes.c_void_p())
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        assert model, f"llama.cpp does not load {path}"
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 128, 128, 2, 2
        params.flash_attn_type = 0
        params.type_k = params.type_v = 0  # a float32 cache: what remains is the layout
        context = lib.llama_init_from_model(model, params)
        if adapter is not None:
            lora = lib.llama_adapter_lora_init(model, str(adapter).encode())
            assert lora, f"llama.cpp does not load {adapter}"
            adapters = (lib.llama_adapter_lora_p_ctypes * 1)(
                ctypes.cast(lora, lib.llama_adapter_lora_p_ctypes)
            )
            assert lib.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        assert lib.llama_decode(context, batch) == 0
        n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        rows = [
            np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), shape=(n_vocab,)).copy()
            for i in range(len(ids))
        ]
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        lib.llama_model_free(model)
        return np.stack(rows)

    return logits
