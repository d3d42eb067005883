"""Reading task folders: valid ones load, problems are reported with file and line."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from arte_edge.asking.form import FORMS, Asking, instruction, with_instruction
from arte_edge.errors import InputError
from arte_edge.runtimes.prompt_render import render
from arte_edge.tasks.folder import load_folder, read_folder
from arte_edge.tasks.task import SPLITS, Example

Write = Callable[[Path, list[dict[str, Any]]], Path]


def row(number: int, target: str = "even") -> dict[str, Any]:
    return {"input": f"Is {number} even or odd?", "target": target}


def append(folder: Path, file: str, line: str) -> None:
    with (folder / file).open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / "task.toml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_a_valid_folder_loads(parity: Path) -> None:
    task = load_folder(parity)
    assert (task.name, task.folder, task.split_seed) == ("parity", parity, None)
    assert (len(task.seed), len(task.validation), len(task.load_test())) == (4, 20, 10)
    assert task.seed[1] == Example("Is 1 even or odd?", "odd")
    assert task.answer.options("") == ("even", "odd")


def test_targets_become_canonical(parity: Path) -> None:
    append(parity, "seed.jsonl", '{"input": "Is 99 even or odd?", "target": " ODD. "}')
    assert load_folder(parity).seed[-1].target == "odd"


@pytest.mark.parametrize(
    ("line", "where", "hint"),
    [
        ('{"input": "x", "target": "evn"}', "seed.jsonl:5: target 'evn' is not one of even, odd", "'even'"),
        ('{"input": "x", "target": "even"', "seed.jsonl:5: not JSON", "one object a line"),
        ("[1, 2]", "seed.jsonl:5: not an object", ""),
        ("[" * 99999, "seed.jsonl:5: not JSON", ""),
        ('{"input": "x \\ud83d", "target": "even"}', "seed.jsonl:5: holds half of a character", ""),
        ('{"input": "x", "target": "<ans>even</ans>"}', "seed.jsonl:5: target '<ans>even</ans>' holds <ans>", ""),
        ('{"input": "x", "target": NaN}', "seed.jsonl:5: 'target' must be a string", ""),
        ('{"input": "x", "target": ' + "9" * 5000 + "}", "seed.jsonl:5: not JSON", ""),
        ('{"input": "x", "targt": "even"}', "seed.jsonl:5: no 'target'", "It has: input, targt."),
        ('{"input": "x", "target": 4}', "seed.jsonl:5: 'target' must be a string", ""),
        ('{"input": " ", "target": "even"}', "seed.jsonl:5: 'input' must be a string", ""),
        ('{"input": "x", "target": "even", "inputs": "y"}', "seed.jsonl:5: unknown key 'inputs'", "'input'"),
        ('{"input": "is 1 EVEN  or odd?", "target": "odd"}', "seed.jsonl:5: the same input as seed.js", ""),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(parity: Path, line: str, where: str, hint: str) -> None:
    append(parity, "seed.jsonl", line)
    with pytest.raises(InputError) as caught:
        load_folder(parity)
    assert caught.value.message.startswith(where)
    assert hint.lower() in caught.value.hint.lower()
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("split", "n_before"), [("seed", 4), ("validation", 24)])
def test_splits_that_overlap_are_rejected(parity: Path, split: str, n_before: int) -> None:
    append(parity, "test.jsonl", f'{{"input": "is {n_before - 1}   even or ODD?", "target": "odd"}}')
    with pytest.raises(InputError, match=rf"test.jsonl:11: the same input as {split}.jsonl:"):
        load_folder(parity)


def test_a_validation_set_of_3_rows_is_rejected(parity: Path, write_jsonl: Write) -> None:
    write_jsonl(parity / "validation.jsonl", [row(4), row(6), row(8)])
    with pytest.raises(InputError, match=r"validation.jsonl: 3 rows, at least 20 are needed"):
        load_folder(parity)


def test_letters_must_be_among_the_options(parity: Path, write_jsonl: Write) -> None:
    edit(parity, 'choices = ["even", "odd"]\n', "")
    rows = [{"input": f"{n}?\n(A) even\n(B) odd", "target": "(A)"} for n in range(24)]
    write_jsonl(parity / "validation.jsonl", rows[4:])
    write_jsonl(parity / "test.jsonl", [{"input": "9", "target": "(A)"}])
    write_jsonl(parity / "seed.jsonl", [*rows[:3], rows[3] | {"target": "c"}])
    _, problems = read_folder(parity)
    assert [str(problem) for problem in problems] == [
        "seed.jsonl:4: target (C) is not among the options (A) to (B)",
        "test.jsonl:1: the input lists no options",
    ]


@pytest.mark.parametrize(
    ("old", "new", "where", "hint"),
    [
        ("description =", "descripton =", "task.toml: description: Field required", ""),
        ("[answer]", "[answer]\nchoises = []", "task.toml: unknown key 'answer.choises'", "'choices'"),
        ("name =", "nane = 1\nname =", "task.toml: unknown key 'nane'", "'name'"),
        ('"choice"', '"choise"', "task.toml: answer.kind: Input should be", ""),
        ('["even", "odd"]', '["even", "even "]', "task.toml: answer.choices: two choices are the same", ""),
        ("[answer]", "[answer]\nexact = true", "task.toml: answer: exact goes with kind", ""),
        ("name =", "x = " + "[" * 9000 + "]" * 9000 + "\nname =", "task.toml: not TOML", ""),
        ("name =", "x = " + "9" * 9000 + "\nname =", "task.toml: not TOML", ""),
        ('"parity"', '"Parity!"', "task.toml: name: String should match", ""),
        ("name =", "name", "task.toml: not TOML", ""),
        ("Say whether a number is even or odd.", " ", "task.toml: description: is empty", "Two or three"),
        (', "Halve the number."', "", "task.toml: techniques: at least two prompts", "--teacher"),
        ('"Halve the number."', '" "', "task.toml: techniques: at least two prompts", "--teacher"),
    ],
)
def test_a_bad_task_file_is_named_by_key(parity: Path, old: str, new: str, where: str, hint: str) -> None:
    edit(parity, old, new)
    with pytest.raises(InputError) as caught:
        load_folder(parity)
    assert caught.value.message.startswith(where)
    assert hint in caught.value.hint


@pytest.mark.parametrize("file", ["task.toml", "seed.jsonl", "validation.jsonl", "test.jsonl"])
def test_a_missing_file_is_named(parity: Path, file: str) -> None:
    (parity / file).unlink()
    with pytest.raises(InputError, match=f"{file}: this file is missing"):
        load_folder(parity)


@pytest.mark.parametrize("file", ["task.toml", "seed.jsonl"])
def test_a_byte_order_mark_is_fine_and_another_encoding_is_named(parity: Path, file: str) -> None:
    before, text = load_folder(parity).sha256, (parity / file).read_text(encoding="utf-8")
    (parity / file).write_text(text, encoding="utf-8-sig")
    assert load_folder(parity).sha256 == before
    for data in (text.encode("utf-16"), b"a\n\xff\n"):
        (parity / file).write_bytes(data)
        with pytest.raises(InputError, match=rf"{file}.*not UTF-8"):
            load_folder(parity)


def test_every_problem_is_listed_and_the_error_counts_them(parity: Path) -> None:
    append(parity, "seed.jsonl", "nonsense")
    append(parity, "validation.jsonl", '{"input": "x", "target": "both"}')
    (parity / "test.jsonl").unlink()
    task, problems = read_folder(parity)
    assert task is None
    assert [problem.where for problem in problems] == ["seed.jsonl:5", "validation.jsonl:21", "test.jsonl"]
    with pytest.raises(InputError) as caught:
        load_folder(parity)
    assert "2 more: `arte-edge tasks check" in caught.value.hint


def test_a_line_separator_inside_a_string_does_not_move_the_line_numbers(parity: Path) -> None:
    append(parity, "seed.jsonl", '{"input": "a\u2028b", "target": "odd"}')
    append(parity, "seed.jsonl", '{"input": "c", "target": "neither"}')
    with pytest.raises(InputError, match=r"seed.jsonl:6: target 'neither'"):
        load_folder(parity)


def test_a_task_may_lack_techniques_that_a_teacher_proposes(parity: Path) -> None:
    edit(parity, '["Look at the last digit.", "Halve the number."]', "[]")
    assert load_folder(parity, techniques_required=False).techniques == ()


FEW_SHOT = """
[[worked]]
input = "Is 1 even or odd?"
reasoning = "Its last digit is odd."
target = "odd"
"""


def test_few_shot_examples_load_and_are_part_of_the_identity(parity: Path) -> None:
    before = load_folder(parity).sha256
    append(parity, "task.toml", FEW_SHOT)
    task = load_folder(parity)
    assert [example.reasoning for example in task.worked] == ["Its last digit is odd."]
    assert task.sha256 != before


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("Is 1 even", "Is 7 even", "task.toml: worked 1: the same input as validation.jsonl:4"),
        ("Is 1 even", "Is 25 even", "task.toml: worked 1: the same input as test.jsonl:2"),
        ('target = "odd"', 'target = "no"', "task.toml: worked 1: target 'no' is not one of even, odd"),
        ('"Its last digit is odd."', '" "', "task.toml: worked 1: reasoning is empty"),
        ("reasoning =", "resoning =", "task.toml: worked.0.reasoning: Field required"),
    ],
)
def test_a_few_shot_example_of_another_split_or_with_an_error_is_rejected(
    parity: Path, old: str, new: str, where: str
) -> None:
    append(parity, "task.toml", FEW_SHOT.replace(old, new))
    with pytest.raises(InputError) as caught:
        load_folder(parity)
    assert caught.value.message == where


SLOTS = {"type": "object", "properties": {"a": {"type": "string"}, "n": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture
def slots(parity: Path, write_jsonl: Write) -> Path:
    """A valid folder of a JSON task: targets as objects, and as texts."""
    text = (parity / "task.toml").read_text(encoding="utf-8")
    head = text.partition("[answer]")[0]
    (parity / "task.toml").write_text(f'{head}[answer]\nkind = "json"\nschema = "s.json"\n', encoding="utf-8")
    (parity / "s.json").write_text(json.dumps(SLOTS), encoding="utf-8")
    for split, start in (("seed", 0), ("validation", 20), ("test", 40)):
        targets: list[object] = [
            {"n": n, "a": f"v{n}"} if n % 2 else f'{{"a": "v{n}"}}' for n in range(start, start + 20)
        ]
        write_jsonl(parity / f"{split}.jsonl", [{"input": f"i{split}{n}", "target": t} for n, t in enumerate(targets)])
    return parity


def test_json_targets_are_read_as_objects_or_texts_into_the_form_that_a_student_writes(slots: Path) -> None:
    task = load_folder(slots)
    assert [row.target for row in task.seed[:2]] == ['{"a":"v0"}', '{"a":"v1","n":1}']
    assert task.load_test()[1].target == '{"a":"v41","n":41}'


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ('{"n": 1}', "'a' is a required property"),
        ('{"a": "x", "n": "y"}', "n: 'y' is not of type 'integer'"),
        ('{"a": NaN}', "NaN is not a number of JSON"),
        ('"{"', "does not fit the schema: Expecting"),
        ("[]", "'target' must be a string"),
    ],
)
def test_a_json_target_that_does_not_fit_is_named_with_its_line(slots: Path, target: str, message: str) -> None:
    append(slots, "seed.jsonl", f'{{"input": "new", "target": {target}}}')
    _, problems = read_folder(slots)
    assert [problem.where for problem in problems] == ["seed.jsonl:21"]
    assert message in problems[0].what


@pytest.mark.parametrize(
    ("line", "where", "message"),
    [
        ('schema = "none.json"', "none.json", "missing"),
        ('schema = "bad.json"', "bad.json", "Expecting"),
        ('schema = "remote.json"', "remote.json", "nothing is fetched"),
        ('schema = "../s.json"', "task.toml: answer.schema", "beside task.toml"),
        ("schema = 3", "task.toml: answer.schema", "beside task.toml"),
        ('tools = "s.json"', "s.json", "tools are a list"),
        ('schema = "s.json"\ntools = "s.json"', "task.toml: answer.schema", "exclude each other"),
        ("", "task.toml", 'needs schema = "answer.schema.json"'),
    ],
)
def test_a_schema_that_cannot_be_used_is_named_with_its_file(slots: Path, line: str, where: str, message: str) -> None:
    (slots / "bad.json").write_text("{", encoding="utf-8")
    (slots / "remote.json").write_text('{"$ref": "https://example.org/x"}', encoding="utf-8")
    edit(slots, 'schema = "s.json"', line)
    _, problems = read_folder(slots)
    assert [problem.where for problem in problems] == [where]
    assert message in problems[0].what


def test_tools_give_the_schema_of_calls(slots: Path, write_jsonl: Write) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": SLOTS}}]
    (slots / "tools.json").write_text(json.dumps(tools), encoding="utf-8")
    edit(slots, 'schema = "s.json"', 'tools = "tools.json"')
    for split in SPLITS:
        call = {"arguments": {"a": "x"}, "name": "add"}
        write_jsonl(slots / f"{split}.jsonl", [{"input": f"i{split}{n}", "target": call} for n in range(20)])
    assert load_folder(slots).seed[0].target == '{"name":"add","arguments":{"a":"x"}}'


@pytest.mark.parametrize("text", ["Say {{ x }} or {% if y %}.", "{#", "'''\n\\", "long " * 2000], ids=range(4))
def test_any_description_loads_and_is_the_instruction(parity: Path, text: str) -> None:
    edit(parity, '"Say whether a number is even or odd."', json.dumps(text))
    task = load_folder(parity)
    assert task.description == text.strip()
    template = with_instruction(tiny.TEMPLATE, instruction(task, "answer"), {})
    model = SimpleNamespace(chat_template=template, special_tokens={"bos_token": ""})
    asked = render(model, [{"role": "user", "content": "Is 2 even?"}])
    assert f"<|im_start|>system\n{text.strip()}\n" in asked


@pytest.mark.parametrize("labels", [("C", "C++", "C#"), ("one\nline", "one"), ("a\nb", "a", "a\n b")])
def test_labels_may_begin_alike_and_hold_line_breaks(parity: Path, labels: tuple[str, ...], write_jsonl: Write) -> None:
    edit(parity, '["even", "odd"]', json.dumps(labels))
    for split in SPLITS:
        rows = [{"input": f"{split} {n}", "target": labels[n % len(labels)]} for n in range(21)]
        write_jsonl(parity / f"{split}.jsonl", rows)
    task = load_folder(parity)
    for form in FORMS:
        how = Asking.of(task, form, len)
        assert [how.read(how.completion(row.target)) for row in task.seed] == [row.target for row in task.seed]
