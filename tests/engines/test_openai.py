from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from typing import Any

import httpx
import numpy as np
import pytest

from arte_edge.engines.base import Request, Sampling
from arte_edge.engines.openai import OpenAIEngine, parse_ref
from arte_edge.engines.render import render
from arte_edge.engines.retry import CallFailed, RetryPolicy
from arte_edge.engines.usage import Prices
from arte_edge.errors import EngineError, InputError

QUICK = RetryPolicy(attempts=5, base_s=0.01, longest_s=0.05)
TIMEOUT_S = 1.5  # below the hang of the test server, above anything it really does


def opened(front: Any, **settings: Any) -> OpenAIEngine:
    settings = {"mode": "completions", "retry": QUICK, "timeout_s": TIMEOUT_S} | settings
    return OpenAIEngine("tiny", front.url, **settings)


def requests(n: int) -> list[Request]:
    return [Request(f"question {i:03d}") for i in range(n)]


def test_a_reference_is_a_model_and_an_address():
    assert parse_ref("openai:org/m@2@https://host/v1") == ("org/m@2", "https://host/v1")
    for wrong in ("openai:model", "openai:@http://host", "gguf:m@http://host", "openai:m@host"):
        with pytest.raises(InputError, match="names no server"):
            parse_ref(wrong)


def test_rows_come_back_in_the_order_asked_and_go_out_in_the_order_of_prefixes(serve):
    front = serve()
    prompts = ["b two", "a two", "b one", "a one"]
    rows = opened(front, max_concurrency=1).complete([Request(p) for p in prompts], Sampling())
    assert [row.text for row in rows] == [f" after {p}" for p in prompts]
    assert [seen.body["prompt"] for seen in front.posts] == sorted(prompts)


def test_every_fault_is_survived_and_counted_and_no_row_moves(serve, every_fault):
    asked = requests(len(every_fault) + 3)
    right = opened(serve()).complete(asked, Sampling())
    front = serve(faults=[[fault] for fault in every_fault])
    engine = opened(front, max_concurrency=4)
    rows = engine.complete(asked, Sampling())
    assert [row.error for row in rows] == [""] * len(asked)
    assert rows == right
    assert engine.usage.requests == len(asked)
    assert engine.usage.retries == len(every_fault)
    assert len(front.posts) == len(asked) + len(every_fault)


def test_a_row_that_fails_to_the_end_is_an_error_row_and_its_neighbours_are_whole(serve):
    front = serve(faults=[[], ["500"] * QUICK.attempts, []])
    rows = opened(front, max_concurrency=1).complete(requests(4), Sampling())
    assert [row.finish for row in rows] == ["length", "error", "length", "length"]
    assert "failed 5 times" in rows[1].error and "500" in rows[1].error
    assert len(front.posts) == 4 + QUICK.attempts - 1


def test_retry_after_is_waited_for_by_every_thread(serve):
    front = serve(faults=[["429"]], retry_after="0.6")
    opened(front, max_concurrency=2).complete(requests(12), Sampling())
    refused, again = [seen.at_s for seen in front.posts if seen.body["prompt"] == "question 000"]
    assert again - refused >= 0.6
    # One may have been on its way when the other thread was told to wait.
    assert sum(refused + 0.1 < seen.at_s < refused + 0.6 for seen in front.posts) <= 1


def test_the_token_limit_charges_what_was_used_and_not_what_was_expected(serve):
    engine = opened(serve(), max_concurrency=1, tokens_per_minute=1000)
    engine._server._limiter._sleep = lambda seconds: pytest.fail(f"waited {seconds} s")
    rows = engine.complete(requests(9), Sampling(max_tokens=600))
    assert [row.finish for row in rows] == ["length"] * 9


def test_a_retry_after_beyond_patience_ends_the_call(serve):
    front = serve(faults=[["429"]], retry_after="3600")
    (row,) = opened(front).complete(requests(1), Sampling())
    assert row.finish == "error" and "3600 s" in row.error
    assert len(front.posts) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_row_fails_at_once_in_the_servers_words(serve, tiny_model, status):
    def answer(seen):
        if seen.body.get("prompt") == "question 001":
            return status, {"error": {"message": "the prompt is too long"}}
        return tiny_model()(seen)

    front = serve(answer)
    engine = opened(front)
    rows = engine.complete(requests(3), Sampling())
    assert [row.finish for row in rows] == ["length", "error", "length"]
    assert f"answered {status}: the prompt is too long" in rows[1].error
    assert engine.usage.retries == 0


def test_a_server_that_stays_dead_is_not_asked_a_thousand_times(serve):
    front = serve(faults=[["500"] * 2] * 200)
    engine = opened(front, max_concurrency=2, retry=RetryPolicy(attempts=2, base_s=0.0))
    rows = engine.complete(requests(200), Sampling())
    assert [row.finish for row in rows] == ["error"] * 200
    assert "not sent" in rows[-1].error
    assert len(front.posts) < 30


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


def test_a_key_that_is_refused_later_is_raised_only_if_no_row_was_answered(serve, tiny_model):
    def revoked_after(n):
        def answer(seen):
            if seen.path != "/v1/models" and len(front.posts) > n:
                return 403, {"detail": "revoked"}
            return tiny_model()(seen)

        return answer

    front = serve(revoked_after(2))
    rows = opened(front, max_concurrency=1).complete(requests(9), Sampling())
    assert [row.finish for row in rows] == ["length"] * 2 + ["error"] * 7
    assert len(front.posts) == 3
    front = serve(revoked_after(0))
    with pytest.raises(CallFailed, match="403: revoked"):
        opened(front).complete(requests(9), Sampling())


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


def test_a_spent_quota_is_not_retried(serve, tiny_model):
    def answer(seen):
        if seen.path == "/v1/models":
            return tiny_model()(seen)
        return 429, {"error": {"code": "insufficient_quota", "message": "You have spent it all"}}

    front = serve(answer)
    with pytest.raises(CallFailed, match="spent it all"):
        opened(front).complete(requests(3), Sampling())
    assert len(front.posts) <= 3


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


def test_tokens_and_cost_are_the_servers_figures_and_the_users_prices(serve):
    engine = opened(serve(), prices=Prices(prompt_usd_per_million=2.0, completion_usd_per_million=10.0))
    rows = engine.complete(requests(5), Sampling())
    prompt_tokens = sum(row.prompt_tokens for row in rows)
    assert prompt_tokens > 0
    assert engine.usage.prompt_tokens == prompt_tokens
    assert engine.usage.completion_tokens == 20
    assert engine.usage.cost_usd == pytest.approx((prompt_tokens * 2 + 20 * 10) / 1e6)


def test_no_more_calls_are_under_way_than_allowed(serve, tiny_model):
    under_way, most = [0], [0]

    def answer(seen):
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        time.sleep(0.03)
        under_way[0] -= 1
        return tiny_model()(seen)

    opened(serve(answer), max_concurrency=3).complete(requests(12), Sampling())
    assert most[0] == 3


def test_draws_differ_between_samples_and_rows_but_not_between_runs(serve):
    def seeds():
        front = serve()
        asked = [Request("a", 0), Request("a", 1), Request("b", 0)]
        opened(front, max_concurrency=1).complete(asked, Sampling(temperature=1.0))
        return [seen.body["seed"] for seen in front.posts]

    assert seeds() == seeds()
    assert len(set(seeds())) == 3


def test_chat_sends_the_rendered_messages_and_drops_a_repeated_prefill(serve):
    front = serve()
    engine = opened(front, mode="chat")
    prompt = render(engine, [{"role": "user", "content": "Name a city"}], "reply to")
    (row,) = engine.complete([Request(prompt)], Sampling())
    assert front.posts[0].path == "/v1/chat/completions"
    assert front.posts[0].body["messages"] == [
        {"role": "user", "content": "Name a city"},
        {"role": "assistant", "content": "reply to"},
    ]
    assert row.text == " reply to"
    with pytest.raises(InputError, match="not rendered for one"):
        engine.complete([Request("raw text")], Sampling())


@pytest.mark.parametrize(
    ("routes", "mode"),
    [(("completions", "chat/completions"), "chat"), (("completions",), "completions")],
)
def test_the_mode_is_found_out(serve, tiny_model, routes, mode):
    assert opened(serve(tiny_model(routes=routes)), mode="auto").mode == mode


def test_a_server_of_neither_mode_is_refused_with_both_reasons(serve, tiny_model):
    with pytest.raises(CallFailed, match=r"(?s)neither chat nor completions.*chat: .*completions: "):
        opened(serve(tiny_model(routes=())), mode="auto")


def test_a_grammar_goes_only_to_servers_that_take_one(serve, tiny_model):
    sampling = Sampling(grammar='root ::= "yes"')
    with pytest.raises(InputError, match="takes no grammar"):
        opened(serve()).complete(requests(1), sampling)
    front = serve(tiny_model(owned_by="llamacpp"))
    engine = opened(front)
    engine.complete(requests(1), sampling)
    assert engine.supports_grammar and front.posts[0].body["grammar"] == sampling.grammar


def expected_scores(model, contexts, choices, start, end):
    """What `choose` must give: the sum over the choice's tokens `start:end` after the context."""
    scores = []
    for context in contexts:
        row = []
        for choice in choices:
            before, row_sum = model.tokens(context), 0.0
            for i, token in enumerate(model.tokens(choice)[:end]):
                row_sum += model.log_probability(before, token) if i >= start else 0.0
                before = [*before, token]
            row.append(row_sum)
        scores.append(row)
    return scores


@pytest.mark.parametrize(
    ("echo", "ends_at_once"), [("right", False), ("shifted", False), ("off", False), ("off", True)]
)
@pytest.mark.parametrize(
    ("choices", "start", "end"),
    [((" True", " False"), 0, 1), (("(A)", "(B)", "(C)"), 1, 2), (("(A)",), 0, 3)],
)
def test_choices_are_scored_right_however_the_server_echoes(
    serve, tiny_model, echo, ends_at_once, choices, start, end
):
    model = tiny_model(echo=echo, ends_at_once=ends_at_once)
    suffixes = ["yes one.", "no two.", "no."]
    engine = opened(serve(model))
    scores = engine.choose("one two. ", suffixes, choices)
    contexts = ["one two. " + suffix for suffix in suffixes]
    assert scores == pytest.approx(np.array(expected_scores(model, contexts, choices, start, end)))


def test_a_choice_outside_the_candidates_counts_as_the_least_of_them(serve, tiny_model):
    model = tiny_model(echo="off")
    scores = opened(serve(model)).choose("one", [""], ["maybe", " True"])
    values = [model.log_probability(model.tokens("one"), word) for word in model.vocabulary]
    assert scores[0, 0] == pytest.approx(min(values))


def test_scoring_is_refused_clearly_where_it_cannot_be_done(serve, tiny_model):
    with pytest.raises(EngineError, match="chat mode"):
        opened(serve(), mode="chat").choose("a", ["b"], ["c", "d"])
    with pytest.raises(EngineError, match="no log-probabilities"):
        opened(serve(tiny_model(logprobs=False))).choose("a", ["b"], ["c", "d"])


def test_tokens_are_counted_by_the_server_if_it_can_else_estimated_from_what_was_seen(serve, tiny_model):
    model = tiny_model(owned_by="vllm", routes=("completions",))

    def answer(seen):
        return (200, {"count": 42}) if seen.path == "/tokenize" else model(seen)

    assert opened(serve(answer)).count_tokens("anything") == 42
    engine = opened(serve(model))
    assert engine.count_tokens("x" * 400) == 100
    engine.complete([Request("yes" * 1000)], Sampling())  # three bytes a token
    assert engine.count_tokens("x" * 300) == pytest.approx(100, abs=2)


# --- against a real server -------------------------------------------------------------------------


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


@pytest.mark.model
def test_a_real_server_behind_faults_gives_what_it_gives_without_them(
    llama_server, serve, forward_to, every_fault
):
    cities = ["France", "Spain", "Italy", "Japan", "Egypt", "Peru", "Cuba", "Norway", "Greece", "Kenya"]
    asked = [Request(f"The capital of {country} is") for country in cities]
    sampling = Sampling(max_tokens=3)
    calm = opened(serve(forward_to(llama_server)), max_concurrency=1, timeout_s=300.0)
    right = calm.complete(asked, sampling)
    assert [row.error for row in right] == [""] * len(asked)
    assert "Paris" in right[0].text and calm.usage.retries == 0

    quick_faults = [fault for fault in every_fault if fault != "hang"]
    front = serve(forward_to(llama_server), faults=[[fault] for fault in quick_faults])
    stormy = opened(front, max_concurrency=3, timeout_s=300.0, prices=Prices(1.0, 1.0))
    rows = stormy.complete(asked, sampling)
    assert [row.text for row in rows] == [row.text for row in right]
    assert stormy.usage.retries == len(quick_faults)
    assert stormy.usage.requests == len(asked)
    # Broken-off answers were written, and so are paid for, but the server's counts never arrived.
    assert stormy.usage.completion_tokens >= sum(row.completion_tokens for row in rows)
    assert stormy.usage.cost_usd > 0


@pytest.mark.model
def test_a_real_server_that_hangs_is_asked_again(llama_server, serve, forward_to):
    front = serve(forward_to(llama_server), faults=[["hang"]], hang_s=12.0)
    engine = opened(front, timeout_s=10.0)
    (row,) = engine.complete([Request("The capital of France is")], Sampling(max_tokens=2))
    assert "Paris" in row.text and engine.usage.retries == 1


@pytest.mark.model
def test_a_real_server_scores_choices_like_the_model_itself(llama_server, smollm2):
    from arte_edge.engines.llamacpp import LlamaCppEngine

    prefix, choices = "True or false?", [" True", " False"]
    suffixes = [" 2 + 2 = 4. Answer:", " London is in Spain. Answer:", " 5 is less than 3. Answer:"]
    remote = OpenAIEngine("tiny", f"{llama_server}/v1", mode="completions", timeout_s=60.0)
    local = LlamaCppEngine(smollm2.gguf, sha256=smollm2.sha256)
    served, own = remote.choose(prefix, suffixes, choices), local.choose(prefix, suffixes, choices)
    local.close()
    assert served == pytest.approx(own, abs=0.3)  # other batch shapes, a 4-bit model


@pytest.mark.model
def test_a_real_chat_endpoint_answers_and_counts_tokens(llama_server):
    engine = OpenAIEngine("tiny", f"{llama_server}/v1", timeout_s=60.0)
    assert engine.mode == "chat"
    prompt = render(engine, [{"role": "user", "content": "Say hello."}])
    (row,) = engine.complete([Request(prompt)], Sampling(max_tokens=8))
    assert row.text and not row.error and row.prompt_tokens > 5
    assert engine.count_tokens("Hello world") == 2
