"""Tiny random checkpoints of every family, tokenizers trained in code, and what llama.cpp computes with both."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray
from tiny import Folders, Make

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
    """Train a byte-level BPE tokenizer that cuts words as `kind` does."""
    from tokenizers import Regex, pre_tokenizers

    def split(regex: str, behavior: str = "isolated", invert: bool = False) -> Any:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(regex), behavior, invert),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    ways = {
        "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "digits": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "qwen2": lambda: split(QWEN2),
        "llama3": lambda: split(LLAMA3),
        "llama3-merging": lambda: split(LLAMA3),
        "gpt-4o": lambda: split(GPT4O, "removed", True),
    }
    return tiny.bpe(CORPUS, SPECIAL, 600, cut=ways[kind](), ignore_merges=kind == "llama3")


def sentencepiece(kind: str) -> Any:
    """Train what transformers makes of a SentencePiece model: "prefixed" (Llama 2), "plain" (Gemma), "unigram"."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.train_from_iterator(
            CORPUS, trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>")
        )
        return tokenizer
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if kind == "prefixed" else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    specials = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [" ".join(text.split()) for text in CORPUS]
    pieces = [("▁" + word) for text in words for word in text.split(" ")]
    tokenizer.train_from_iterator(
        pieces, trainers.BpeTrainer(vocab_size=600, special_tokens=specials, max_token_length=8)
    )
    return _without_added_bytes(tokenizer)


def _without_added_bytes(tokenizer: Any) -> Any:
    """Make the bytes plain tokens: as added ones they would be found in texts."""
    import json

    from tokenizers import Tokenizer

    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [row for row in content["added_tokens"] if not row["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(content))


FAMILY_TOKENIZERS = {
    "llama": "llama3",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "gemma3": "plain",
    "smollm3": "llama3",
    "phi3": "gpt-4o",
    "granite": "digits",
}


# What differs from `CHECKPOINT`, by family.
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": dict(head_dim=32),
    "gemma3": dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=16, num_hidden_layers=7),
    "smollm3": dict(num_hidden_layers=5),
    "phi3": dict(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}),
    "granite": dict(
        attention_multiplier=0.1, embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=2.0
    ),
}
CHECKPOINT: dict[str, Any] = dict(
    seed=7,
    dtype="bfloat16",
    vary=True,
    max_position_embeddings=128,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: Folders) -> Make:
    """Make a tiny random checkpoint with a tokenizer; the same call gives the same folder, so do not change it."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", *, seed: int = 7, shard: str = "", kind: str = "", **config: Any) -> Path:
        key = repr((family, seed, shard, kind, sorted(config.items())))
        if key not in made:
            name = kind or FAMILY_TOKENIZERS[family]
            sp = name in ("plain", "prefixed", "unigram")
            roles = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
            inner = sentencepiece(name) if sp else byte_level(name)
            tokenizer = tiny.chat_tokenizer(inner, "{{ messages[0]['content'] }}", **roles)
            settings = {"vocab_size": len(tokenizer) + 3, "pad_token_id": 5} | FAMILY_CONFIGS.get(family, {})
            made[key] = tiny.save_checkpoint(
                tmp_path_factory.mktemp(f"tiny-{family}"),
                tokenizer,
                {"gemma3": "gemma3_text"}.get(family, family),
                shard=shard,
                **(CHECKPOINT | {"seed": seed} | settings | config),
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def hf_logits() -> Make:
    """Ask transformers for the logits ``[n_token, n_vocab]`` of a checkpoint, in float32."""

    def logits(checkpoint: Path, ids: Sequence[int]) -> NDArray[np.float32]:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        with torch.no_grad():
            found: NDArray[np.float32] = model.eval()(torch.tensor([list(ids)])).logits[0].numpy()
        return found

    return logits


@pytest.fixture(scope="session")
def llama_logits() -> Iterator[Make]:
    """Logits ``[n_token, n_vocab]`` of llama.cpp: `n_prefill` tokens at once (default: all), then one by one."""
    import llama_cpp as lib

    silent = lib.llama_log_callback(lambda level, text, data: None)
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
        params.flash_attn_type = params.type_k = params.type_v = (
            0  # a float32 cache: what remains is the layout
        )
        context = lib.llama_init_from_model(model, params)
        if adapter is not None:
            lora = lib.llama_adapter_lora_init(model, str(adapter).encode())
            assert lora, f"llama.cpp does not load {adapter}"
            adapters = (lib.llama_adapter_lora_p_ctypes * 1)(
                ctypes.cast(lora, lib.llama_adapter_lora_p_ctypes)
            )
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

    yield logits


@pytest.fixture(scope="session")
def llama_tokens() -> Callable[[Path, str], list[int]]:
    """Ask llama.cpp how a GGUF's vocabulary cuts a text, special tokens parsed and added."""
    import llama_cpp

    opened: dict[Path, Any] = {}

    def tokens(path: Path, text: str) -> list[int]:
        if path not in opened:
            opened[path] = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        found: list[int] = opened[path].tokenize(text.encode("utf-8"), add_bos=True, special=True)
        return found

    return tokens


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


def _write_base(path: Path, arch: str, shapes: dict[str, tuple[int, ...]]) -> None:
    import gguf

    writer = tiny.gguf_writer(
        path,
        arch,
        vocab_size=VOCAB,
        context_length=128,
        embedding_length=64,
        block_count=2,
        feed_forward_length=96,
        head_count=4,
        head_count_kv=2,
        key_length=16,
        value_length=16,
        rope_dimension_count=16,
    )
    writer.add_name("Tiny base")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_string("quantize.imatrix.file", "/home/somebody/imatrix.dat")
    writer.add_tokenizer_model("no_vocab")
    writer.add_rope_freq_base(1_000_000.0 if arch == "gemma3" else 10_000.0)
    if arch == "gemma3":
        writer.add_sliding_window(64)
    tiny.write_base(writer, arch, shapes)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: Folders) -> Make:
    """Make the tiny model of an architecture; the same call gives the same model."""
    made: dict[tuple[str, bool], TinyModel] = {}

    def make(arch: str, tied: bool = True) -> TinyModel:
        if (arch, tied) not in made:
            from safetensors import safe_open

            own = dict(query_pre_attn_scalar=16, sliding_window=64) if arch == "gemma3" else {}
            folder = tmp_path_factory.mktemp(f"tiny-{arch}")
            checkpoint = tiny.save_checkpoint(
                folder / "checkpoint",
                None,
                {"gemma3": "gemma3_text"}.get(arch, arch),
                **CHECKPOINT,
                **own,
                vocab_size=VOCAB,
                head_dim=16,
                pad_token_id=0,
                tie_word_embeddings=tied,
            )
            with safe_open(checkpoint / "model.safetensors", framework="pt") as tensors:
                shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
            _write_base(folder / "base.gguf", arch, shapes)
            made[arch, tied] = TinyModel(arch, checkpoint, folder / "base.gguf")
        return made[arch, tied]

    return make
