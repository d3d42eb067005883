"""From TOML and ``--set`` to a run, with errors that name the key."""

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import arte_edge
from arte_edge import catalog
from arte_edge.distill.config import RunConfig, build, differences, dump_toml, load_toml, parse_set, short_name
from arte_edge.distill.validate_config import find_problems
from arte_edge.errors import InputError


def test_every_problem_is_named_at_once_an_unknown_key_with_the_nearest() -> None:
    tables = {"seed": -1, "aling": {}, "teacher": {"model": "m", "shot": 2}}
    with pytest.raises(InputError) as caught:
        build("run.toml", tables | {"elicit": {"rouge": 2.0, "questons": 9}})
    assert caught.value.message.startswith("run.toml: ")
    unknown = {"elicit.questons": "questions", "aling": "align", "teacher.shot": "shots"}
    for part in ("seed: ", "elicit.rouge: ", *(f"unknown key '{key}'" for key in unknown)):
        assert part in caught.value.message
    assert all(f"Did you mean '{nearest}'?" in caught.value.hint for nearest in unknown.values())


@pytest.mark.parametrize(
    ("tables", "key"),
    [
        ({"evaluate": {"shots": []}}, "evaluate.shots"),
        ({"calibrate": {"shots": []}}, "calibrate.shots"),
        ({"calibrate": {"shots": [1, 1]}}, "calibrate.shots: a number of shots is listed twice"),
        ({"evaluate": {"shots": [-1]}}, "evaluate.shots.0"),
        ({"align": {"learning_rate": float("inf")}}, "align.learning_rate"),
        ({"tune": {"epochs": 1e9}}, "tune.epochs"),
        ({"deploy": {"max_answer_seconds": float("nan")}}, "deploy.max_answer_seconds"),
        ({"seed": 2**31}, "seed"),
        ({"student": {"model": ""}}, "student.model"),
        ({"calibrate": {"models": [""]}}, "calibrate.models.0"),
    ],
)
def test_what_would_end_a_run_half_way_is_refused_at_the_start(tables: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        build("run.toml", tables)
    assert caught.value.message.startswith(f"run.toml: {key}")


def test_an_alignment_without_pairs_is_refused() -> None:
    no_pairs = {"align": {"question_pairs": 0, "rationale_pairs": 0}}
    with pytest.raises(InputError, match='data = "arte" needs question_pairs or rationale_pairs'):
        build("run.toml", no_pairs)
    with pytest.raises(InputError, match="needs question_pairs"):
        build("run.toml", {"data": "question-only", "align": {"question_pairs": 0}})
    assert not build("run.toml", no_pairs, {"data": "original-teacher"}).aligned


@pytest.mark.parametrize("ref", ["openai:m@https://me:s3cret@host/v1", "openai:m@https://host/v1?k=s3cret"])
def test_a_secret_in_a_servers_address_is_refused_before_anything_stores_or_shows_it(ref: str) -> None:
    for tables in ({"teacher": {"model": ref}}, {"calibrate": {"models": [ref]}}):
        with pytest.raises(InputError, match="ARTE_EDGE_API_KEY") as caught:
            build("run.toml", tables)
        assert "s3cret" not in f"{caught.value} {find_problems(tables)}"


PACKAGE = Path(arte_edge.__file__).parent
_KEY = re.compile(rf"(?<![\w./{{])({'|'.join(RunConfig.model_fields)})\.([a-z_]+)(?!\w|\.[a-z]|\()")
_FILES = {"csv", "toml", "json", "jsonl", "py", "md"}


def test_every_key_that_a_message_names_exists() -> None:
    named: dict[tuple[str, ...], str] = {}
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts = (node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings)
        for text in filter(lambda text: isinstance(text, str), texts):
            named |= {found.groups(): path.name for found in _KEY.finditer(text)}
    fields = RunConfig.model_fields
    tables = {name: getattr(fields[name].annotation, "model_fields", {}) for name in fields}
    wrong = {key: where for key, where in named.items() if key[1] not in {*_FILES, *tables[key[0]]}}
    assert wrong == {} and len(named) > 20


@pytest.mark.parametrize(
    ("text", "tables"),
    [
        ("align.learning_rate=1e-6", {"align": {"learning_rate": 1e-6}}),
        ("seed=3", {"seed": 3}),
        ("data=question-only", {"data": "question-only"}),
        ('data="random"', {"data": "random"}),
        ("name=", {"name": ""}),
        ("name = a=b", {"name": "a=b"}),
        ("calibrate.shots=[0, 2]", {"calibrate": {"shots": [0, 2]}}),
        ("prefer.bias-free=false", {"prefer": {"bias_free": False}}),
        ("teacher.model=openai:m@http://h:1/v1", {"teacher": {"model": "openai:m@http://h:1/v1"}}),
    ],
)
def test_set_reads_toml_values_and_bare_words(text: str, tables: dict[str, Any]) -> None:
    assert parse_set([text]) == tables


def test_a_later_layer_or_set_wins_and_leaves_its_neighbours() -> None:
    assignments = ["align.beta=0.5", "align.epochs=3", "align.beta=0.2"]
    assert parse_set(assignments) == {"align": {"beta": 0.2, "epochs": 3}}
    config = build("x", {"align": {"beta": 0.5, "epochs": 3}}, {"align": {"beta": 0.2}}, {})
    assert (config.align.beta, config.align.epochs) == (0.2, 3)
    assert parse_set(["task=home", "task.ref=home"]) == {"task": {"ref": "home"}}
    with pytest.raises(InputError, match="task: "):
        build("--set", parse_set(["task.ref=home", "task=home"]))


@pytest.mark.parametrize("text", ["seed", "=3", ".seed=3", "align..beta=3", "align.=3"])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not of the form key=value"):
        parse_set([text])


def test_students_of_one_quantization_have_folders_of_their_own() -> None:
    refs = ("org/one:Q4_K_M", "org/two:Q4_K_M", "org/two@v1:Q4_K_M", "dir/Three.gguf", "openai:a/four@http://x:1/v1")
    assert [short_name(ref) for ref in refs] == ["one-q4_k_m", "two-q4_k_m", "two", "three", "four"]


def test_differences_are_dotted_keys() -> None:
    a = {"seed": 1, "align": {"beta": 0.1, "epochs": 1}, "gone": {"x": 1}}
    b = {"seed": 1, "align": {"beta": 0.2, "epochs": 1}, "new": 2}
    assert differences(a, b) == ["align.beta", "gone", "new"]
    assert differences(a, a) == []


@settings(deadline=None, max_examples=50)
@given(
    name=st.text(max_size=15),
    shots=st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True),
    rate=st.floats(1e-12, 10),
    bbh=st.none() | st.text(max_size=10),
)
def test_a_dumped_run_reads_back_the_same(name: str, shots: list[int], rate: float, bbh: str | None) -> None:
    config = RunConfig.model_validate(
        {
            "name": name,
            "calibrate": {"shots": shots},
            "align": {"learning_rate": rate},
            "task": {"ref": "t", "bbh": bbh},
        }
    )
    tables = tomllib.loads(dump_toml(config))
    assert build("run.toml", tables) == config
    assert differences(tables, tomllib.loads(dump_toml(build("run.toml", tables)))) == []


@pytest.mark.parametrize(
    ("data", "why"), [(b"seed = 1\nalign = = 2\n", "TOML: .*line 2"), (b'name = "\xe9"\n', "TOML")]
)
def test_a_file_that_is_missing_or_no_toml_is_an_input_error(data: bytes, why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml: "):
        load_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(data)
    with pytest.raises(InputError, match=rf"bad\.toml: .*{why}"):
        load_toml(tmp_path / "bad.toml")


@pytest.mark.parametrize("name", catalog.names("presets"))
def test_every_shipped_preset_is_a_run(name: str) -> None:
    assert build(name, load_toml(catalog.find("presets", name)))


def test_servers_of_known_weights_are_addresses_each_once_and_hold_no_secret() -> None:
    one = build("run.toml", {"teacher": {"model": "m", "server": "http://A:8000"}})
    assert one.teacher.server == ("http://a:8000/v1",) and one.teacher.on_server
    two = ["http://a:8000/v1/", "http://b:8000/v1", "http://a:8000"]
    assert build("run.toml", {"teacher": {"model": "m", "server": two}}).teacher.server == (
        "http://a:8000/v1",
        "http://b:8000/v1",
    )
    own = build("run.toml", {"teacher": {"model": "m", "server": "vllm"}}).teacher
    assert own.starts_vllm and own.addresses == () and not own.on_server and not one.teacher.starts_vllm
    with pytest.raises(InputError, match=r"teacher\.server: .*'vllm' is not a server address"):
        build("run.toml", {"teacher": {"model": "m", "server": ["vllm", "http://b:8000"]}})
    with pytest.raises(InputError, match=r"teacher\.server.*no password") as caught:
        build("run.toml", {"teacher": {"model": "m", "server": "http://me:s3cret@b/v1"}})
    assert "s3cret" not in str(caught.value)
