"""The engine of an OpenAI-compatible server: rows in order, faults survived, keys hidden, modes found."""

import json
import logging
import time

import pytest
from tiny import opened

from arte_edge.errors import EngineError, InputError
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.loader import ServerLimits, open_engine
from arte_edge.runtimes.openai.client import CallFailed, RetryPolicy
from arte_edge.runtimes.openai.engine import OpenAIEngine, parse_ref
from arte_edge.runtimes.prompt_render import render

ATTEMPTS = 5
FAULTS = ("429", "500", "cut", "cut-body", "garbage", "truncated", "no-completion", "hang")


def requests(n: int) -> list[Request]:
    return [Request(f"question {i:03d}") for i in range(n)]


@pytest.fixture
def posts(serve, tiny_model):
    """Start a server whose model list is a tiny model's; `answer` gets the posts, and None leaves them to it."""
    model = tiny_model()

    def start(answer):
        return serve(lambda seen: (seen.body and answer(seen)) or model(seen))

    return start


def test_rows_come_back_in_the_order_asked_and_go_out_in_the_order_of_prefixes(serve):
    front = serve()
    prompts = ["b two", "a two", "b one", "a one"]
    engine = opened(front, max_concurrency=1)
    rows = engine.complete([Request(p) for p in prompts], Sampling())
    assert [row.text for row in rows] == [f" after {p}" for p in prompts]
    assert [seen.body["prompt"] for seen in front.posts] == sorted(prompts)
    engine.complete([Request("x" * 3000)], Sampling())  # three bytes a token, as is learned
    assert engine.count_tokens("x" * 300) == pytest.approx(100, abs=4)


def test_every_fault_is_survived_and_no_row_moves(serve):
    asked = requests(len(FAULTS) + 3)
    right = opened(serve()).complete(asked, Sampling())
    front = serve(faults=[[fault] for fault in FAULTS])
    rows = opened(front, max_concurrency=4, timeout_s=1.5).complete(asked, Sampling())  # below the server's hang
    assert [row.error for row in rows] == [""] * len(asked)
    assert rows == right and len(front.posts) == len(asked) + len(FAULTS)


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


@pytest.mark.parametrize("asked", ["3600", "1e999"])
def test_a_retry_after_beyond_patience_ends_the_call(serve, asked):
    front = serve(faults=[["429"]], retry_after=asked)
    (row,) = opened(front).complete(requests(1), Sampling())
    assert f"asks to wait {float(asked):.0f} s" in row.error and len(front.posts) == 1


def said(text, finish="stop", usage=None):
    return 200, {"choices": [{"text": text, "finish_reason": finish}], "usage": usage}


@pytest.mark.parametrize(
    ("answer", "reason", "n_post", "fault"),
    [
        ((400, {"error": {"message": "too long"}}), "answered 400: too long", 1, "row"),
        ((413, {"detail": "too large"}), "answered 413: too large", 1, "row"),
        ((403, {"error": "your input was flagged"}), "answered 403: your input was flagged", 1, "row"),
        (said(None), "without a text", 1, "answer"),
        (said("some", "content_filter"), "content filter", 1, "answer"),
        (said("<think>hm", "length"), "budget ran out", 1, "answer"),
        ((200, {"choices": []}), "no choice in it", 2, "row"),
        ((200, {"error": {"code": 400, "message": "upstream says no"}}), "upstream says no", 1, "row"),
        ((200, {"object": "error", "message": "busy", "code": 503}), "503: busy", ATTEMPTS, "row"),
        ((200, b"<html>Bad gateway</html>"), "a page instead of an answer: '<html>Bad", ATTEMPTS, "row"),
        ((200, b'data: {"choices": []}'), "a stream of events", 1, "row"),
        ((200, b'{"choices": [{"te'), "no whole JSON document", 3, "row"),
        ((500, b""), "500: (no text)", ATTEMPTS, "row"),
    ],
)
def test_a_row_that_fails_has_its_own_reason_and_its_neighbours_are_whole(posts, answer, reason, n_post, fault):
    front = posts(lambda seen: answer if seen.body["prompt"] == "question 001" else None)
    rows = opened(front, max_concurrency=1).complete(requests(3), Sampling(stop=("\n",)))
    assert [row.finish for row in rows] == ["length", "error", "length"]
    assert reason in rows[1].error and rows[1].fault == fault
    assert len(front.posts) == 2 + n_post


@pytest.mark.parametrize("usage", ["free", {"prompt_tokens": "many"}, {"completion_tokens": None}, None])
def test_an_answer_with_an_odd_usage_is_kept_and_asked_for_once(posts, usage):
    front = posts(lambda _: said("fine", usage=usage))
    (row,) = opened(front).complete(requests(1), Sampling())
    assert (row.text, row.error) == ("fine", "") and len(front.posts) == 1


REFUSED = {
    "temperature": (400, {"error": {"message": "Unsupported value: 'temperature'", "param": "temperature"}}),
    "seed": (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"]}]}),
    "stop": (400, {"error": "Argument not supported on this model: stop"}),
    "max_tokens": (400, {"error": {"message": "'max_tokens' is not supported, 'max_completion_tokens' is."}}),
}


def test_a_refused_parameter_is_left_out_from_then_on_and_said_once(posts):
    front = posts(lambda seen: next((REFUSED[name] for name in REFUSED if name in seen.body), None))
    engine = opened(front, max_concurrency=1)
    rows = engine.complete(requests(3), Sampling(temperature=1.0, stop=("question",), max_tokens=7))
    assert [row.text for row in rows] == [" after question"] * 3, "what is not sent is cut here"
    assert len(front.posts) == 3 + len(REFUSED)
    assert front.posts[-1].body["max_completion_tokens"] == 7
    assert [f"parameter {name} " in note for name, note in zip(REFUSED, engine.notes, strict=True)] == [True] * 4


def test_a_stop_string_inside_reasoning_is_not_sent_again(posts):
    whole = "<think>so <ans>a</ans></think><ans>b</ans> c"
    front = posts(lambda seen: said(whole[:15] if "stop" in seen.body else whole))
    engine = opened(front, max_concurrency=1)
    rows = engine.complete(requests(2), Sampling(stop=("</ans>",)))
    assert [row.text for row in rows] == ["<ans>b</ans>"] * 2
    assert len(front.posts) == 3 and len(engine.notes) == 1


def test_a_server_that_is_gone_is_told_from_a_prompt_that_breaks_it(serve, closed_port):
    engine = opened(serve(faults=[[], ["500"] * ATTEMPTS]), max_concurrency=1)
    assert engine.identity.key().endswith(f"/{engine._server.url}"), "not the other server's"
    assert [row.fault for row in engine.complete(requests(2), Sampling())] == ["", "row"]
    engine._server.url = engine._server.url.copy_with(port=closed_port)
    assert [row.fault for row in engine.complete(requests(2), Sampling())] == ["server", "server"]
    url = str(engine._server.url)
    with pytest.raises(CallFailed, match=f"{url}/models failed 2 times.*ConnectError"):
        OpenAIEngine("tiny", url, retry=RetryPolicy(attempts=2, base_s=0.0))


def test_a_server_that_stays_dead_is_not_asked_a_thousand_times(serve):
    front = serve(faults=[["500"] * 2] * 200)
    engine = opened(front, max_concurrency=2, retry=RetryPolicy(attempts=2, base_s=0.0))
    rows = engine.complete(requests(200), Sampling())
    assert {(row.finish, row.fault) for row in rows} == {("error", "server")}
    assert "not sent" in rows[-1].error and len(front.posts) < 30


def test_a_key_that_is_refused_later_is_raised_only_if_no_row_was_answered(posts):
    answered = iter([None, None])
    front = posts(lambda _: next(answered, (403, {"detail": "revoked"})))
    engine = opened(front, max_concurrency=1)
    rows = engine.complete(requests(9), Sampling())
    assert [row.finish for row in rows] == ["length"] * 2 + ["error"] * 7
    assert len(front.posts) == 3
    with pytest.raises(CallFailed, match="403: revoked"):
        engine.complete(requests(9), Sampling())


def test_a_spent_quota_is_not_retried(posts):
    front = posts(lambda _: (429, {"error": {"code": "insufficient_quota", "message": "You have spent it all"}}))
    with pytest.raises(CallFailed, match="spent it all"):
        opened(front).complete(requests(3), Sampling())
    assert len(front.posts) <= 3


@pytest.mark.parametrize("limited", [3, 2])
def test_no_more_calls_are_under_way_than_allowed(posts, limited):
    under_way, most = [0], [0]

    def answer(_):
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        time.sleep(0.03)
        under_way[0] -= 1

    limits = ServerLimits(requests_per_minute=600.0, tokens_per_minute=1e6, timeout_s=7.0)
    engine = open_engine(f"openai:tiny@{posts(answer).url}", parallel=limited, limits=limits)
    prompt = json.dumps({"messages": [{"role": "user", "content": "question"}]})
    engine.complete([Request(prompt, i) for i in range(12)], Sampling(max_tokens=4))
    assert most[0] == limited
    assert isinstance(engine, OpenAIEngine) and engine._server._client.timeout.read == 7.0


def test_draws_differ_between_samples_and_rows_but_not_between_runs(serve):
    def seeds():
        front = serve()
        asked = [Request("a", 0), Request("a", 1), Request("b", 0)]
        opened(front, max_concurrency=1).complete(asked, Sampling(temperature=1.0))
        return [seen.body["seed"] for seen in front.posts]

    assert seeds() == seeds() and len(set(seeds())) == 3


@pytest.mark.parametrize("continues", [True, False])
def test_a_begun_answer_is_sent_only_to_a_server_that_continues_it(serve, tiny_model, continues):
    front = serve(tiny_model(continues=continues))
    engine = opened(front, mode="auto")
    assert (engine.mode, engine.continues, len(front.posts)) == ("chat", continues, 1)
    prompt = render(engine, [{"role": "user", "content": "Name a city"}], "Name a")
    (row,) = engine.complete([Request(prompt)], Sampling())
    sent = front.posts[-1].body["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant"][: 1 + continues]
    # The other one is asked to begin so, and what it says before that is left out.
    assert row.text == ("flies on" if continues else " city\n\nBegin your answer with: Name a")
    with pytest.raises(InputError, match="not rendered for one"):
        engine.complete([Request("raw text")], Sampling())
    with pytest.raises(EngineError, match="does not score"):
        engine.choose_each([prompt], [["a", "b"]])
    assert opened(front, mode="auto", continues=not continues).continues != continues, "what a run knows holds"


def test_a_grammar_goes_only_to_servers_that_take_one(serve, tiny_model):
    sampling = Sampling(grammar='root ::= "yes"')
    with pytest.raises(InputError, match="grammar"):
        opened(serve()).complete(requests(1), sampling)
    front = serve(tiny_model(owned_by="llamacpp"))
    engine = opened(front)
    engine.complete(requests(1), sampling)
    assert engine.supports_grammar and front.posts[0].body["grammar"] == sampling.grammar


def test_a_reference_is_a_model_and_an_address_and_shows_no_secret():
    assert parse_ref("openai:org/m@2@https://Host/v1/") == ("org/m@2", "https://host/v1")
    wrong = ("openai:model", "openai:@http://host", "gguf:m@http://host", "openai:m@me:s3cret@host")
    for ref in (*wrong, "openai:m@https://me:s3cret@host/v1"):
        with pytest.raises(InputError, match=r"names no server|no password") as caught:
            parse_ref(ref)
        assert "s3cret" not in str(caught.value)


def test_a_wrong_key_is_raised_at_once_with_the_variable_and_without_the_key(serve, monkeypatch, caplog):
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", "theirs, which ours comes before")
    monkeypatch.setenv("ARTE_EDGE_API_KEY", key)
    caplog.set_level(logging.DEBUG)
    front = serve(lambda _: (401, {"error": {"message": f"Incorrect API key provided: {key}"}}))
    with pytest.raises(CallFailed) as caught:
        opened(front)
    assert [seen.headers["authorization"] for seen in front.seen] == [f"Bearer {key}"]
    assert "401: Incorrect API key provided: ***" in str(caught.value)
    assert "it was read from ARTE_EDGE_API_KEY" in str(caught.value)
    chain = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert key not in "".join(map(repr, chain)) + caplog.text


def test_nothing_shows_the_key_or_a_part_of_it(posts, monkeypatch, caplog):
    key = "sk-quiet-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    caplog.set_level(logging.DEBUG)
    # Cut to 80 characters the text ends inside the key.
    engine = opened(posts(lambda seen: (200, f"{'.' * 70} {key}".encode()) if "001" in str(seen.body) else None))
    rows = engine.complete(requests(3), Sampling())
    shown = [repr(engine._server._client), repr(rows), caplog.text]
    assert rows[1].error and key[:6] not in "".join(shown)


def test_an_unknown_model_names_the_nearest_and_a_server_without_a_list_is_believed(serve, tiny_model):
    with pytest.raises(InputError, match=r"serves no model named 'tiny'\nDid you mean 'tinny'"):
        opened(serve(tiny_model(models=("teacher-70b", "tinny"))))
    front = serve(lambda seen: tiny_model()(seen) if seen.body else (404, {}))
    assert opened(front).complete(requests(1), Sampling())[0].finish == "length"


def test_the_mode_is_found_out_and_a_server_of_neither_is_refused_with_both_reasons(serve, tiny_model):
    assert opened(serve(tiny_model(routes=("completions",))), mode="auto").mode == "completions"
    with pytest.raises(CallFailed, match=r"(?s)neither chat nor completions.*chat: .*completions: "):
        opened(serve(tiny_model(routes=())), mode="auto")
