import json
import logging
import socket
import time

import pytest

from arte_edge.errors import InputError
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.loader import ServerLimits, open_engine
from arte_edge.runtimes.openai.client import CallFailed, RetryPolicy
from arte_edge.runtimes.openai.engine import OpenAIEngine, parse_ref


def opened(front, **settings):
    settings = {"mode": "completions", "retry": RetryPolicy(base_s=0.01, longest_s=0.05)} | settings
    return OpenAIEngine("tiny", front.url, **settings)


def requests(n):
    return [Request(f"question {i:03d}") for i in range(n)]


def test_a_reference_is_a_model_and_an_address():
    assert parse_ref("openai:org/m@2@https://host/v1") == ("org/m@2", "https://host/v1")
    for wrong in ("openai:model", "openai:@http://host", "gguf:m@http://host", "openai:m@host"):
        with pytest.raises(InputError, match="names no server"):
            parse_ref(wrong)


def test_an_opened_server_is_treated_as_its_limits_say(serve, tiny_model):
    under_way, most = [0], [0]

    def answer(seen):
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        time.sleep(0.03)
        under_way[0] -= 1
        return tiny_model()(seen)

    limits = ServerLimits(requests_per_minute=600.0, tokens_per_minute=1e6, timeout_s=7.0)
    engine = open_engine(f"openai:tiny@{serve(answer).url}", parallel=2, limits=limits)
    prompt = json.dumps({"messages": [{"role": "user", "content": "question"}]})
    engine.complete([Request(prompt, i) for i in range(8)], Sampling(max_tokens=4))
    assert most[0] == 2
    assert isinstance(engine, OpenAIEngine) and engine._server._client.timeout.read == 7.0


def test_a_wrong_key_is_raised_at_once_with_the_variable_and_without_the_key(serve, monkeypatch, caplog):
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("ARTE_EDGE_API_KEY", key)
    caplog.set_level(logging.DEBUG)

    def answer(seen):
        return 401, {"error": {"message": f"Incorrect API key provided: {key}"}}

    front = serve(answer)
    with pytest.raises(CallFailed) as caught:
        opened(front)
    assert front.seen[0].headers["authorization"] == f"Bearer {key}"
    assert "401: Incorrect API key provided: ***" in str(caught.value)
    assert "it was read from ARTE_EDGE_API_KEY" in str(caught.value)
    assert len(front.seen) == 1
    chain = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert key not in "".join(map(repr, chain)) + caplog.text


def test_nothing_shows_the_key(serve, monkeypatch, caplog):
    key = "sk-quiet"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    caplog.set_level(logging.DEBUG)
    engine = opened(serve(faults=[["cut"], ["garbage"] * 9]))
    rows = engine.complete(requests(2), Sampling())
    shown = [repr(engine), repr(engine._server), repr(engine._server._client), repr(rows), caplog.text]
    assert key not in "".join(shown)


def test_our_own_variable_comes_before_openais(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    front = serve()
    opened(front)
    monkeypatch.setenv("ARTE_EDGE_API_KEY", "ours")
    opened(front)
    assert [seen.headers["authorization"] for seen in front.seen] == ["Bearer theirs", "Bearer ours"]


def test_an_unknown_model_names_the_nearest(serve, tiny_model):
    front = serve(tiny_model(models=("teacher-70b", "tinny")))
    with pytest.raises(InputError, match=r"serves no model named 'tiny'\nDid you mean 'tinny'"):
        opened(front)


def test_a_server_without_a_model_list_is_taken_at_its_word(serve, tiny_model):
    def answer(seen):
        return (404, {}) if seen.path == "/v1/models" else tiny_model()(seen)

    assert opened(serve(answer)).complete(requests(1), Sampling())[0].finish == "length"


def test_a_server_that_is_not_there_says_where_it_was_looked_for():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(CallFailed, match=f"{url}/models failed 2 times.*ConnectError"):
        OpenAIEngine("tiny", url, retry=RetryPolicy(attempts=2, base_s=0.0))


@pytest.mark.parametrize(
    ("routes", "mode"), [(("completions", "chat/completions"), "chat"), (("completions",), "completions")]
)
def test_the_mode_is_found_out(serve, tiny_model, routes, mode):
    assert opened(serve(tiny_model(routes=routes)), mode="auto").mode == mode


def test_a_server_of_neither_mode_is_refused_with_both_reasons(serve, tiny_model):
    with pytest.raises(CallFailed, match=r"(?s)neither chat nor completions.*chat: .*completions: "):
        opened(serve(tiny_model(routes=())), mode="auto")
