"""Against llama-cpp-python's own server with the real SmolLM2-135M, faults in front of it."""

import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
from tiny import opened

from arte_edge.runtimes.completion import Request, Sampling
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
    assert "Paris" in right[0].text

    front = serve(forward_to(llama_server), faults=[[fault] for fault in FAULTS])
    stormy = opened(front, max_concurrency=3, timeout_s=300.0)
    rows = stormy.complete(asked, sampling)
    assert [row.text for row in rows] == [row.text for row in right]
    assert len(front.posts) == len(asked) + len(FAULTS)


def test_a_real_chat_endpoint_answers(llama_server):
    engine = OpenAIEngine("tiny", f"{llama_server}/v1", timeout_s=300.0)
    assert (engine.mode, engine.continues) == ("chat", False), "it closes a turn that was begun for the model"
    prompt = render(engine, [{"role": "user", "content": "Say hello."}])
    (row,) = engine.complete([Request(prompt)], Sampling(max_tokens=8))
    assert row.text and not row.error and row.prompt_tokens > 5
