"""The engine of an OpenAI-compatible server: rows in order, faults survived, keys hidden, modes found."""

import json
import logging
import time

import pytest
from tiny import opened

from arte_edge.errors import InputError
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.loader import ServerLimits, open_engine
from arte_edge.runtimes.openai.client import CallFailed, Prices, RetryPolicy
from arte_edge.runtimes.openai.engine import OpenAIEngine, parse_ref
from arte_edge.runtimes.prompt_render import render

ATTEMPTS = 5
FAULTS = ("429", "500", "cut", "cut-body", "garbage", "truncated", "no-completion", "hang")


def requests(n: int) -> list[Request]:
    return [Request(f"question {i:03d}") for i in range(n)]


def test_rows_come_back_in_the_order_asked_and_go_out_in_the_order_of_prefixes(serve):
    front = serve()
    prompts = ["b two", "a two", "b one", "a one"]
    rows = opened(front, max_concurrency=1).complete([Request(p) for p in prompts], Sampling())
    assert [row.text for row in rows] == [f" after {p}" for p in prompts]
    assert [seen.body["prompt"] for seen in front.posts] == sorted(prompts)


def test_every_fault_is_survived_and_counted_and_no_row_moves(serve):
    asked = requests(len(FAULTS) + 3)
    right = opened(serve()).complete(asked, Sampling())
    front = serve(faults=[[fault] for fault in FAULTS])
    engine = opened(front, max_concurrency=4, timeout_s=1.5)  # below the hang of the server
    rows = engine.complete(asked, Sampling())
    assert [row.error for row in rows] == [""] * len(asked)
    assert rows == right
    assert engine.usage.requests == len(asked)
    assert engine.usage.retries == len(FAULTS)
    assert len(front.posts) == len(asked) + len(FAULTS)


def test_a_row_that_fails_to_the_end_is_an_error_row_and_its_neighbours_are_whole(serve):
    front = serve(faults=[[], ["500"] * ATTEMPTS, []])
    rows = opened(front, max_concurrency=1).complete(requests(4), Sampling())
    assert [row.finish for row in rows] == ["length", "error", "length", "length"]
    assert "failed 5 times" in rows[1].error and "500" in rows[1].error
    assert len(front.posts) == 4 + ATTEMPTS - 1


def test_retry_after_is_waited_for_by_every_thread(serve):
    front = serve(faults=[["429"]], retry_after="0.6")
    opened(front, max_concurrency=2).complete(requests(12), Sampling())
    arrived = [(seen.body["prompt"], seen.at_s) for seen in front.posts]
    by_prompt = {prompt: [at_s for other, at_s in arrived if other == prompt] for prompt, _ in arrived}
    ((refused, again),) = [times for times in by_prompt.values() if len(times) > 1]
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


def test_a_spent_quota_is_not_retried(serve, tiny_model):
    def answer(seen):
        if seen.path == "/v1/models":
            return tiny_model()(seen)
        return 429, {"error": {"code": "insufficient_quota", "message": "You have spent it all"}}

    front = serve(answer)
    with pytest.raises(CallFailed, match="spent it all"):
        opened(front).complete(requests(3), Sampling())
    assert len(front.posts) <= 3


def test_tokens_and_cost_are_the_servers_figures_and_the_users_prices(serve):
    engine = opened(serve(), prices=Prices(prompt_usd_per_million=2.0, completion_usd_per_million=10.0))
    rows = engine.complete(requests(5), Sampling())
    prompt_tokens = sum(row.prompt_tokens for row in rows)
    assert prompt_tokens > 0
    assert engine.usage.prompt_tokens == prompt_tokens
    assert engine.usage.completion_tokens == 20
    assert engine.usage.cost_usd == pytest.approx((prompt_tokens * 2 + 20 * 10) / 1e6)


@pytest.fixture
def counting(tiny_model):
    """An answer that notes in `counting.most` how many calls were under way at once."""
    under_way = [0]

    def answer(seen):
        under_way[0] += 1
        answer.most = max(answer.most, under_way[0])
        time.sleep(0.03)
        under_way[0] -= 1
        return tiny_model()(seen)

    answer.most = 0
    return answer


def test_no_more_calls_are_under_way_than_allowed(serve, counting):
    opened(serve(counting), max_concurrency=3).complete(requests(12), Sampling())
    assert counting.most == 3


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
    sent = [(message["role"], message["content"]) for message in front.posts[0].body["messages"]]
    assert sent == [("user", "Name a city"), ("assistant", "reply to")]
    assert row.text == " reply to"
    with pytest.raises(InputError, match="not rendered for one"):
        engine.complete([Request("raw text")], Sampling())


def test_a_grammar_goes_only_to_servers_that_take_one(serve, tiny_model):
    sampling = Sampling(grammar='root ::= "yes"')
    with pytest.raises(InputError, match="grammar"):
        opened(serve()).complete(requests(1), sampling)
    front = serve(tiny_model(owned_by="llamacpp"))
    engine = opened(front)
    engine.complete(requests(1), sampling)
    assert engine.supports_grammar and front.posts[0].body["grammar"] == sampling.grammar


def test_tokens_are_counted_by_the_server_if_it_can_else_estimated_from_what_was_seen(serve, tiny_model):
    model = tiny_model(owned_by="vllm", routes=("completions",))

    def answer(seen):
        return (200, {"count": 42}) if seen.path == "/tokenize" else model(seen)

    assert opened(serve(answer)).count_tokens("anything") == 42
    engine = opened(serve(model))
    assert engine.count_tokens("x" * 400) == 100
    engine.complete([Request("yes" * 1000)], Sampling())  # three bytes a token
    assert engine.count_tokens("x" * 300) == pytest.approx(100, abs=2)


def test_a_reference_is_a_model_and_an_address():
    assert parse_ref("openai:org/m@2@https://host/v1") == ("org/m@2", "https://host/v1")
    for wrong in ("openai:model", "openai:@http://host", "gguf:m@http://host", "openai:m@host"):
        with pytest.raises(InputError, match="names no server"):
            parse_ref(wrong)


def test_an_opened_server_keeps_its_limits(serve, counting):
    limits = ServerLimits(requests_per_minute=600.0, tokens_per_minute=1e6, timeout_s=7.0)
    engine = open_engine(f"openai:tiny@{serve(counting).url}", parallel=2, limits=limits)
    prompt = json.dumps({"messages": [{"role": "user", "content": "question"}]})
    engine.complete([Request(prompt, i) for i in range(8)], Sampling(max_tokens=4))
    assert counting.most == 2
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


def test_a_server_that_is_not_there_is_named_with_its_address(closed_port):
    url = f"http://127.0.0.1:{closed_port}/v1"
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
