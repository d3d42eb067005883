"""Servers that run known weights: tokens instead of text, weights checked, adapters loaded, the load shared."""

import re
import shutil
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Patch, edited, save_adapter

from arte_edge.console import Reporter
from arte_edge.distill.config import RunConfig
from arte_edge.distill.run_context import RunContext
from arte_edge.errors import EngineError, InputError
from arte_edge.runtimes.completion import Request, Sampling
from arte_edge.runtimes.openai.client import CallFailed, RetryPolicy
from arte_edge.runtimes.openai.served import _MOST_NATS, ServedEngine, ServerFolder
from arte_edge.runtimes.transformers.model import adapter_sha256
from arte_edge.store import read_jsonl
from arte_edge.tasks.loaders import load_task

pytest.importorskip("torch")
GREEDY = Sampling(max_tokens=6)
# transformers changes its own classes while it loads: two threads at once leave them changed for good.
_LOADING = threading.Lock()


@dataclass
class Vllm:
    """The routes of vLLM's server that are used, with its statuses and texts, over real tiny weights.

    `lora` is "on", "off" (no --enable-lora) or "no route" (no VLLM_ALLOW_RUNTIME_LORA_UPDATING).
    """

    checkpoint: Path
    name: str = "teacher"
    lora: str = "on"
    logprobs: bool = True
    delay_s: float = 0.0
    dead_after: int = 10**9  # completions, after which it answers nothing any more
    broken_after: int = 10**9  # completions, after which each ends with 500, while models are still listed
    poison: str = ""  # a prompt with this in it ends with 500
    stuck: bool = False  # it unloads nothing
    failed: list[str] = field(default_factory=list)  # prompts of the completions that ended with 500
    wrote: list[str] = field(default_factory=list)  # models of the completions that wrote, not scored
    grammars: list[Any] = field(default_factory=list)  # and their grammars
    loaded: dict[str, str] = field(default_factory=dict)
    engines: dict[str, Any] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    def __call__(self, seen: Any) -> tuple[int, Any]:
        self._live()
        path, body = seen.path.removeprefix("/v1/"), seen.body
        if path == "models":
            base = {"id": self.name, "owned_by": "vllm", "parent": None}
            more = {"owned_by": "vllm", "parent": self.name}
            return 200, {"data": [base, *({"id": n, "root": at} | more for n, at in self.loaded.items())]}
        if path.endswith("lora_adapter"):
            return self._adapters(path, body)
        if body["model"] not in (self.name, *self.loaded):
            return error(404, f"The model `{body['model']}` does not exist.")
        time.sleep(self.delay_s)
        with self.lock:
            self._live()
            prompt = self.engine(self.name).text.decode(body["prompt"], [])
            if len(self.wrote) >= self.broken_after or (self.poison and self.poison in prompt):
                self.failed.append(prompt)
                return error(500, "EngineCore encountered an issue.")
            return 200, self._completion(body)

    def _live(self) -> None:
        if len(self.wrote) >= self.dead_after:
            raise ConnectionError("gone")  # the connection ends without an answer

    def _adapters(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["lora_name"]
        if self.lora == "no route":
            return 404, {"detail": "Not Found"}
        if path.startswith("unload"):
            if self.stuck:
                return error(500, "EngineCore encountered an issue.")
            known = self.loaded.pop(name, "")
            return (200, b"Success: removed.") if known else error(404, "cannot be found.")
        if name in self.loaded:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        if self.lora == "off":
            return error(500, "Worker failed with error 'LoRA is not enabled. Use --enable-lora to enable LoRA.'")
        if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
            return error(404, f"Loading lora {name} failed: No adapter found for {body['lora_path']}")
        self.loaded[name] = body["lora_path"]
        return 200, b"Success: added."

    def engine(self, model: str) -> Any:
        from arte_edge.runtimes.transformers.model import TransformersEngine

        path = self.loaded.get(model)
        key = path or "base"
        if key not in self.engines:
            adapter = Path(path) if path else None
            with _LOADING:
                self.engines[key] = TransformersEngine(self.checkpoint, sha256="", adapter=adapter, device="cpu")
        return self.engines[key]

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, engine = body["prompt"], self.engine(body["model"])
        logits = engine.forward.extend(engine.forward.empty(), [ids])[0].log_softmax(-1)
        choice: dict[str, Any] = {"text": "", "finish_reason": "length"}
        if "prompt_logprobs" in body:
            rows = [{str(t): {"logprob": float(logits[i, t])}} for i, t in enumerate(ids[1:])]
            choice["prompt_logprobs"] = [None, *rows] if self.logprobs else None
        elif "logprob_token_ids" in body:
            top = {f"token_id:{t}": float(logits[-1, t]) for t in body["logprob_token_ids"]}
            choice["logprobs"] = {"top_logprobs": [top]}
        else:
            self.wrote.append(body["model"])
            self.grammars.append(body.get("structured_outputs"))
            prompt = engine.text.decode(ids, [])
            (row,) = engine.complete([Request(prompt)], Sampling(max_tokens=body["max_tokens"]))
            choice["text"] = row.text
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": 1}}


def error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "code": status}}


@pytest.fixture(scope="module")
def adapter(llama_folder: Path, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(llama_folder, folder, [3, 4, 5])
    return folder


@pytest.fixture
def served(serve: Any, llama_folder: Path, tmp_path: Path, model_cache: Path) -> Any:
    """Start servers with these settings each and open the engine over them; return it and the servers."""

    def start(*each: dict[str, Any], urls: Any = (), **settings: Any) -> tuple[ServedEngine, list[Vllm]]:
        servers = [Vllm(**{"checkpoint": llama_folder} | more) for more in each or ({},)]
        fronts = [serve(server) for server in servers]
        known = {"retry": RetryPolicy(attempts=2, base_s=0.01), "parallel": 2, "timeout_s": 20.0}
        folder = ServerFolder(tmp_path / "adapters", str(tmp_path / "adapters"))
        addresses = [*(front.url for front in fronts), *urls]
        return ServedEngine(addresses, llama_folder, "5" * 64, folder, **known | settings), servers

    return start


PROMPTS = [Request(f"the {animal} sat") for animal in ("cat", "mat", "question", "answer", "three", "two")]


def test_texts_and_choices_are_those_of_our_own_copy(served: Any, llama: Any) -> None:
    engine, (server,) = served()
    ours = llama.complete(PROMPTS, GREEDY)
    assert [row.text for row in engine.complete(PROMPTS, GREEDY)] == [row.text for row in ours]
    prompts, choices = ["is it ", "the cat"], [["True or", "True and", "False"], [" sat", " one"]]
    got, wanted = engine.choose_each(prompts, choices), llama.choose_each(prompts, choices)
    for one, other in zip(got, wanted, strict=True):
        assert np.allclose(one, other, atol=1e-4)
    assert engine.chat_template == llama.chat_template and engine.special_tokens == llama.special_tokens
    grammar = Sampling(max_tokens=2, grammar='root ::= "a"')
    assert engine.supports_grammar and engine.complete(PROMPTS[:1], grammar)[0].error == ""
    assert server.grammars == [None] * len(PROMPTS) + [{"grammar": grammar.grammar}]
    assert set(server.wrote) == {"teacher"} and engine.count_tokens("the cat") == llama.count_tokens("the cat")


def test_an_adapter_is_loaded_under_its_hash_writes_and_is_unloaded(served: Any, adapter: Path, llama: Any) -> None:
    engine, (server,) = served(adapter=adapter)
    name = f"arte-edge-{engine.identity.adapter[:32]}"
    assert list(server.loaded) == [name] and server.loaded[name].endswith(name)
    assert engine.identity.key() == f"openai/{'5' * 64}//{engine.identity.adapter}"
    texts = [row.text for row in engine.complete(PROMPTS, GREEDY)]
    assert texts != [row.text for row in llama.complete(PROMPTS, GREEDY)]
    assert set(server.wrote) == {name}
    engine.close()
    assert server.loaded == {}


def test_an_adapter_that_is_loaded_already_is_used_and_unloaded_by_its_own_run(
    served: Any, adapter: Path, tmp_path: Path
) -> None:
    engine, (server,) = served(adapter=adapter)

    def again(folder: ServerFolder) -> None:
        once = RetryPolicy(attempts=1)
        other = ServedEngine(engine._urls, engine._checkpoint, "5" * 64, folder, adapter=adapter, retry=once)
        assert not any(row.error for row in other.complete(PROMPTS, GREEDY))
        other.close()

    again(ServerFolder.parse("", tmp_path / "another"))
    (path,) = server.loaded.values()
    assert Path(path).is_dir(), "of a run that goes on"
    again(engine._folder)  # as after a kill
    assert not server.loaded and not Path(path).exists()
    # Its own run finds it gone, and loads it again.
    assert not any(row.error for row in engine.complete(PROMPTS, GREEDY)) and server.loaded


def test_what_a_killed_run_left_is_unloaded_and_what_others_use_stays(
    served: Any, adapter: Path, tmp_path: Path
) -> None:
    engine, (server,) = served(adapter=adapter)
    (own,) = server.loaded
    here = tmp_path / "adapters"
    left = {name: str(here / name) for name in ("arte-edge-old", "users-own")}
    left["arte-edge-others"] = str(tmp_path / "another" / "arte-edge-others")
    for path in left.values():
        shutil.copytree(adapter, path)
    outside = "arte-edge-/../../run"  # a name that leads out of the folder
    shutil.copytree(adapter, tmp_path / "run")
    left[outside] = f"{here}/{outside}"
    server.loaded |= left
    # Also the engine of the original weights unloads it, and leaves the adapter of an engine that is open.
    ServedEngine(engine._urls, engine._checkpoint, "5" * 64, engine._folder).close()
    assert set(server.loaded) == {own, outside, "users-own", "arte-edge-others"}
    assert not Path(left["arte-edge-old"]).exists() and (here / own).is_dir() and (here / "users-own").is_dir()
    engine.close()
    assert set(server.loaded) == {outside, "users-own", "arte-edge-others"} and (tmp_path / "run").is_dir()


def test_an_adapter_is_unloaded_also_from_a_server_that_was_left_out(served: Any, adapter: Path) -> None:
    engine, (server, other) = served({}, {}, adapter=adapter)
    server.dead_after = 0
    assert not any(row.error for row in engine.complete(PROMPTS, GREEDY)) and len(engine.notes) == 1
    server.dead_after = 10**9
    (path,) = server.loaded.values()
    engine.close()
    assert not server.loaded and not other.loaded and not Path(path).exists() and len(engine.notes) == 1


def test_the_folder_of_an_adapter_that_stays_on_a_server_is_kept_and_noted(served: Any, adapter: Path) -> None:
    engine, (server, other) = served({"stuck": True}, {}, adapter=adapter)
    ((name, path),) = server.loaded.items()
    engine.close()
    assert server.loaded and not other.loaded and Path(path).is_dir()
    (note,) = engine.notes
    assert engine._urls[0] in note and name in note


def test_servers_share_the_rows_each_its_own_part(served: Any) -> None:
    engine, servers = served({"delay_s": 0.05}, {"delay_s": 0.05}, {"delay_s": 0.05})
    asked = [Request(f"{n:02d}") for n in range(18)]
    rows = engine.complete(asked, GREEDY)
    assert not any(row.error for row in rows) and len({row.text for row in rows}) > 1
    assert sum(len(server.wrote) for server in servers) == 18
    assert all(3 <= len(server.wrote) <= 9 for server in servers)
    assert engine.in_flight == 6


def test_a_server_that_dies_hands_its_rows_to_the_others_and_may_come_back(served: Any, adapter: Path) -> None:
    engine, (short, long) = served({"dead_after": 3, "delay_s": 0.02}, {"delay_s": 0.02}, adapter=adapter)
    asked = [Request(f"{n:02d}") for n in range(16)]
    rows = engine.complete(asked, GREEDY)
    assert not any(row.error for row in rows)
    assert len(short.wrote) == 3 and len(long.wrote) >= 13  # one more where an answer was lost on its way
    (note,) = engine.notes
    assert "is left out until it answers" in note
    short.dead_after, short.loaded = 10**9, {}  # started again: without the adapter
    rows = engine.complete(asked, GREEDY)
    assert not any(row.error for row in rows) and len(short.wrote) > 3 and short.loaded
    assert "answers again" in engine.notes[-1]


def test_a_server_that_fails_every_completion_is_left_out_and_costs_no_row(served: Any) -> None:
    engine, (broken, well) = served({"broken_after": 2}, {"delay_s": 0.02})
    rows = engine.complete([Request(f"{n:02d}") for n in range(40)], GREEDY)
    assert not any(row.error for row in rows)
    assert len(broken.wrote) == 2 and len(well.wrote) == 38
    assert len(set(broken.failed)) <= 10, "8 in a row, and what was on its way"
    (note,) = engine.notes
    assert engine._urls[0] in note and "EngineCore" in note
    # It lists its models, but does not pass the check: the next batch goes on without it, and with it once it is well.
    assert not any(row.error for row in engine.complete(PROMPTS, GREEDY)) and len(broken.wrote) == 2
    broken.broken_after = 10**9
    assert not any(row.error for row in engine.complete(PROMPTS, GREEDY)) and len(broken.wrote) > 2
    assert "answers again" in engine.notes[-1]


def test_where_every_server_fails_the_rows_say_that_none_is_left(served: Any) -> None:
    engine, servers = served({}, {})
    for server in servers:
        server.broken_after = 0
    rows = engine.complete([Request(f"{n:02d}") for n in range(24)], GREEDY)
    assert {row.fault for row in rows} == {"server"} and all("EngineCore" in row.error for row in rows)


def test_a_row_that_one_server_fails_on_is_sent_to_one_other(served: Any) -> None:
    engine, servers = served({"poison": "03"}, {}, {})
    asked = [Request(f"{n:02d}") for n in range(9)]
    rows = engine.complete(asked, GREEDY)
    assert not any(row.error for row in rows) and not engine.notes
    for server in servers:
        server.poison, server.failed = "03", []
    rows = engine.complete(asked, GREEDY)
    assert [row.fault for row in rows] == ["", "", "", "row", "", "", "", "", ""] and not engine.notes
    assert sorted(len(server.failed) for server in servers) == [0, 2, 2], "two attempts each"


def test_one_server_that_lost_its_adapter_gets_it_again(served: Any, adapter: Path) -> None:
    engine, (server,) = served(adapter=adapter)
    server.loaded.clear()
    assert not any(row.error for row in engine.complete(PROMPTS, GREEDY))
    assert set(server.wrote) == set(server.loaded)


def test_when_no_server_is_left_the_rows_say_so(served: Any) -> None:
    engine, _ = served({"dead_after": 2}, {"dead_after": 2})
    rows = engine.complete([Request(f"{n:02d}") for n in range(12)], GREEDY)
    assert 2 <= sum(not row.error for row in rows) <= 4
    assert {row.fault for row in rows if row.error} == {"server"}
    with pytest.raises(EngineError):
        engine.choose_each(["the cat"], [["a", "b"]])


def test_a_server_that_does_not_answer_is_left_out_and_none_is_an_error(served: Any, closed_port: int) -> None:
    gone = f"http://127.0.0.1:{closed_port}/v1"
    engine, _ = served({}, urls=[gone])
    assert gone in engine.notes[0]
    with pytest.raises(CallFailed, match=gone):
        served_nowhere(engine, gone)


def served_nowhere(like: ServedEngine, url: str) -> ServedEngine:
    return ServedEngine([url], like._checkpoint, "5" * 64, like._folder, retry=RetryPolicy(attempts=1))


@pytest.mark.parametrize(
    ("server", "settings", "message", "hint"),
    [
        ({}, {"name": "other"}, "serves no model named 'other'", "It lists teacher"),
        ({"logprobs": False}, {}, "does not give the log-probabilities", "openai:MODEL@URL"),
        ({"lora": "no route"}, {"aligns": True}, "no route /load_lora_adapter", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        ({"lora": "off"}, {"aligns": True}, "LoRA is not enabled", "--enable-lora"),
    ],
)
def test_what_is_wrong_with_a_server_is_said_before_anything_is_written(
    served: Any, server: dict[str, Any], settings: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        served(server, **settings)
    assert hint in caught.value.hint


def test_other_weights_under_the_same_name_are_refused(served: Any, llama_folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if name.endswith("down_proj.weight"))
        tensors[name] = -tensors[name]

    other = edited(llama_folder, tmp_path / "other", change)
    with pytest.raises(InputError, match=r"other weights than teacher\.model.*differ by \d") as caught:
        served({"checkpoint": other})
    assert str(llama_folder) in caught.value.hint


def test_a_close_relative_of_the_weights_is_noted(served: Any, llama_folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if name.endswith("down_proj.weight"))
        tensors[name] = tensors[name] * 0.9

    other = edited(llama_folder, tmp_path / "relative", change)
    engine, _ = served({"checkpoint": other})
    (note,) = engine.notes
    assert 0.1 < float(re.search(r"by (\d\.\d+) nats", note)[1]) < 0.2 and "fine-tuned" in note
    assert f"above {_MOST_NATS:g} nats" in (Path(__file__).parents[3] / "docs/runtimes.md").read_text("utf-8")


def test_the_folder_of_adapters_is_named_as_the_server_sees_it(served: Any, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "there").symlink_to(tmp_path / "here")
    folder = ServerFolder.parse(f"{tmp_path}/here:{tmp_path}/there/", tmp_path / "run")
    own = folder.here.name
    assert folder == ServerFolder(tmp_path / "here" / own, f"{tmp_path}/there/{own}")
    one, other = (ServerFolder.parse(str(tmp_path), tmp_path / name / "run") for name in ("a", "b"))
    assert one.here.parent == other.here.parent == tmp_path and one.here != other.here and one.there != other.there
    engine, (server,) = served()
    opened = ServedEngine(engine._urls, engine._checkpoint, "5" * 64, folder, adapter=adapter)
    assert all(path.startswith(folder.there) for path in server.loaded.values()) and server.loaded
    opened.close()
    with pytest.raises(InputError, match="finds no adapter in /nowhere/") as caught:
        nowhere = ServerFolder.parse(f"{tmp_path}/here:/nowhere", tmp_path)
        ServedEngine(engine._urls, engine._checkpoint, "5" * 64, nowhere, adapter=adapter)
    assert "teacher.server_folder" in caught.value.hint


def test_the_store_of_a_run_says_which_teacher_wrote_and_pays_for_nothing_twice(
    served: Any, llama_folder: Path, adapter: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("arte_edge.runtimes.openai.served.RetryPolicy", partial(RetryPolicy, base_s=0.01))
    engine, servers = served({"dead_after": 4}, {})
    tables = {"teacher": {"model": str(llama_folder), "server": list(engine._urls), "parallel": 2}}
    config = RunConfig.model_validate(tables | {"student": {"model": str(llama_folder)}})

    def write() -> tuple[list[str], list[str], RunContext]:
        run = RunContext(config, load_task("home_intents"), tmp_path / "run", Reporter(quiet=True))
        teacher, texts = config.teacher, []
        try:
            for each in (run.engine(teacher), run.engine_with(run.local(teacher), (adapter, "unused"), teacher)):
                texts.append([row.text for row in run.calls.complete(each, PROMPTS, GREEDY, "rows")])
        finally:
            run.close()
        return (*texts, run)

    original, aligned, run = write()
    assert original != aligned and run.calls.made == 2 * len(PROMPTS)
    assert sum(len(server.wrote) for server in servers) == 2 * len(PROMPTS)
    weights, lora = run.local(config.teacher).sha256, adapter_sha256(adapter)
    by = Counter(row["by"] for row in read_jsonl(tmp_path / "run" / "calls.jsonl"))
    assert by == {f"openai/{weights[:12]}/": 6, f"openai/{weights[:12]}/{lora[:12]}": 6}
    again = write()
    assert again[:2] == (original, aligned) and again[2].calls.made == 0
    assert sum(len(server.wrote) for server in servers) == 2 * len(PROMPTS)
    assert run.identity(config.teacher)[:2] == [weights, "server"] and config.teacher.on_server


def test_a_run_warns_of_an_adapter_that_stays_on_a_server(
    served: Any, llama_folder: Path, adapter: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    engine, _ = served({"stuck": True})
    teacher = {"model": str(llama_folder), "server": list(engine._urls), "server_folder": str(tmp_path)}
    config = RunConfig.model_validate({"teacher": teacher, "student": {"model": str(llama_folder)}})
    run = RunContext(config, load_task("home_intents"), tmp_path / "run", Reporter(quiet=True))
    warned: list[str] = []
    monkeypatch.setattr(run.reporter, "warn", warned.append)
    run.engine_with(run.local(config.teacher), (adapter, "unused"), config.teacher)
    run.close()
    assert len(warned) == 1 and "may still hold the adapter arte-edge-" in warned[0]
    assert list(tmp_path.glob("run-*/arte-edge-*"))
