"""A tiny student in every form an export starts from: a checkpoint, a run, a LoRA adapter."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from arte_edge.distill.config import RunConfig
from arte_edge.distill.prompts import STEPS, student_messages, tagged
from arte_edge.distill.settings import dump_toml
from arte_edge.store import write_jsonl
from arte_edge.tasks.loaders import load_task

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


def write_run(folder: Path, student: Path) -> Path:
    """Write what `arte-edge distill` leaves of a finished run whose tuned student is `student`."""
    import shutil

    from arte_edge.export.chat import read_chat

    task, chat = load_task(TASK), read_chat(student)
    config = RunConfig.model_validate({"name": "tiny", "task": {"ref": TASK}, "tune": {"method": "lora"}})
    folder.mkdir()
    header = f'# The run as resolved. task_sha256 = "{task.sha256}"\n'
    (folder / "run.toml").write_text(header + dump_toml(config), "utf-8")
    shutil.copytree(student, folder / "tune" / "student")
    rows = [
        {
            "prompt": chat.render(student_messages(task, seed.input), STEPS),
            "completion": f" {tagged(seed.target)}",
        }
        for seed in task.seed[:12]
    ]
    write_jsonl(folder / "tune" / "rows.jsonl", rows)
    write_jsonl(folder / "tailor" / "train.jsonl", [{"input": s.input} for s in task.seed[:12]])
    names = ["rows.jsonl", "student/model.safetensors"]
    sums = {name: hashlib.sha256((folder / "tune" / name).read_bytes()).hexdigest() for name in names}
    manifest = {"inputs": "", "files": {**sums, "student-F16.gguf": "0" * 64}, "summary": {}}
    (folder / "tune" / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of a random two-layer Llama with a chat template."""
    pytest.importorskip("transformers")
    return write_student(tmp_path_factory.mktemp("students") / "tiny-student")


@pytest.fixture(scope="session")
def tiny_run(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder whose tuned student is `tiny_student`."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_student)


@pytest.fixture(scope="session")
def tiny_adapter(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of `tiny_student` with random matrices, of the size of a short training."""
    peft: Any = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.copy_(0.08 * torch.randn_like(tensor))
    folder = tmp_path_factory.mktemp("adapters") / "tiny-adapter"
    model.save_pretrained(folder)
    return folder
