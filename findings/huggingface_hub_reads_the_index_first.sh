#!/usr/bin/env bash
# huggingface_hub 2.4.0 and transformers 5.23.0 read different weights from one folder that holds two sets of them.
#
# What: a folder with model.safetensors.index.json, its shards, and a newer model.safetensors beside them (what is left
# when a trained model is saved over a downloaded sharded one with safetensors' own save_file).
# huggingface_hub.load_torch_model takes the index and so the old weights; transformers' from_pretrained and
# accelerate's load_checkpoint_in_model take the single file and so the new ones. Nobody says that there were two.
# Seen: transformers: new; accelerate: new; huggingface_hub: old.
# Fails if one of them takes the other set, or refuses the folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'torch==2.13.0' 'transformers==5.23.0' 'accelerate==1.15.0' 'huggingface_hub==2.4.0' 'safetensors==0.8.0'
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import accelerate
import huggingface_hub
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)


def random_model(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


old, new = random_model(0), random_model(1)
old.save_pretrained("model", max_shard_size="20KB")
save_file({name: value.contiguous() for name, value in new.state_dict().items()}, "model/model.safetensors",
          metadata={"format": "pt"})


def which(model):
    first = model.model.embed_tokens.weight
    return [name for name, one in (("old", old), ("new", new)) if torch.equal(first, one.model.embed_tokens.weight)]


by_accelerate, by_hub = random_model(2), random_model(2)
accelerate.load_checkpoint_in_model(by_accelerate, "model")
huggingface_hub.load_torch_model(by_hub, "model")
found = {
    f"transformers {transformers.__version__}": which(AutoModelForCausalLM.from_pretrained("model")),
    f"accelerate {accelerate.__version__}": which(by_accelerate),
    f"huggingface_hub {huggingface_hub.__version__}": which(by_hub),
}
print(found)
assert list(found.values()) == [["new"], ["new"], ["old"]], found
PY
