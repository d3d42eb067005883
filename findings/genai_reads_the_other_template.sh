#!/usr/bin/env bash
# onnxruntime-genai 0.18.0 and transformers 5.23.0 read different chat templates from one folder that holds two of them.
#
# What: a folder has both chat_template.jinja and a chat_template in tokenizer_config.json once the file is added to a
# model that was saved with the key. transformers takes the file, genai the key, and neither says that there were two.
# A key that is a list of named templates, as transformers wrote it for models with several, genai does not load at all,
# with or without the file; transformers takes the one that is named default.
# Seen: both: transformers 'file', genai 'key'; a list: transformers 'key', genai
# RuntimeError: [json.exception.type_error.302] type must be string, but is array.
# Fails if one of them behaves differently.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'onnxruntime-genai==0.18.0' 'onnxruntime==1.32.0' 'onnx==1.23.2' \
  'transformers==5.23.0' 'tokenizers==0.23.3' 'jinja2==3.1.6'
cd "$work"
HF_HUB_OFFLINE=1 ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PY'
import json
from pathlib import Path

import onnx
import onnxruntime_genai as genai
import transformers
from onnx import TensorProto, helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# A tokenizer opens with a model only: this one calculates nothing, its logits are the ids.
ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", 1])
axis = helper.make_tensor("axis", TensorProto.INT64, [1], [2])
nodes = [helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
         helper.make_node("Unsqueeze", ["numbers", "axis"], ["logits"])]
graph = helper.make_model(helper.make_graph(nodes, "ids", [ids], [logits], [axis]),
                          opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
onnx.checker.check_model(graph, full_check=True)
decoder = {"filename": "model.onnx", "head_size": 1, "hidden_size": 1, "num_attention_heads": 1, "num_hidden_layers": 0,
           "num_key_value_heads": 1, "inputs": {"input_ids": "input_ids"}, "outputs": {"logits": "logits"}}
config = {"model": {"type": "llama", "context_length": 64, "vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1,
                    "pad_token_id": 1, "decoder": decoder}, "search": {"max_length": 64}}
vocabulary = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
inner = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
messages = [{"role": "user", "content": "Hello"}]


def rendered(file, key):
    """Return what transformers and genai make of a conversation with the templates that a folder holds."""
    folder = Path("model")
    tokenizer.save_pretrained(folder)
    onnx.save(graph, folder / "model.onnx")
    (folder / "genai_config.json").write_text(json.dumps(config))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ({"chat_template": key} if key else {})))
    template = folder / "chat_template.jinja"
    template.write_text(file) if file else template.unlink(missing_ok=True)
    model = genai.Model(str(folder))
    try:
        by_genai = genai.Tokenizer(model).apply_chat_template(json.dumps(messages))
    except RuntimeError as error:
        by_genai = f"RuntimeError: {error}"
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False), by_genai


file, key = ("%s: {{ messages[0]['content'] }}" % word for word in ("file", "key"))
named = [{"name": "default", "template": key}, {"name": "tool_use", "template": "tools"}]
found = {
    "file": rendered(file, None),
    "key": rendered(None, key),
    "both": rendered(file, key),
    "list": rendered(None, named),
    "file and list": rendered(file, named),
}
print(f"transformers {transformers.__version__}, onnxruntime-genai {genai.__version__}:", found)
refused = "RuntimeError: [json.exception.type_error.302] type must be string, but is array"
assert found == {
    "file": ("file: Hello", "file: Hello"),
    "key": ("key: Hello", "key: Hello"),
    "both": ("file: Hello", "key: Hello"),
    "list": ("key: Hello", refused),
    "file and list": ("file: Hello", refused),
}, found
PY
