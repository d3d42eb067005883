"""The one place where tiny models are made: random weights, a few layers, tokenizers trained in code, GGUF files;
and the records of what is measured of them: rows, accuracies, a student.json.

Everything is the same at every call with the same arguments. Tests say `import tiny`: pytest has `tests/` on its path.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arte_edge.models.artifact import checksums_of
from arte_edge.results.accuracy import PairedAccuracy
from arte_edge.results.rows import DeviceFacts, QualityRow, SpeedRow
from arte_edge.results.student_json import Artifact, Fidelity, FidelityMetrics, Lineage, Student, StudentFile
from arte_edge.tasks.loaders import load_task

# What most signatures of tests name.
Make = Callable[..., Any]
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
Folders = pytest.TempPathFactory
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


def edited(checkpoint: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy a checkpoint with its tensors changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def edited_json(checkpoint: Path, out: Path, name: str = "config.json", **changes: Any) -> Path:
    """Copy a checkpoint with keys of one of its JSON files changed; None removes one."""
    shutil.copytree(checkpoint, out)
    change_json(out / name, lambda content: content.update(changes))
    return out


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Let `change` edit the object in a JSON file; None at its top removes a key."""
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), "utf-8")


def write_safetensors(folder: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], **config: Any) -> Path:
    """Write a checkpoint of zeros: name -> (type, shape)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(at))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hf_logits(checkpoint: Path, ids: Sequence[int], adapter: Path | None = None) -> np.ndarray:
    """Return transformers' logits ``[n_token, n_vocab]`` of a checkpoint, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return np.asarray(model.eval()(torch.tensor([list(ids)])).logits[0])


def save_adapter(base: Path, folder: Path, ids: Sequence[int], *, more_tokens: int = 0, **lora: Any) -> np.ndarray:
    """Write a LoRA adapter with random values to `folder`; return the logits of the model that "was trained".

    `more_tokens` are added to tokenizer and embedding first, and the tokenizer is saved too.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if more_tokens:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens([f"<new {i}>" for i in range(more_tokens)], special_tokens=True)
        model.resize_token_embeddings(len(tokenizer))
        tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    known = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    live = get_peft_model(model, LoraConfig(**known | lora)).eval()
    with torch.no_grad():
        for tensor in live.parameters():
            if tensor.requires_grad:
                tensor.add_(0.08 * torch.randn_like(tensor))
        live.save_pretrained(folder)
        return np.asarray(live(torch.tensor([list(ids)])).logits[0])


def cli(capsys: Capture, *words: str) -> tuple[int, str, str]:
    """Run a command here; return its exit code and what it printed to stdout and to stderr."""
    from arte_edge.cli.main import main

    code, printed = main(list(words)), capsys.readouterr()
    return code, printed.out, printed.err


def cli_json(capsys: Capture, *words: str) -> Any:
    """Run a command with ``--json``, which must succeed; return what it printed."""
    code, out, _ = cli(capsys, *words, "--json")
    assert code == 0
    return json.loads(out)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_jsons(folder: Path, **files: Any) -> Path:
    """Write files to `folder`: ``write_jsons(folder, config={…})``."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    return folder


def relative_error(got: Any, expected: Any) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def gguf_writer(path: Path, arch: str = "llama", **values: Any) -> Any:
    """Return GGML's own writer with metadata set: ``context_length=128``, ``head_count=4``, ``name="Tiny"``, ..."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    return writer


def llama_shapes(
    n_vocab: int, width: int, width_ff: int, n_layer: int = 2, kv: int = 0, tied: bool = True
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a Llama's tensors under GGUF's names."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (n_vocab, width), "output_norm.weight": (width,)}
    rows = {"attn_q": width, "attn_k": kv or width, "attn_v": kv or width, "attn_output": width}
    for i in range(n_layer):
        for part, n in (rows | {"ffn_gate": width_ff, "ffn_up": width_ff}).items():
            found[f"blk.{i}.{part}.weight"] = (n, width)
        found[f"blk.{i}.ffn_down.weight"] = (width, width_ff)
        found |= {f"blk.{i}.{part}_norm.weight": (width,) for part in ("attn", "ffn")}
    return found | ({} if tied else {"output.weight": (n_vocab, width)})


def add_tensors(writer: Any, shapes: Mapping[str, Sequence[int]], *, seed: int = 3, scale: float = 0.3) -> Path:
    """Add random matrices in F16 and norms about one in F32, and finish the file."""
    random = np.random.default_rng(seed)
    for name, shape in shapes.items():
        values = random.normal(0, scale, shape) + (len(shape) == 1)
        writer.add_tensor(name, values.astype(np.float32 if len(shape) == 1 else np.float16))
    finish(writer)
    return Path(writer.path)


def write_gguf(path: Path, characters: Sequence[str] = tuple(map(chr, range(33, 123)))) -> Path:
    """Write a random two-layer Llama in F16 with single characters for tokens: it runs in no time."""
    n_vocab = len(characters) + 6
    tokens = [*characters, *(f"<{i}>" for i in range(len(characters), n_vocab))]
    sizes = {"vocab_size": n_vocab, "context_length": 4096, "embedding_length": 64, "block_count": 2}
    heads = {"feed_forward_length": 96, "head_count": 4, "rope_dimension_count": 16, "file_type": 1}
    ids = {"bos_token_id": n_vocab - 2, "eos_token_id": n_vocab - 1, "add_bos_token": True}
    words = {"token_list": tokens, "token_types": [1] * len(characters) + [3] * 6, "token_merges": ["! !"]}
    kind = {"tokenizer_model": "gpt2", "tokenizer_pre": "gpt-2"}
    writer = gguf_writer(path, **sizes, **heads, **ids, **words, **kind)
    return add_tensors(writer, llama_shapes(n_vocab, 64, 96, tied=False), seed=5)


def finish(writer: Any) -> None:
    """Write what a GGUF writer holds, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_gguf(path: Path, *, arch: str = "llama", rows: int = 8, **pairs: Any) -> Path:
    """Write a GGUF of one Q8_0 matrix and a norm, with metadata named as in ``general__type="adapter"``."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(128)
    writer.add_token_list(["a", "bc", "def"])
    writer.add_chat_template("{{ messages }}")
    for key, value in pairs.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_string
        add(key.replace("__", "."), value)
    weights = np.arange(rows * 32, dtype=np.float32).reshape(rows, 32)
    if rows:
        q8 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor("blk.0.attn_q.weight", gguf.quantize(weights, q8), raw_dtype=q8)
        writer.add_tensor("output_norm.weight", weights[0])
    finish(writer)
    return path


@functools.cache
def tensor_sha256() -> str:
    """Return the tensor hash of what `make_gguf` writes by default, which the rows below are about."""
    with tempfile.TemporaryDirectory() as folder:
        return checksums_of(make_gguf(Path(folder) / "x.gguf")).tensor_sha256


def facts(**more: Any) -> DeviceFacts:
    """Return what is known of a Raspberry Pi 5."""
    known = {"profile": "raspberry-pi-5", "fingerprint": "0123456789abcdef", "cpu": "Cortex-A76"}
    return DeviceFacts(**known | {"arch": "aarch64", "cores": 4, "memory_bytes": 8 << 30} | more)


def machine(root: Path, files: Mapping[str, str]) -> Path:
    """Write files of a made-up machine below `root`: ``{"proc/meminfo": "MemTotal: …"}``."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root


def speed_row(test: str = "tg128", rate: float = 20.0, **more: Any) -> SpeedRow:
    """Make a row: ``speed_row("tg128", 20.5, throttled=True)``."""
    shape, _, depth = test.partition("@d")
    n_prompt, n_gen = (int(shape[2:]) if shape[:2] == kind else 0 for kind in ("pp", "tg"))
    rates = {"samples_ts": (rate, rate), "ttft_ms": 900.0} if n_prompt else {"samples_ts": (rate, rate)}
    model = {"model_filename": "tiny-Q8_0.gguf", "model_size": 10, "tensor_sha256": tensor_sha256()}
    return SpeedRow(
        **{"test": test, "n_prompt": n_prompt, "n_gen": n_gen, "n_depth": int(depth or 0), "median_ts": rate}
        | {"format": "gguf", "runtime": "llama_cpp 0.3.36", "n_threads": 4, "throttled": False}
        | {"itl_p50_ms": 1000 / rate if n_gen else None, "peak_rss_bytes": 300_000_000}
        | {"test_time": "2026-11-24T10:00:00Z", "temperature_c_max": 61.0, "device": facts()}
        | rates
        | model
        | more
    )


def quality_row(right: int = 80, **more: Any) -> QualityRow:
    """Make a row of 100 answers: ``quality_row(80, partial=True)``."""
    model = {"model_filename": "tiny-Q8_0.gguf", "tensor_sha256": tensor_sha256(), "format": "gguf"}
    found = {"right": right, "low": max(right / 100 - 0.08, 0), "high": min(right / 100 + 0.08, 1)}
    return QualityRow(
        **{"task": "home_intents", "split": "test", "n": 100, "device": facts()}
        | {"runtime": "llama_cpp 0.3.36", "n_threads": 4, "test_time": "2026-11-24T10:00:00Z"}
        | found
        | model
        | more
    )


def accuracy(right: int, n: int = 40, **more: Any) -> PairedAccuracy:
    share = right / n
    found = {"split": "validation", "n": n, "right": right, "accuracy": share, "low": max(share - 0.1, 0)}
    return PairedAccuracy(**found | {"high": min(share + 0.1, 1)} | more)


def metrics(**more: Any) -> FidelityMetrics:
    known = {"n_prompts": 24, "n_tokens": 965, "kl_mean": 0.0058, "kl_p99": 0.03, "kl_max": 0.05, "top1": 0.96}
    ratio = {"perplexity_reference": 16.2, "perplexity_ratio": 1.001, "perplexity_ratio_error": 0.01}
    return FidelityMetrics(**known | ratio | more)


def artifact(quantization: str = "Q8_0", name: str = "m", **more: Any) -> Artifact:
    """Make the entry of an accepted file; its hashes are its own."""
    file = f"{name}-{quantization}.gguf"
    known = {"file": file, "format": "gguf", "quantization": quantization, "status": "ok", "size_bytes": 10}
    hashes = dict.fromkeys(("sha256", "tensor_sha256"), hashlib.sha256(file.encode()).hexdigest())
    return Artifact(**known | hashes | {"bits_per_weight": 5.5, "fidelity": Fidelity(passed=True)} | more)


def student_file(*artifacts: Artifact, name: str = "m", **more: Any) -> StudentFile:
    student = Student(name=name, sha256="5a" * 32, architecture="llama", dtype="F16", parameter_count=256)
    known = {"arte_edge_version": "0.1.0", "student": student, "lineage": Lineage(source="run")}
    return StudentFile(**known | {"artifacts": artifacts} | more)


def choose(engine: Any, prefix: str, suffixes: Sequence[str], choices: Sequence[str]) -> np.ndarray:
    """Return log-probabilities [n_suffix, n_choice] of the same choices after several prompts."""
    rows = engine.choose_each([prefix + suffix for suffix in suffixes], [choices] * len(suffixes))
    return np.array(rows).reshape(-1, len(choices))


def opened(front: Any, **settings: Any) -> Any:
    """Open the engine of a test server, with short waits between attempts."""
    from arte_edge.runtimes.openai.client import RetryPolicy
    from arte_edge.runtimes.openai.engine import OpenAIEngine

    known = {"mode": "completions", "retry": RetryPolicy(attempts=5, base_s=0.01, longest_s=0.05)}
    return OpenAIEngine("tiny", front.url, **known | settings)


def model_shape(**sizes: Any) -> Any:
    """Return the shape of SmolLM2-135M in Q8_0."""
    from arte_edge.device.model_size import ModelSize

    names = {"name": "a.gguf", "format": "gguf", "architecture": "llama", "quantization": "Q8_0"}
    layers = {"n_layer": 30, "n_kv_head": 3, "head_dim": 64, "n_embd": 576, "n_ff": 1536, "kv_values": 11520}
    weights = dict.fromkeys(("weight_bytes", "token_bytes"), 143_025_408) | {"n_params": 134_515_008}
    words = {"n_vocab": 49152, "n_ctx_train": 8192, "token_bytes_by_type": {"Q8_0": 143_025_408}}
    return ModelSize(**names | layers | weights | words | sizes)
