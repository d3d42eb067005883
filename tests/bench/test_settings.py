"""Lists are read as llama-bench reads them and multiply out; suites are read strictly."""

from pathlib import Path

import pytest
from tiny import Patch, facts

from arte_edge import catalog
from arte_edge.bench.settings import (
    BenchSettings,
    Request,
    cases,
    decode_threads,
    load_suite,
    make_settings,
    parse_counts,
)
from arte_edge.errors import InputError


def test_lists_and_ranges() -> None:
    lists = {"512": (512,), "1,2,4": (1, 2, 4), "1-4": (1, 2, 3, 4), "1-9+4": (1, 5, 9), "3-2": (3,)}
    lists |= {"128-1024*2,7": (128, 256, 512, 1024, 7), "auto,2": (0, 2)}
    assert {text: parse_counts(text, threads=True) for text in lists} == lists


@pytest.mark.parametrize(
    ("key", "text"), [("threads", "0"), ("n_prompt", "auto"), ("n_prompt", "1;2"), ("n_gen", ""), ("n_gen", "1-9999")]
)
def test_what_is_no_list_is_the_users_error(key: str, text: str) -> None:
    with pytest.raises(InputError, match=key):
        make_settings("bench", {key: text})


def test_lists_multiply_in_the_order_of_llama_bench() -> None:
    settings = BenchSettings(n_prompt=(8, 0), n_gen=(4,), n_depth=(0, 16), threads=(1, 2))
    made = list(cases(Path("m.gguf"), settings, facts()))
    tests = ("pp8", "tg4", "pp8@d16", "tg4@d16")
    assert [(case.threads, case.test) for case in made] == [(t, test) for t in (1, 2) for test in tests]
    assert [case.context_tokens for case in made[:4]] == [8, 4, 24, 20]


def test_depth_and_sustained_settings_of_a_case() -> None:
    made = list(cases(Path("m.gguf"), BenchSettings(sustained_s=60), facts()))
    assert [case.sustained_s for case in made] == [0, 60]
    assert BenchSettings().context_tokens == 512
    assert BenchSettings(n_prompt=(0,), n_gen=(64, 900), n_depth=(0, 100)).context_tokens == 1000


def test_a_request_is_the_same_after_json() -> None:
    lists = {"n_prompt": "64,128", "n_gen": (0,), "threads": "auto,4", "type_k": "q8_0"}
    settings = BenchSettings(**lists, warmup=False, power_watts=4.5)
    request = Request(source="a.gguf", settings=settings, task="parity", speed=False)
    assert Request.model_validate_json(request.model_dump_json()) == request
    assert (settings.n_prompt, settings.threads, settings.type_k) == ((64, 128), (0, 4), ("q8_0",))


def test_threads_if_nobody_says(monkeypatch: Patch) -> None:
    monkeypatch.delenv("ARTE_EDGE_THREADS", raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 8 if logical else 4)
    many = facts(cores=8)
    assert decode_threads(many) == 4, "two threads of a core share its arithmetic"
    assert decode_threads(facts(cores=1)) == 1, "no more than this process may use"
    monkeypatch.setenv("ARTE_EDGE_THREADS", "3")
    assert decode_threads(many) == 3
    monkeypatch.setenv("ARTE_EDGE_THREADS", "many")
    with pytest.raises(InputError, match="ARTE_EDGE_THREADS"):
        decode_threads(many)


def test_every_shipped_suite_loads_and_the_default_is_llama_benchs() -> None:
    names = catalog.names("suites")
    assert {"default", "quick", "sustained"} <= set(names)
    made = {name: make_settings(name, load_suite(name)) for name in names}
    assert made["default"] == BenchSettings()
    default = made["default"]
    counts = (default.n_prompt, default.n_gen, default.n_depth, default.repetitions)
    assert counts == ((512,), (128,), (0,), 5)
    assert made["sustained"].sustained_s == 600


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[bench]\nn_promt = [1]", "unknown key 'n_promt'"),
        ("[bench]\nrepetitions = 0", "repetitions"),
        ("[bench]\nn_gen = []", "n_gen"),
        ("[speed]", "unknown table 'speed'"),
        ("bench = 3", "not a table"),
        ("[bench", "not TOML"),
    ],
)
def test_a_wrong_suite_is_refused_with_file_and_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        load_suite(str(path))
    assert "mine.toml" in caught.value.message
    if "promt" in text:
        assert "n_prompt" in caught.value.hint


def test_what_is_given_goes_before_the_suite(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[bench]\nn_prompt = [64]\nrepetitions = 2\nthreads = ["auto", 2]')
    made = make_settings("here", load_suite(str(path)), {"repetitions": 3})
    assert (made.n_prompt, made.repetitions, made.threads) == ((64,), 3, (0, 2))
