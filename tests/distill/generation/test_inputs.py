"""Inputs for given answers: as many for each, more where the student errs, and no validation example in a prompt."""

import random
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from arte_edge.distill.generation.inputs import Focus, InputSource, focus_of
from arte_edge.distill.generation.questions import (
    Drafts,
    QuestionPlan,
    QuestionSource,
    draft_questions,
    draft_sampling,
    elicit_inputs,
)
from arte_edge.distill.stages.elicit import draft_plan, draft_source, elicit
from arte_edge.distill.stages.fresh_drafts import draft_afresh
from arte_edge.distill.stages.tailor import tailor
from arte_edge.tasks.task import Answer, Example

LABELS = ("C", "C++", "C++ 20", "play music")
TOLD = re.compile(r"whose right answer is ([^,]+), numbered, one a line\. ([^\[]*?) Make them differ")
SEEDS = ("put on a song by the band", "sort my list of numbers", "free the memory twice", "a lambda please")


def words(prompt: str, sample: int, n: int = 5) -> str:
    rng = random.Random(f"{prompt}/{sample}")
    lines = [" ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(4)) for _ in range(n)]
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 7)).removeprefix("7.")


@pytest.fixture
def told(house: Any) -> Any:
    """A house whose task has labels that begin alike, and a teacher that writes five different inputs a prompt."""
    house.by_label, house.teacher.inputs = True, words
    rows = tuple(Example(text, label) for text, label in zip(SEEDS, LABELS, strict=True))
    house.task = replace(house.task, answer=Answer(kind="choice", choices=LABELS), seed=rows)
    return house


def source(house: Any, needed: int = 20, focus: Focus | None = None) -> tuple[Any, InputSource]:
    run = house.run()
    plan = QuestionPlan(run.config.elicit, needed, 1.0, 0, 0)
    return run, InputSource(run, house.teacher, plan, focus or Focus())


def drafted(house: Any, needed: int = 20, focus: Focus | None = None) -> Drafts:
    run, inputs = source(house, needed, focus)
    plan = QuestionPlan(run.config.elicit, needed, 1.0, 0, 0)
    drafts = draft_questions(run, house.teacher, plan, "inputs", inputs)
    run.close()
    return drafts


def counts(drafts: Drafts) -> Counter[str]:
    return Counter(row["target"] for row in drafts.valid)


def test_every_answer_gets_as_many_inputs_even_from_a_teacher_that_finds_few_for_one(told: Any) -> None:
    assert counts(drafted(told)) == dict.fromkeys(LABELS, 5)
    told.folder = told.folder.with_name("uneven")
    told.folder.mkdir()
    told.teacher.inputs = lambda prompt, i: words(prompt, i, 1 if "answer is C," in prompt else 5)
    drafts = drafted(told)
    assert counts(drafts) == dict.fromkeys(LABELS, 5)
    assert not drafts.rejected, "what is more than enough is left out without a reason"


def test_errors_weigh_and_say_what_is_confused_with_what() -> None:
    pairs = [("C", "C++")] * 2 + [("C", None), ("C++", "C"), ("play music", "play music")]
    focus = focus_of(pairs, weighted=True)
    assert dict(focus.weight) == {"C": 2.0, "C++": 1.0}
    assert focus.confused == {"C": ("C++",), "C++": ("C",)}
    assert focus_of(pairs, weighted=False) == Focus({}, focus.confused)
    assert focus_of([], weighted=True) == Focus()


def test_more_is_written_where_the_student_errs_more_and_something_everywhere(told: Any) -> None:
    focus = focus_of([("C", "C++")] * 3 + [("C++", "C")], weighted=True)
    assert counts(drafted(told, 40, focus)) == {"C": 20, "C++": 10, "C++ 20": 5, "play music": 5}


def test_near_misses_are_written_for_confused_answers_alone(told: Any) -> None:
    run, inputs = source(told, 4000, Focus(confused={"C": ("C++", "play music")}))
    found = [TOLD.findall(request.prompt)[-1] for request in inputs.requests(0, 400, {})]
    near = [(label, condition) for label, condition in found if "easy to mistake for" in condition]
    assert {label for label, _ in near} == {"C"}
    others = {re.findall(r"mistake for (.+), but the right answer must be C\.", text)[0] for _, text in near}
    assert others == {"C++", "play music"}
    assert 0.1 < len(near) / sum(label == "C" for label, *_ in found) < 0.4
    assert len({condition for *_, condition in found}) > 5, "conditions take turns"
    run.close()


@pytest.mark.parametrize(
    ("text", "finish", "found"),
    [
        (" a b\n8. c\n9) d\n", "stop", ["a b", "c", "d"]),
        (' "a b"\n8. “c”', "stop", ["a b", "c"]),
        (" a\n8. b\n9. half of", "length", ["cut off", "a", "b"]),
        (" half of", "length", ["cut off"]),
        (" a\nThat is all.\n8.\n9. b", "stop", ["a", "b"]),
        (f" a\n8. {'x' * 1501}", "stop", ["a", "empty or too long"]),
        ("", "stop", ["no input at all"]),
        ("7. a\n8. b", "stop", ["a", "b"]),  # of a server that begins anew
        ("Here are two inputs:\n1. a\n2. b", "stop", ["a", "b"]),
        (" 12.5 of 30\n8. 3.5 of 20", "stop", ["12.5 of 30", "3.5 of 20"]),
    ],
)
def test_a_numbered_list_is_read(told: Any, text: str, finish: str, found: list[str]) -> None:
    run, inputs = source(told)
    label = TOLD.findall(inputs.requests(0, 1, {})[0].prompt)[-1][0]
    read = inputs.parse(0, text, finish)
    assert [one if isinstance(one, str) else one[0] for one in read] == found
    assert {one[1] for one in read if not isinstance(one, str)} <= {label}
    run.close()


def test_repeats_of_seeds_and_of_drafts_are_rejected(told: Any) -> None:
    told.teacher.inputs = lambda prompt, i: f" {SEEDS[0]} now\n{words(prompt, 0, 2)}\n9. {words('', 0, 1)}"
    reasons = drafted(told, 12).reasons()
    assert set(reasons) == {"repeats a seed", "repeats a draft"}


@pytest.mark.parametrize("what", ["letters", "text", "newline", "switched off", "labels"])
def test_only_fixed_answers_and_inputs_of_one_line_can_be_told(told: Any, what: str) -> None:
    if what == "letters":
        told.task = replace(told.task, answer=Answer(kind="choice"))
    elif what == "text":
        told.task = replace(told.task, answer=Answer(kind="text"))
    elif what == "newline":
        told.task = replace(told.task, seed=(*told.task.seed, Example("two\nlines", "C")))
    told.by_label = what != "switched off"
    run = told.run()
    made = draft_source(run, told.teacher, draft_plan(run.config), Focus())
    assert type(made) is (InputSource if what == "labels" else QuestionSource)
    run.close()


@pytest.mark.parametrize(
    ("role", "policy", "then"),
    [
        ("inputs", "vote", "dropped"),
        ("inputs", "teacher", "kept"),
        ("labels", "vote", "changed"),
        ("labels", "teacher", "kept"),
    ],
)
def test_what_becomes_of_an_input_whose_teacher_contradicts_the_told_answer_is_counted(
    house: Any, role: Any, policy: str, then: str
) -> None:
    house.by_label, house.teacher.knows = True, lambda n: n % 3 > 0
    run = house.run(tailor={"questions": 24, "label": policy})
    run.role = role
    summary = tailor(run, None, Focus())
    rows = run.read("tailor", "train.jsonl")
    run.close()
    labels = summary["labels"]
    assert ("votes_agree" in labels) is (then != "kept"), "nobody votes on what is kept"
    differ = 1 - labels.get("votes_agree", 0.7)
    assert 0.15 < differ < 0.5
    assert labels["questions_dropped"] == pytest.approx(differ if then == "dropped" else 0, abs=1e-3)
    assert labels["label_changed"] == pytest.approx(differ if then == "changed" else 0, abs=1e-3)
    assert len(rows) == 24 and sum(row["label"] == "odd" for row in rows) in range(10, 15)
    for row in rows:
        n = int(row["input"].split()[1])
        assert (row["label"] == ("odd" if n % 2 else "even")) is (n % 3 > 0 or then != "changed")
        assert n % 3 > 0 or then != "dropped"
        assert row["rationale"] == f"<ans>{row['label']}</ans>"
    contradicted = [row for row in rows if int(row["input"].split()[1]) % 3 == 0]
    assert bool(contradicted) is (then != "dropped")
    assert not any("step by step" in prompt for prompt in house.teacher.prompts), "nobody asked for reasons"


@pytest.mark.parametrize(("policy", "kept"), [("teacher", True), ("vote", False)])
def test_an_input_that_does_not_mean_its_answer_is_scored_too(house: Any, policy: str, kept: bool) -> None:
    house.by_label, house.teacher.knows = True, lambda n: n % 3 > 0
    (house.folder / "check").mkdir(parents=True)
    (house.folder / "check" / "answers.jsonl").write_text("")
    run = house.run(elicit={"questions": 24, "label": policy})
    run.role = "inputs"
    summary = elicit(run)
    rows = run.read("elicit", "rationales.jsonl")
    written = {row["id"]: row["target"] for row in run.read("elicit", "questions.jsonl")}
    run.close()
    assert (len(rows) == summary["questions"] == 24) is kept and len(rows) >= 12
    assert all(row["usable"] and row["answer"] == written[row["question"]] for row in rows)
    assert ("votes_agree" in summary["labels"]) is not kept, "the teacher votes only where it decides"


def test_only_a_local_teacher_of_unlike_seeds_is_kept_from_repeating(told: Any) -> None:
    def penalty(**config: Any) -> tuple[float, bool]:
        run = told.run(**config)
        sampled = draft_sampling(run, draft_plan(run.config))
        run.close()
        return sampled.repeat_penalty, "repeat_penalty" in elicit_inputs(run)

    assert penalty() == (0.8, True)
    assert penalty(elicit={"repeat_penalty": 0.0}) == (0.0, False)
    assert penalty(elicit={"by_label": False}) == (0.0, False)  # questions in tags
    assert penalty(teacher={"model": "openai:m@http://127.0.0.1:1/v1"}) == (0.0, False)
    told.task = replace(told.task, seed=tuple(Example(f"not True and {i}", label) for i, label in enumerate(LABELS)))
    assert penalty() == (0.0, False)


def test_of_fresh_drafts_each_that_could_be_trained_on_counts(told: Any) -> None:
    told.teacher.inputs = lambda prompt, i: words(prompt, i) if i else words("one", 0)
    run = told.run(elicit={"questions": 4}, align={"fresh_drafts": 6})
    (told.folder / "check").mkdir(parents=True, exist_ok=True)
    (told.folder / "check" / "answers.jsonl").write_text("")
    fresh = draft_afresh(run, told.teacher)
    run.close()
    assert (fresh.n_draft, fresh.n_valid) == (30, 30)
    told.teacher.inputs = lambda prompt, i: words("one", 0)  # the same five for every prompt
    run = told.run(elicit={"questions": 4, "question_tokens": 301}, align={"fresh_drafts": 6})
    fresh = draft_afresh(run, told.teacher)
    run.close()
    assert (fresh.n_draft, fresh.n_valid) == (30, 5)
