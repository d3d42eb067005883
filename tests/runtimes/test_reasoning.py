"""What a model thought is told from what it answered, whatever marks it."""

import pytest

from arte_edge.runtimes.completion import Completion, without_reasoning
from arte_edge.runtimes.reasoning import OUT_OF_BUDGET, STOPPED_INSIDE, close_thought, split_reasoning

HARMONY = "<|channel|>analysis<|message|>"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain, with a < b and [THIN", "plain, with a < b and [THIN"),
        ("<think>\nhm\n</think>\n\nyes", "yes"),
        ("hm </think>yes", "yes"),  # the prompt opened it
        ("<THINKING>a</thinking>yes", "yes"),
        ("<think>I end with </think> and <think> again</think>yes", "and yes"),
        ("[THINK]hm[/THINK]yes", "yes"),
        ("◁think▷hm◁/think▷yes", "yes"),
        ("<|START_THINKING|>hm<|END_THINKING|>yes", "yes"),
        (f"{HARMONY}hm<|end|><|start|>assistant{HARMONY.replace('analysis', 'final')}yes<|return|>", "yes"),
        ("analysisWe need itassistantfinalyes", "yes"),
        ("analysis of the text", "analysis of the text"),
    ],
)
def test_the_answer_is_what_is_left(text, answer):
    found = split_reasoning(text)
    assert (found.text, found.closed) == (answer, True)
    assert (found.reasoning_chars > 0) == (answer != text)


@pytest.mark.parametrize("text", ["<think>hm", "[THINK]hm", f"{HARMONY}hm", "analysisWe need"])
def test_reasoning_without_an_end_is_no_answer(text):
    cut = without_reasoning(Completion(text, "length", completion_tokens=8))
    assert (cut.text, cut.finish, cut.error, cut.reasoning_tokens) == ("", "error", OUT_OF_BUDGET, 8)
    assert without_reasoning(Completion(text, "stop")).error == STOPPED_INSIDE


def test_a_prompt_that_opens_a_thought_gets_it_closed():
    tags = {"a<think>\n": "</think>", "[THINK]": "[/THINK]", "<|START_THINKING|>": "<|END_THINKING|>"}
    for prompt, closing in tags.items():
        assert close_thought(prompt) == f"{prompt.strip()}\n\n{closing}\n\n"
    for prompt in ("<think>\n\n</think>\n\n", "what is <think> for?"):
        assert close_thought(prompt) == prompt
