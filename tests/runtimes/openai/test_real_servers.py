"""Against llama-cpp-python's own server with the real SmolLM2-135M, faults in front of it."""

import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
from tiny import choose, opened

from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.openai.client import Prices
from arte_edge.runtimes.openai.engine import OpenAIEngine
from arte_edge.runtimes.prompt_render import render

pytestmark = pytest.mark.model

FAULTS = ("429", "500", "cut", "cut-body", "garbage", "truncated", "no-completion")


def forward_to(base):
    """Return an answerer that asks the real server at `base` (without ``/v1``)."""
    client = httpx.Client(timeout=300, trust_env=False)

    def answer(seen):
        method = "POST" if seen.body else "GET"
        real = client.request(method, base + seen.path, json=seen.body or None)
        return real.status_code, real.json()

    return answer


@pytest.fixture(scope="module")
def llama_server(smollm2):
    """llama-cpp-python's own server with SmolLM2 on a loopback port; its address without /v1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"model": smollm2.gguf, "model_alias": "tiny", "host": "127.0.0.1", "port": port, "n_ctx": 512}
    command = [sys.executable, "-m", "llama_cpp.server"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"NO_PROXY": "*"}
    )
    base = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        try:
            httpx.get(f"{base}/v1/models", trust_env=False)
            break
        except httpx.TransportError:
            assert process.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)
    yield base
    process.terminate()
    process.wait(timeout=20)


def test_a_real_server_behind_faults_gives_what_it_gives_without_them(llama_server, serve):
    cities = ["France", "Spain", "Italy", "Japan", "Egypt", "Peru", "Cuba", "Norway", "Greece", "Kenya"]
    asked = [Request(f"The capital of {country} is") for country in cities]
    sampling = Sampling(max_tokens=3)
    calm = opened(serve(forward_to(llama_server)), max_concurrency=1, timeout_s=300.0)
    right = calm.complete(asked, sampling)
    assert [row.error for row in right] == [""] * len(asked)
    assert "Paris" in right[0].text and calm.usage.retries == 0

    front = serve(forward_to(llama_server), faults=[[fault] for fault in FAULTS])
    stormy = opened(front, max_concurrency=3, timeout_s=300.0, prices=Prices(1.0, 1.0))
    rows = stormy.complete(asked, sampling)
    assert [row.text for row in rows] == [row.text for row in right]
    assert stormy.usage.retries == len(FAULTS)
    assert stormy.usage.requests == len(asked)
    # Broken-off answers were written, and so are paid for, but the server's counts never arrived.
    assert stormy.usage.completion_tokens >= sum(row.completion_tokens for row in rows)
    assert stormy.usage.cost_usd > 0


def test_a_real_server_that_hangs_is_asked_again(llama_server, serve):
    real, answers = forward_to(llama_server), {}

    def remembered(seen):
        # The first time it may take its time, so that the short timeout below meets the hang alone.
        key = (seen.path, str(seen.body))
        answers[key] = answers.get(key) or real(seen)
        return answers[key]

    asked, sampling = [Request("The capital of France is")], Sampling(max_tokens=2)
    right = opened(serve(remembered), timeout_s=300.0).complete(asked, sampling)
    engine = opened(serve(remembered, faults=[["hang"]]), timeout_s=1.5)
    assert engine.complete(asked, sampling) == right
    assert "Paris" in right[0].text and engine.usage.retries == 1


def test_a_real_server_scores_choices_like_the_model_itself(llama_server, smollm2):
    from arte_edge.runtimes.llamacpp.engine import LlamaCppEngine

    prefix, choices = "True or false?", [" True", " False"]
    suffixes = [" 2 + 2 = 4. Answer:", " London is in Spain. Answer:", " 5 is less than 3. Answer:"]
    remote = OpenAIEngine("tiny", f"{llama_server}/v1", mode="completions", timeout_s=300.0)
    local = LlamaCppEngine(smollm2.gguf, sha256=smollm2.sha256)
    served, own = choose(remote, prefix, suffixes, choices), choose(local, prefix, suffixes, choices)
    local.close()
    assert served == pytest.approx(own, abs=0.3)  # other batch shapes, a 4-bit model


def test_a_real_chat_endpoint_answers_and_counts_tokens(llama_server):
    engine = OpenAIEngine("tiny", f"{llama_server}/v1", timeout_s=300.0)
    assert engine.mode == "chat"
    prompt = render(engine, [{"role": "user", "content": "Say hello."}])
    (row,) = engine.complete([Request(prompt)], Sampling(max_tokens=8))
    assert row.text and not row.error and row.prompt_tokens > 5
    assert engine.count_tokens("Hello world") == 2
