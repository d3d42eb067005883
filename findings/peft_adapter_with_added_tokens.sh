#!/usr/bin/env bash
# peft 0.21.2 and transformers 5.23.0: whether an adapter with added tokens loads depends on which class is asked.
#
# What: three tokens are added, the embedding is resized, a LoRA is trained on attention alone and saved beside its
# tokenizer, as tutorials do. The adapter's file then holds the whole resized embedding and head.
# AutoPeftModelForCausalLM.from_pretrained(ADAPTER) reads the tokenizer beside it, resizes the base and gives the same
# logits. PeftModel.from_pretrained(BASE, ADAPTER), AutoModelForCausalLM.from_pretrained(ADAPTER) and
# BASE.load_adapter(ADAPTER) raise a RuntimeError about sizes for the same folders.
# Seen: AutoPeftModelForCausalLM: equal; the other three: RuntimeError.
# Fails if one of them behaves differently.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'torch==2.13.0' 'transformers==5.23.0' 'peft==0.21.2' 'tokenizers==0.23.3'
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import peft
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = ["<unk>", "</s>", *(f"w{i}" for i in range(62))]
inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
torch.manual_seed(0)
LlamaForCausalLM(config).save_pretrained("base")

model = AutoModelForCausalLM.from_pretrained("base")
tokenizer.add_tokens(["[A]", "[B]", "[C]"], special_tokens=True)
model.resize_token_embeddings(len(tokenizer))
trained = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM"))
with torch.no_grad():
    for name, value in trained.named_parameters():
        if "lora_B" in name:
            value.normal_(std=0.1)
ids = torch.tensor([[3, 64, 65, 4]])
expected = trained.eval()(ids).logits
trained.save_pretrained("adapter")
tokenizer.save_pretrained("adapter")


def loaded_by_transformers():
    base = AutoModelForCausalLM.from_pretrained("base")
    base.load_adapter("adapter")
    return base


ways = {
    "AutoPeftModelForCausalLM": lambda: AutoPeftModelForCausalLM.from_pretrained("adapter"),
    "PeftModel": lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter"),
    "AutoModelForCausalLM": lambda: AutoModelForCausalLM.from_pretrained("adapter"),
    "load_adapter": loaded_by_transformers,
}
found = {}
for name, load in ways.items():
    try:
        found[name] = "equal" if torch.allclose(load().eval()(ids).logits, expected, atol=1e-5) else "other logits"
    except RuntimeError as error:
        found[name] = "RuntimeError" if "size" in str(error) else str(error)
print(f"peft {peft.__version__}, transformers {transformers.__version__}:", found)
assert found == {"AutoPeftModelForCausalLM": "equal"} | dict.fromkeys(list(ways)[1:], "RuntimeError"), found
PY
