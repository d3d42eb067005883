import pytest
from hypothesis import given
from hypothesis import strategies as st

from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.openai.schema import Choice, body, completion, quirks_of, with_stop

PLAIN, VLLM = quirks_of("host", ""), quirks_of("host", "vllm")
OPENAI, LLAMA = quirks_of("api.openai.com", "system"), quirks_of("host", "me")
CHAT = Request('{"messages": [{"content": "Q", "role": "user"}, {"content": "<ans>", "role": "assistant"}]}')


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
    choice = Choice(text=text, finish_reason=reason)
    assert with_stop(text, choice, ("</ans>", "</q>"), prefill) == expected


def test_the_stop_string_that_a_server_names_is_believed():
    choice = Choice(text="a", finish_reason="stop", stop_reason="\n\n")
    assert with_stop("a", choice, ("\n", "\n\n"), "") == ("a\n\n", "stop")


@given(st.text(alphabet="a<>/ans", max_size=20), st.sampled_from(["stop", "length", None]))
def test_a_text_is_cut_at_its_first_stop_string_and_nothing_else_is_lost(text, reason):
    stops = ("</ans>", "s")
    found, finish = with_stop(text, Choice(text=text, finish_reason=reason), stops, "")
    assert found.startswith(text) or (finish == "stop" and text.startswith(found))
    assert (finish == "stop") == found.endswith(stops)


def test_a_servers_own_defaults_are_switched_off():
    sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=5, stop=("\n",))
    common = {"model": "m", "prompt": "Q", "temperature": 0.7, "top_p": 0.9, "max_tokens": 5, "stop": ["\n"]}
    document = body("m", "completions", PLAIN, Request("Q"), sampling)
    assert document.pop("seed") >= 0 and document == common
    own = {"repeat_penalty": 1.0, "top_k": 0}
    assert body("m", "completions", LLAMA, Request("Q"), sampling).items() >= own.items()
    assert body("m", "completions", VLLM, Request("Q"), sampling)["include_stop_str_in_output"] is True


def test_a_begin_token_that_the_template_wrote_is_not_added_again():
    asked = Request("<s>Q")
    assert body("m", "completions", VLLM, asked, Sampling(), "<s>")["add_special_tokens"] is False
    assert "add_special_tokens" not in body("m", "completions", VLLM, Request("Q"), Sampling(), "<s>")


def test_chat_requests_suit_the_server():
    sampling = Sampling(max_tokens=9, stop=tuple("abcdef"))
    document = body("m", "chat", OPENAI, CHAT, sampling)
    assert document["max_completion_tokens"] == 9 and "max_tokens" not in document
    assert document["stop"] == list("abcd")  # the other two are cut on this side
    assert body("m", "chat", VLLM, CHAT, sampling)["continue_final_message"] is True
    assert "continue_final_message" not in body("m", "chat", LLAMA, CHAT, sampling)


def test_an_answer_becomes_a_completion():
    answer = {
        "choices": [{"message": {"content": "<ans>True"}, "finish_reason": "stop", "new_field": 1}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
    }
    row = completion(answer, "chat", PLAIN, CHAT, Sampling(stop=("</ans>",)))
    assert (row.text, row.finish) == ("True</ans>", "stop")
    assert (row.prompt_tokens, row.completion_tokens, row.cached_tokens) == (7, 2, 4)


def test_an_answer_that_a_filter_cut_off_is_an_error_row():
    answer = {"choices": [{"text": "some", "finish_reason": "content_filter"}]}
    row = completion(answer, "completions", PLAIN, Request("Q"), Sampling())
    assert row.finish == "error" and "content filter" in row.error


WRONG = [{}, {"choices": []}, {"choices": [{}]}, {"choices": [{"text": 3}]}, [], "text"]


@pytest.mark.parametrize("answer", [*WRONG, {"choices": [{"message": {"content": "chat"}}]}])
def test_what_is_no_completion_is_a_value_error(answer):
    with pytest.raises(ValueError):
        completion(answer, "completions", PLAIN, Request("Q"), Sampling())
