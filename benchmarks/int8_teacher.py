"""A teacher in 8-bit integers (oneDNN) against llama.cpp on the same file: speed, and distance to its exact weights.

    python benchmarks/int8_teacher.py qwen2.5-coder-1.5b-instruct --threads 2

Speed: the same prompts in turns, sampled texts (as `tailor` writes them) and log-probabilities of given answers (as
the consistency filter asks for them), tokens a second of wall and of CPU time. Distance: Kullback-Leibler divergence
of next-token distributions from those of the file's own weights in float32, over two chats.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results") / "int8_teacher"
LABELS = (
    "PlayMusic",
    "GetWeather",
    "AddToPlaylist",
    "BookRestaurant",
    "RateBook",
    "SearchCreativeWork",
    "SearchScreeningEvent",
)
_EXAMPLES = "\n".join(f"{i}. request {i}: what a person could say to an assistant in the kitchen" for i in range(1, 6))
_BEGINNING = (
    "<|im_start|>system\nYou write requests to a voice assistant.<|im_end|>\n<|im_start|>user\nWrite requests with the "
    f"intent RateBook.<|im_end|>\n<|im_start|>assistant\n{_EXAMPLES}<|im_end|>\n"
)
_CHATS = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWrite short requests to a voice "
    "assistant whose intent is PlayMusic.<|im_end|>\n<|im_start|>assistant\n1. play some jazz from the nineties on "
    "spotify\n2. put on the new album by Taylor Swift\n3. I want to hear something relaxing before I go to sleep\n"
    "4. play my running playlist",
    "<|im_start|>user\nA train leaves at 3 pm and travels 60 miles per hour. How far has it gone by 5:30 pm? Think "
    "step by step.<|im_end|>\n<|im_start|>assistant\nThe train travels from 3 pm to 5:30 pm, which is 2.5 hours. At 60 "
    "miles per hour, the distance is 60 times 2.5, which equals 150 miles. <ans>150</ans>",
)


def speed(model: Any, kind: str, n: int) -> dict[str, Any]:
    """Return tokens a second of writing and of scoring."""
    from arte_edge.runtimes.completion import Request, Sampling
    from arte_edge.runtimes.loader import open_local

    wall = time.perf_counter()
    engine = open_local(model, kind=kind, parallel=32)  # type: ignore[arg-type]
    opened = time.perf_counter() - wall
    requests = [
        Request(
            f"{_BEGINNING}<|im_start|>user\nWrite requests with the intent {LABELS[i % 7]}. Make them "
            f"{'short' if i % 2 else 'long'}, variant {i}.<|im_end|>\n<|im_start|>assistant\n1. ",
            i,
        )
        for i in range(n)
    ]
    engine.complete(requests[:4], Sampling(max_tokens=4))
    wall, cpu = time.perf_counter(), time.process_time()
    done = engine.complete(requests, Sampling(temperature=1.0, top_p=0.95, max_tokens=100, seed=1))
    write_s, write_cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    new = sum(one.completion_tokens for one in done)
    read = sum(one.prompt_tokens - one.cached_tokens for one in done)
    prompts = [
        f"{_BEGINNING}<|im_start|>user\nWhich intent: rate book number {i}<|im_end|>\n<|im_start|>assistant\n<ans>"
        for i in range(2 * n)
    ]
    wall, cpu = time.perf_counter(), time.process_time()
    engine.choose_each(prompts, [[f"{label}</ans>" for label in LABELS]] * len(prompts))
    choose_s, choose_cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    engine.close()
    return {
        "kind": kind,
        "open_s": round(opened, 1),
        "tokens_written": new,
        "tokens_read": read,
        "write_s": round(write_s, 2),
        "tokens_per_s": round((new + read) / write_s, 1),
        "tokens_per_cpu_s": round((new + read) / write_cpu_s, 1),
        "scores_per_s": round(len(prompts) / choose_s, 2),
        "scores_per_cpu_s": round(len(prompts) / choose_cpu_s, 2),
    }


def distance(model: Any) -> list[dict[str, Any]]:
    """Return the divergence from float32 of bfloat16, of 8-bit integers and of llama.cpp."""
    import torch

    from arte_edge import transformers_load as hf
    from arte_edge.runtimes.loader import open_model
    from arte_edge.runtimes.transformers import onednn_int8

    checkpoint = model.checkpoint()
    tokenizer = hf.load_tokenizer(checkpoint)
    chats = [tokenizer(chat, add_special_tokens=False)["input_ids"] for chat in _CHATS]

    def of(network: Any) -> list[Any]:
        with torch.inference_mode():
            return [torch.log_softmax(network(torch.tensor([ids])).logits[0].float(), -1) for ids in chats]

    exact = of(hf.load_model(checkpoint, torch.float32).eval())
    network = hf.load_model(checkpoint, torch.bfloat16).eval()
    found = {"bfloat16": of(network)}
    onednn_int8.quantize(network, tokenizer(onednn_int8.SAMPLE_TEXT, add_special_tokens=False)["input_ids"])
    found["int8"] = of(network)
    del network
    runtime = open_model(model.gguf)
    found["llamacpp"] = [torch.log_softmax(torch.tensor(runtime.logits(ids)).float(), -1) for ids in chats]
    rows = []
    for name, values in found.items():
        pairs = list(zip(exact, values, strict=True))
        divergence = torch.cat([(one.exp() * (one - two)).sum(-1) for one, two in pairs])
        same = torch.cat([one.argmax(-1) == two.argmax(-1) for one, two in pairs])
        rows.append(
            {
                "kind": name,
                "n": len(divergence),
                "kl_nats": round(float(divergence.mean()), 5),
                "kl_median_nats": round(float(divergence.median()), 6),
                "kl_most_nats": round(float(divergence.max()), 4),
                "same_top_token": round(float(same.float().mean()), 4),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    if options.threads:
        os.environ["ARTE_EDGE_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from arte_edge.models.resolve import resolve
    from arte_edge.runtimes.autotune import machine_id

    model = resolve(options.model)
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = []
    for turn in range(options.turns):
        for kind in ("llamacpp", "int8"):
            rows.append({"turn": turn, **speed(model, kind, options.prompts)})
            print(json.dumps(rows[-1]), flush=True)
    rows += distance(model)
    common = {"model": options.model, "machine": machine_id(), "threads": options.threads}
    with (RESULTS / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(common | row) + "\n" for row in rows)
    for row in rows[2 * options.turns :]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
