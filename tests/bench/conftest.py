"""A random two-layer Llama as a GGUF file, small enough to measure in no time, and a machine to measure on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from arte_edge.results.rows import DeviceFacts

N_VOCAB, WIDTH, HEADS, N_FF, LAYERS = 96, 64, 4, 96, 2


@pytest.fixture(scope="session")
def this_device() -> DeviceFacts:
    return DeviceFacts(fingerprint="0" * 16, cpu="test", arch="x86_64", cores=1, memory_bytes=1 << 32)


@pytest.fixture(scope="session")
def bench_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("bench") / "tiny-F16.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(33 + i) if i < 90 else f"<{i}>" for i in range(N_VOCAB)])
    writer.add_token_types([gguf.TokenType.NORMAL] * 90 + [gguf.TokenType.CONTROL] * (N_VOCAB - 90))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(N_VOCAB - 2)
    writer.add_eos_token_id(N_VOCAB - 1)
    writer.add_add_bos_token(True)
    writer.add_vocab_size(N_VOCAB)
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    rng = np.random.default_rng(5)
    shapes = {"token_embd": (N_VOCAB, WIDTH), "output": (N_VOCAB, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{name}": (N_FF, WIDTH) for name in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down"] = (WIDTH, N_FF)
    norms = ["output_norm", *(f"blk.{i}.{n}_norm" for i in range(LAYERS) for n in ("attn", "ffn"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.3, shape).astype(np.float16))
    tiny.finish(writer)
    return path
