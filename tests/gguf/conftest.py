"""Tiny random checkpoints of every family, tokenizers trained in code, and what llama.cpp computes with both."""

import ctypes
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray
from tiny import Folders, Make

from arte_edge.gguf.convert import convert
from arte_edge.gguf.reader import STRING, UINT32, Field
from arte_edge.gguf.writer import rewrite

CORPUS = [
    "The quick brown fox jumps over the lazy dog. I'll say: it's 1234567 o'clock, isn't it?",
    "def main(x):\n    return x + 42  # two  spaces\n\n\tprint('done')\r\n",
    "Ünïcödé straße, 日本語テキスト, مرحبا بالعالم, привет, 🙂🚀 ½ ² x=1;y=2",
    "What is 12 + 30? The answer is 42. HELLO World CamelCase snake_case 3.14159",
] * 8
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(kind: str) -> Any:
    """Train a byte-level BPE tokenizer that splits words as `kind` does."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    words = ByteLevel(add_prefix_space=False)
    if kind == "digits":
        words = Sequence([Digits(individual_digits=True), words])
    elif kind != "gpt-2":
        regex = Regex({"qwen2": QWEN2, "gpt-4o": GPT4O}.get(kind, LLAMA3))
        split = Split(regex, "removed", True) if kind == "gpt-4o" else Split(regex, "isolated")
        words = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    return tiny.bpe(CORPUS, SPECIAL, 600, cut=words, ignore_merges=kind == "llama3")


def sentencepiece(kind: str) -> Any:
    """Train what transformers makes of a SentencePiece model: "prefixed" (Llama 2), "plain" (Gemma)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if kind == "prefixed" else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    specials = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, max_token_length=8)
    tokenizer.train_from_iterator(["▁" + word for text in CORPUS for word in text.split()], trainer)
    # The bytes are plain tokens: as added ones they would be found in texts.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [row for row in content["added_tokens"] if not row["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(content))


@functools.cache
def _tokenizer(kind: str) -> Any:
    inner = sentencepiece(kind) if kind in ("plain", "prefixed") else byte_level(kind)
    roles = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    return tiny.chat_tokenizer(inner, "{{ messages[0]['content'] }}", **roles)


FAMILY_TOKENIZERS = dict(
    **dict(llama="llama3", qwen2="qwen2", qwen3="qwen2", gemma3="plain"),
    **dict(smollm3="llama3", phi3="gpt-4o", granite="digits"),
)
# What differs from `CHECKPOINT`, by family.
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": dict(head_dim=32),
    "gemma3": dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=16, num_hidden_layers=7),
    "smollm3": dict(num_hidden_layers=5),
    "phi3": dict(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}),
    "granite": {f"{part}_multiplier": x for part, x in (("attention", 0.1), ("embedding", 3.0), ("residual", 0.4))}
    | {"logits_scaling": 2.0},
}
CHECKPOINT: dict[str, Any] = dict(
    **dict(dtype="bfloat16", vary=True, max_position_embeddings=128, initializer_range=0.2),
    **dict(bos_token_id=1, eos_token_id=2),
)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: Folders) -> Make:
    """Make a tiny random checkpoint with a tokenizer; the same call gives the same folder, so do not change it."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", *, seed: int = 7, shard: str = "", kind: str = "", **config: Any) -> Path:
        key = repr((family, seed, shard, kind, sorted(config.items())))
        if key not in made:
            tokenizer = _tokenizer(kind or FAMILY_TOKENIZERS[family])
            settings = {"vocab_size": len(tokenizer) + 3, "pad_token_id": 5} | FAMILY_CONFIGS.get(family, {})
            settings = CHECKPOINT | {"seed": seed, "shard": shard} | settings | config
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            name = {"gemma3": "gemma3_text"}.get(family, family)
            made[key] = tiny.save_checkpoint(folder, tokenizer, name, **settings)
        return made[key]

    return make


@pytest.fixture(scope="session")
def llama_logits() -> Make:
    """Logits ``[n_token, n_vocab]`` of llama.cpp: `n_prefill` tokens at once (default: all), then one by one."""
    import llama_cpp as lib

    silent = lib.llama_log_callback(lambda level, text, data: None)  # must live as long as it is set
    lib.llama_log_set(silent, ctypes.c_void_p())
    lib.llama_backend_init()

    def logits(
        path: Path, ids: Sequence[int], n_prefill: int | None = None, adapter: Path | None = None
    ) -> NDArray[np.float32]:
        n_prefill = n_prefill or len(ids)
        model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        assert model, f"llama.cpp does not load {path}"
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 128, 128, 1, 1
        # A float32 cache: what remains is the layout.
        params.flash_attn_type = params.type_k = params.type_v = 0
        context = lib.llama_init_from_model(model, params)
        if adapter is not None:
            lora = lib.llama_adapter_lora_init(model, str(adapter).encode())
            assert lora, f"llama.cpp does not load {adapter}"
            pointer = lib.llama_adapter_lora_p_ctypes
            adapters = (pointer * 1)(ctypes.cast(lora, pointer))
            assert lib.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
        n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        batch = lib.llama_batch_init(len(ids), 0, 1)
        rows = []
        for start, end in [(0, n_prefill), *((i, i + 1) for i in range(n_prefill, len(ids)))]:
            batch.n_tokens = end - start
            for i, token in enumerate(ids[start:end]):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
                batch.seq_id[i][0] = 0
            assert lib.llama_decode(context, batch) == 0
            for i in range(end - start):
                row = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), shape=(n_vocab,))
                rows.append(row.copy())
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        lib.llama_model_free(model)
        return np.stack(rows)

    logits.silent = silent  # type: ignore[attr-defined]
    return logits


@pytest.fixture(scope="session")
def llama_tokens() -> Make:
    """Ask llama.cpp how a GGUF's vocabulary cuts a text, special tokens parsed and added."""
    import llama_cpp

    opened = functools.cache(lambda path: llama_cpp.Llama(str(path), vocab_only=True, verbose=False))
    return lambda path, text: opened(path).tokenize(text.encode("utf-8"), add_bos=True, special=True)


@dataclass(frozen=True)
class TinyModel:
    """A random two-layer checkpoint, and a GGUF file of its shape as the base: other weights, private metadata."""

    checkpoint: Path
    base_gguf: Path

    def hf_logits(self, ids: Sequence[int], adapter: Path | None = None) -> np.ndarray:
        return tiny.hf_logits(self.checkpoint, ids, adapter)


@pytest.fixture(scope="session")
def tiny_model(make_checkpoint: Make, tmp_path_factory: Folders) -> Make:
    """Make the tiny model of an architecture; the same call gives the same model."""

    @functools.cache
    def make(arch: str, tied: bool = True) -> TinyModel:
        config = {"num_hidden_layers": 2, "tie_word_embeddings": tied}
        base = tmp_path_factory.mktemp(f"base-{arch}") / "base.gguf"
        convert(make_checkpoint(arch, seed=8, **config), base)
        private = Field(STRING, b"/home/somebody/imatrix.dat")
        rewrite(base, {"quantize.imatrix.file": private, "general.file_type": Field(UINT32, 2)})
        return TinyModel(make_checkpoint(arch, **config), base)

    return make
