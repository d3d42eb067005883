import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.openai.schema import body, completion, quirks_of, refused_parameter, token_counts, with_stop
from arte_edge.runtimes.reasoning import OUT_OF_BUDGET, STOPPED_INSIDE

PLAIN, VLLM = quirks_of(""), quirks_of("vllm")
LLAMA = quirks_of("me")
CHAT = Request('{"messages": [{"content": "Q", "role": "user"}, {"content": "<ans>", "role": "assistant"}]}')
NEW_TURN = Request('{"messages": [{"content": "Q", "role": "user"}], "prefill": "<q>"}')


@pytest.mark.parametrize(
    ("text", "reason", "prefill", "expected"),
    [
        ("so <ans>True", "stop", "", ("so <ans>True</ans>", "stop")),
        ("True", "stop", "<ans>", ("True</ans>", "stop")),
        ("True", "stop", "", ("True", "eos")),
        ("so <ans>True", "length", "", ("so <ans>True", "length")),
        ("so <ans>True", None, "", ("so <ans>True", "eos")),
        ("so <ans>True</ans> and", "length", "", ("so <ans>True</ans>", "stop")),
        ("<q><ans>1", "stop", "", ("<q><ans>1</ans>", "stop")),
        ("<q><ans>1</ans> 2", "stop", "", ("<q><ans>1</ans>", "stop")),
        ("<q>what", "stop", "", ("<q>what</q>", "stop")),
        ("<q>what", "stop", None, ("<q>what", "eos")),
    ],
)
def test_a_stripped_stop_string_is_put_back(text, reason, prefill, expected):
    assert with_stop(text, reason, None, ("</ans>", "</q>"), prefill) == expected


def test_the_stop_string_that_a_server_names_is_believed():
    assert with_stop("a", "stop", "\n\n", ("\n", "\n\n"), "") == ("a\n\n", "stop")


@given(st.text(alphabet="a<>/ans", max_size=20), st.sampled_from(["stop", "length", None]))
def test_a_text_is_cut_at_its_first_stop_string_and_nothing_else_is_lost(text, reason):
    stops = ("</ans>", "s")
    found, finish = with_stop(text, reason, None, stops, "")
    assert found.startswith(text) or (finish == "stop" and text.startswith(found))
    assert (finish == "stop") == found.endswith(stops)


def test_requests_suit_the_server():
    sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=5, stop=tuple("abcdef"))
    common = {"model": "m", "prompt": "Q", "temperature": 0.7, "top_p": 0.9, "max_tokens": 5}
    document = body("m", "completions", PLAIN, Request("Q"), sampling)
    assert document.pop("seed") >= 0 and document == common | {"stop": list("abcdef")}
    own = {"repeat_penalty": 1.0, "top_k": 0}
    assert body("m", "completions", LLAMA, Request("Q"), sampling).items() >= own.items()
    assert body("m", "completions", VLLM, Request("Q"), sampling)["include_stop_str_in_output"] is True
    assert body("m", "chat", PLAIN, CHAT, sampling, {"max_tokens"})["max_completion_tokens"] == 5
    assert body("m", "chat", VLLM, CHAT, sampling)["continue_final_message"] is True
    assert "continue_final_message" not in body("m", "chat", LLAMA, CHAT, sampling)
    assert "prefill" not in body("m", "chat", PLAIN, NEW_TURN, sampling)


def test_reasoning_is_switched_off_only_where_server_and_family_can():
    for model, quirks, sent in (("Qwen3-4B", VLLM, True), ("gpt-4o", VLLM, False), ("qwen3", PLAIN, False)):
        document = body(model, "chat", quirks, CHAT, Sampling())
        assert document.get("chat_template_kwargs", {}).get("enable_thinking", True) is not sent


def answered(message, request=CHAT, *, finish="stop", usage=None, **choice):
    choice = {"message": message, "finish_reason": finish, "new_field": 1, **choice}
    document = {"choices": [choice], "usage": usage}
    return completion(document, "chat", PLAIN, request, Sampling(stop=("</ans>", "</q>")))


def test_an_answer_becomes_a_completion():
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    row = answered({"content": "<ans>True"}, usage=usage)
    assert (row.text, row.finish) == ("True</ans>", "stop")
    assert (row.prompt_tokens, row.completion_tokens, row.cached_tokens) == (7, 2, 4)
    parts = [{"type": "text", "text": "Tr"}, {"thinking": "hm"}, {"type": "text", "text": "ue\ud83d"}]
    assert answered({"content": parts}, usage=usage).text == "True\ufffd</ans>"  # half of a character


@pytest.mark.parametrize("text", ["Sure:\n<q>what</q>", "<q>what</q> and", "what"])
def test_a_new_turn_is_cut_where_it_begins_as_asked(text):
    assert answered({"content": text}, NEW_TURN).text == "what</q>"


ODD = ["free", [], {"prompt_tokens": "x"}, {"prompt_tokens": -3}, {"prompt_tokens": float("nan")}]


@pytest.mark.parametrize("usage", [*ODD, {"completion_tokens": True, "prompt_tokens_details": 7}])
def test_a_usage_that_is_no_number_costs_no_answer(usage):
    assert token_counts({"usage": usage}) == (0, 0, 0, 0)
    row = answered({"content": "True"}, usage=usage, logprobs={"content": "?"}, stop_reason=[1])
    assert (row.text, row.error) == ("True</ans>", "")
    assert token_counts({"usage": {"prompt_tokens": "12", "completion_tokens": 3.0}})[:2] == (12, 3)


@pytest.mark.parametrize(
    ("message", "finish", "reason"),
    [
        ({"content": "some"}, "content_filter", "content filter"),
        ({"content": None}, "stop", "without a text"),
        ({"content": None, "refusal": "I won't"}, "stop", "declined: I won't"),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls", "called a tool"),
        ({"tool_calls": [{"id": "1"}]}, "tool_calls", "called a tool"),
        ({"content": None, "reasoning_content": "hm"}, "length", OUT_OF_BUDGET),
        ({"content": "", "reasoning": "hm"}, "stop", STOPPED_INSIDE),
        ({"content": "<think>hm, <ans>"}, "length", OUT_OF_BUDGET),
        ({"content": "<think>hm, <ans>"}, "stop", STOPPED_INSIDE),
    ],
)
def test_an_answer_without_a_text_is_an_error_with_its_own_reason(message, finish, reason):
    row = answered(message, finish=finish, usage={"prompt_tokens": 3, "completion_tokens": 9})
    assert (row.finish, row.fault, row.completion_tokens) == ("error", "answer", 9)
    assert reason in row.error


def test_reasoning_is_left_out_and_its_tokens_are_counted():
    usage = {"completion_tokens": 100}
    inline = answered({"content": f"<think>{'a' * 84}</think>\n\n<ans>True"}, usage=usage)
    assert (inline.text, inline.reasoning_tokens) == ("True</ans>", 90)
    field = answered({"content": "Tr", "reasoning_content": "a" * 8}, usage=usage)
    assert (field.text, field.reasoning_tokens) == ("Tr</ans>", 80)
    usage["completion_tokens_details"] = {"reasoning_tokens": 64}
    assert answered({"content": "True", "reasoning": "a"}, usage=usage).reasoning_tokens == 64


WRONG = [
    {},
    {"choices": []},
    {"choices": [{}]},
    {"choices": [None]},
    [],
    "text",
    {"choices": [{"error": {"code": 502}}]},
]


@pytest.mark.parametrize("answer", [*WRONG, {"choices": [{"message": {"content": "chat"}}]}])
def test_what_is_no_completion_is_a_value_error(answer):
    with pytest.raises(ValueError):
        completion(answer, "completions", PLAIN, Request("Q"), Sampling())


SENT = dict.fromkeys(("model", "messages", "temperature", "top_p", "max_tokens", "stop", "seed"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("""{"message": "Unsupported value: 'temperature', top_p", "param": "temperature"}""", "temperature"),
        ("'max_tokens' is not supported. Use 'max_completion_tokens' instead.", "max_tokens"),
        ('[{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs"}]', "seed"),
        ("Argument not supported on this model: stop", "stop"),
        ("`temperature` and `top_p` cannot both be specified", "top_p"),
        ("`temperature` must be strictly positive", "temperature"),
        ("max_tokens must be at most 4", ""),
        ("the prompt and max_tokens exceed the context of 2048 tokens", ""),
        ("unknown model m", ""),
        ("unsupported content in messages", ""),
    ],
)
def test_a_refused_parameter_is_told_from_a_refused_row(text, name):
    assert refused_parameter(text, SENT) == name
