"""The ways to write the answers of one draft's preference questions: one child process for each.

    python benchmarks/preference_peers.py SUBJECT WORK.json      # started by preference_scoring.py

Prints one JSON line: seconds of the timed part, tokens written, the texts. Loading the model and a
short warm-up are outside the clock.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from preference_ours import (
    WARM_UP,
    Texts,
    Work,
    ceiling,
    likelihood,
    ours,
    pipeline,
    pipeline_likelihood,
    transformers_likelihood,
    transformers_ours,
)


def _loaded(work: Work) -> tuple[Any, Any, list[list[int]], int]:
    """Return tokenizer, model, the prompts' tokens, and how many of them all prompts begin with."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(work["threads"])
    tokenizer = AutoTokenizer.from_pretrained(work["checkpoint"])
    dtype = torch.bfloat16 if work["dtype"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(work["checkpoint"], dtype=dtype).eval()
    rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in work["prompts"]]
    shared = next(i for i in range(min(map(len, rows))) if len({row[i] for row in rows}) > 1)
    return tokenizer, model, rows, shared


def transformers_generate(work: Work) -> Callable[[], Texts]:
    """Return `generate` on the whole batch after a prefix computed once; float32, padding after the prefix."""
    import copy

    import torch
    from transformers import DynamicCache

    tokenizer, model, rows, shared = _loaded(work)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(map(len, rows))
    ids = torch.tensor([r[:shared] + [pad] * (width - len(r)) + r[shared:] for r in rows])
    mask = torch.ones_like(ids)
    for i, row in enumerate(rows):
        mask[i, shared : shared + width - len(row)] = 0

    def write() -> Texts:
        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            model(ids[:1, :shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
            batch = copy.deepcopy(cache)
            batch.batch_repeat_interleave(len(rows))
            out = model.generate(
                ids,
                attention_mask=mask,
                past_key_values=batch,
                max_new_tokens=work["tokens"],
                do_sample=False,
                stop_strings=work["stop"],
                tokenizer=tokenizer,
                pad_token_id=pad,
            )
        new = [_until_end(row, tokenizer.eos_token_id, pad) for row in out[:, width:].tolist()]
        texts = [_cut(tokenizer.decode(row, skip_special_tokens=True), work["stop"]) for row in new]
        return texts, sum(map(len, new))

    return write


def transformers_lookup(work: Work) -> Callable[[], Texts]:
    """Return `generate` with prompt lookup decoding, which takes one prompt at a time, after the prefix's cache."""
    import copy

    import torch
    from transformers import DynamicCache

    tokenizer, model, rows, shared = _loaded(work)

    def write() -> Texts:
        texts, tokens = [], 0
        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            model(torch.tensor([rows[0][:shared]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            for row in rows:
                out = model.generate(
                    torch.tensor([row]),
                    past_key_values=copy.deepcopy(cache),
                    max_new_tokens=work["tokens"],
                    do_sample=False,
                    stop_strings=work["stop"],
                    tokenizer=tokenizer,
                    pad_token_id=tokenizer.eos_token_id,
                    prompt_lookup_num_tokens=4,
                )
                new = _until_end(out[0, len(row) :].tolist(), tokenizer.eos_token_id, tokenizer.eos_token_id)
                texts.append(_cut(tokenizer.decode(new, skip_special_tokens=True), work["stop"]))
                tokens += len(new)
        return texts, tokens

    return write


def _until_end(row: list[int], eos: int, pad: int) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in (eos, pad)), len(row))]


def _cut(text: str, stops: list[str]) -> str:
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def llama_cpp_python(work: Work) -> Callable[[], Texts]:
    """Return llama-cpp-python's `create_completion`, which keeps the cache of the last prompt's common prefix."""
    from llama_cpp import Llama

    model = Llama(work["gguf"], n_ctx=1024, n_threads=work["threads"], n_threads_batch=work["threads"], verbose=False)
    model.create_completion(WARM_UP, max_tokens=2)

    def one(prompt: str) -> tuple[str, int]:
        out: Any = model.create_completion(
            prompt, max_tokens=work["tokens"], temperature=0.0, stop=work["stop"], repeat_penalty=1.0
        )
        return out["choices"][0]["text"], out["usage"]["completion_tokens"]

    return lambda: _gathered([one(prompt) for prompt in work["prompts"]])


def llama_cpp_python_server(work: Work) -> Callable[[], Texts]:
    """Return llama-cpp-python's own server, which answers one request at a time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"model": work["gguf"], "port": port, "n_ctx": 1024, "n_threads": work["threads"]}
    options |= {"n_threads_batch": work["threads"], "cache": "true", "cache_type": "ram"}
    command = [sys.executable, "-m", "llama_cpp.server"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return _over_http(work, f"http://127.0.0.1:{port}", process, workers=1)


def llama_server(work: Work) -> Callable[[], Texts]:
    """Return llama-server, as xllamacpp carries it, with a slot for each of `slots` parallel requests."""
    import xllamacpp

    slots = work["slots"]
    params = xllamacpp.CommonParams()
    params.model.path = work["gguf"]
    params.n_parallel, params.n_ctx = slots, slots * 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = work["threads"]
    params.cache_prompt, params.cont_batching = True, True
    params.kv_unified = work["unified"]
    params.n_threads_http = slots + 2
    if work["lookup"]:
        kinds = xllamacpp.common_speculative_type
        params.speculative.types = [getattr(kinds, f"COMMON_SPECULATIVE_TYPE_NGRAM_{work['lookup']}")]
    server = xllamacpp.Server(params)
    return _over_http(work, server.listening_address, server, workers=slots)


def _over_http(work: Work, base: str, keep: Any, workers: int) -> Callable[[], Texts]:
    import httpx

    client = httpx.Client(base_url=base, timeout=600, trust_env=False, limits=httpx.Limits(max_connections=64))
    body = {"max_tokens": work["tokens"], "temperature": 0.0, "stop": work["stop"], "cache_prompt": True}
    body |= {"repeat_penalty": 1.0, "top_k": 0, "min_p": 0.0}

    def one(prompt: str) -> tuple[str, int]:
        answer = client.post("/v1/completions", json=body | {"prompt": prompt}).raise_for_status().json()
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

    deadline = time.monotonic() + 60
    while True:
        try:
            one(WARM_UP)
            break
        except httpx.HTTPError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)

    def write() -> Texts:
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(one, work["prompts"]))
        if isinstance(keep, subprocess.Popen):
            keep.kill()
        return _gathered(found)

    return write


def _gathered(found: list[tuple[str, int]]) -> Texts:
    """Join single answers; llama.cpp's own interfaces strip the stop string, so an open tag gets its end back."""
    texts = [text + "</ans>" if text.count("<ans>") > text.count("</ans>") else text for text, _ in found]
    return texts, sum(tokens for _, tokens in found)


SUBJECTS: dict[str, tuple[Callable[[Work], Callable[[], Texts]], dict[str, Any]]] = {
    "arte-edge": (ours, {}),
    "arte-edge pipeline": (pipeline, {}),
    "arte-edge likelihood": (likelihood, {}),
    "arte-edge pipeline likelihood": (pipeline_likelihood, {}),
    "arte-edge transformers fp32": (transformers_ours, {"dtype": "fp32"}),
    "arte-edge transformers bf16": (transformers_ours, {"dtype": "bf16"}),
    "arte-edge transformers fp32 likelihood": (transformers_likelihood, {"dtype": "fp32"}),
    "arte-edge transformers bf16 likelihood": (transformers_likelihood, {"dtype": "bf16"}),
    "ceiling": (ceiling, {}),
    "transformers fp32": (transformers_generate, {"dtype": "fp32"}),
    "transformers bf16": (transformers_generate, {"dtype": "bf16"}),
    "transformers bf16 prompt lookup": (transformers_lookup, {"dtype": "bf16"}),
    "llama-cpp-python": (llama_cpp_python, {}),
    "llama-cpp-python server": (llama_cpp_python_server, {}),
    **{
        f"llama-server {n} slots{' unified' * unified}": (llama_server, {"slots": n, "unified": unified, "lookup": ""})
        for unified in (False, True)
        for n in (8, 20, 40)
    },
    **{
        f"llama-server 8 slots {name}": (llama_server, {"slots": 8, "unified": False, "lookup": kind})
        for name, kind in (("ngram-simple", "SIMPLE"), ("ngram-mod", "MOD"))
    },
}


def main() -> None:
    subject, path = sys.argv[1:]
    opener, options = SUBJECTS[subject]
    write = opener(json.loads(Path(path).read_text("utf-8")) | options)
    began = time.perf_counter()
    texts, tokens = write()
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": round(seconds, 3), "tokens": tokens, "texts": texts}), flush=True)


if __name__ == "__main__":
    main()
