"""A run of arte-edge, of this build or of an older one, timed stage by stage; and the clock that all sides share.

    python benchmarks/whole_run_stages.py JOB.json      # started by whole_run.py, in the environment of the build

The stage functions of the pipeline are wrapped; nothing of their work is changed. Imports, the conversion of the
models, the check and the calibration are before the first stage's clock, and engines are closed before it, so that
each side opens its models on the clock. Killed, the same job continues with the stage that it was in: the calls of an
unfinished stage are taken out of the run's store, and its folder is removed.

A row has the seconds of this process and its children (`cpu_s`), and the largest resident size that this process had
in the stage (`peak_rss_bytes`, Linux).
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STAGES = ("elicit", "prefer", "align", "tailor", "tune", "evaluate")
PACKAGES = ("torch", "transformers", "trl", "peft", "llama_cpp_python")
TEXTS = 32  # calls that the engines send together
# Where the pipeline of each build takes its stages from.
PLACES = {name: f"arte_edge.distill.stages.{name}" for name in ("elicit", "prefer", "align", "evaluate")}
PLACES |= dict.fromkeys(("tailor", "tune"), "arte_edge.distill.stages.tune")
OLDER_PLACES = dict.fromkeys(("elicit", "prefer", "tailor", "evaluate"), "arte_edge.distill.pipeline")
OLDER_PLACES |= {"align": "arte_edge.distill.align", "tune": "arte_edge.distill.tune"}


class Enough(Exception):
    """The last stage that is wanted has finished."""


class Clock:
    """Writes a row for each finished stage to ``rows.jsonl`` of a folder; stages that have one are known."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.folder = job, Path(job["folder"])
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / "rows.jsonl"
        self.rows = read_rows(self._path)
        self.n_call = self.n_token = 0
        self._began = (0.0, 0.0)

    def has(self, stage: str) -> bool:
        return any(row["stage"] == stage for row in self.rows)

    def begin(self) -> None:
        self.n_call = self.n_token = 0
        if (refs := Path("/proc/self/clear_refs")).exists():
            refs.write_text("5")  # the peak of the resident size counts from here
        self._began = time.perf_counter(), _cpu_s()

    def end(self, stage: str, **facts: Any) -> None:
        row = {key: self.job[key] for key in ("side", "repeat", "threads")} | {"stage": stage}
        row |= {"wall_s": round(time.perf_counter() - self._began[0], 3)}
        row |= {"cpu_s": round(_cpu_s() - self._began[1], 3), "peak_rss_bytes": _peak_rss_bytes()}
        row |= {"n_call": self.n_call, "tokens_written": self.n_token, **facts}
        row |= {"commit": self.job["commit"], "versions": _versions()}
        self.rows.append(row)
        append_row(self._path, row)
        print(json.dumps({key: row[key] for key in ("side", "stage", "wall_s", "cpu_s")}), flush=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file; a line that a kill has cut is no row, and none if there is no file."""
    text = path.read_text("utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row, on a line of its own after one that a kill has cut."""
    cut = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut + json.dumps(row) + "\n")


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _peak_rss_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


class Recorder:
    """Counts the calls of a run's models, each once, and keeps their prompts for the side without arte-edge."""

    def __init__(self, clock: Clock, calls: Any) -> None:
        self._clock, self._seen = clock, set[str]()
        self.inputs: list[dict[str, Any]] = []
        self.engine = ""
        complete, choose_each = calls.complete, calls.choose_each

        def completed(me: Any, engine: Any, requests: Any, sampling: Any, what: str, **options: Any) -> Any:
            found = complete(me, engine, requests, sampling, what, **options)
            how = sampling.as_dict()
            new = [
                pair
                for pair in zip(requests, found, strict=True)
                if self._is_new(engine.identity.key(), pair[0].prompt, pair[0].sample, how)
            ]
            clock.n_call += len(new)
            clock.n_token += sum(done.completion_tokens for _, done in new)
            self.engine = engine.identity.kind
            rows = [{"prompt": r.prompt, "sample": r.sample, "text": done.text} for r, done in new]
            self.inputs.append({"kind": "complete", "what": what, "sampling": how, "calls": rows})
            return found

        def chosen(me: Any, engine: Any, asks: Any, what: str) -> Any:
            found = choose_each(me, engine, asks, what)
            rows = [
                {"prompt": prompt, "choices": list(own)}
                for prompts, options in asks
                for prompt, own in zip(prompts, options, strict=True)
            ]
            clock.n_call += len(rows)
            self.engine = engine.identity.kind
            self.inputs.append({"kind": "choose", "what": what, "calls": rows})
            return found

        calls.complete, calls.choose_each = completed, chosen

    def _is_new(self, *call: Any) -> bool:
        key = json.dumps(call, sort_keys=True)
        new = key not in self._seen
        self._seen.add(key)
        return new


def losses(log: Path) -> dict[str, Any]:
    """Return the losses that a training wrote to its log, as facts of a row."""
    found = [row["loss"] for row in read_rows(log) if "loss" in row]
    return {"steps": len(found), "losses": [round(float(loss), 5) for loss in found]}


def main(job: dict[str, Any]) -> None:
    """Run the stages of `job` that have no row yet."""
    for name in ("torch", "transformers", "datasets", "peft", "trl", "llama_cpp"):
        importlib.import_module(name)
    older = find_spec("arte_edge.distill.stages") is None
    clock = Clock(job)
    run_folder = clock.folder / "run"
    _forget_unfinished(clock, run_folder)
    module = importlib.import_module(f"arte_edge.distill.{'calls' if older else 'cached_calls'}")
    recorder = Recorder(clock, module.Calls)
    orders: list[list[int]] = []
    if not older:
        for training in ("dpo", "sft"):
            _keep_order(importlib.import_module(f"arte_edge.distill.train.{training}"), orders)

    def wrap(name: str, place: str) -> None:
        owner = importlib.import_module(place)
        inner = getattr(owner, name)

        def stage(run: Any, *args: Any, **options: Any) -> Any:
            if clock.has(name):
                found = inner(run, *args, **options)
                if name == job["last"]:
                    raise Enough
                return found
            if name == STAGES[0]:
                (run.release if older else run.close_engines)()
            recorder.inputs.clear()
            orders.clear()
            clock.begin()
            found = inner(run, *args, **options)
            facts: dict[str, Any] = {"engine": recorder.engine} if recorder.inputs else {}
            if name in ("align", "tune"):
                made = run.folder / ("align/adapter" if name == "align" else "tune/student")
                facts |= losses(made / "log.jsonl")
                data = "pairs.jsonl" if name == "align" else "rows.jsonl"
                facts["rows"] = len(read_rows(run.folder / name / data))
            order = orders[-1] if orders else []
            append_row(clock.folder / "inputs.jsonl", {"stage": name, "calls": recorder.inputs, "order": order})
            clock.end(name, **facts, store_bytes=(run.folder / "calls.jsonl").stat().st_size)
            if name == job["last"]:
                raise Enough
            return found

        setattr(owner, name, stage)

    for name, place in (OLDER_PLACES if older else PLACES).items():
        wrap(name, place)
    _convert_first(older, clock.folder / "checkpoints.json")
    with suppress(Enough):
        (_run_older if older else _run)(job, run_folder)
    if older and job["texts"]:
        _compare_texts(job, run_folder)


def _convert_first(older: bool, out: Path) -> None:
    """Convert the models before the first stage, whichever stage would do it; write where their checkpoints are."""
    owner = importlib.import_module("arte_edge.distill.pipeline" if older else "arte_edge.distill.stages.check")
    inner = owner.check

    def check(run: Any, **options: Any) -> Any:
        made = [str(run.local(model).checkpoint()) for model in (run.config.teacher, run.config.student)]
        out.write_text(json.dumps(made) + "\n", "utf-8")
        return inner(run, **options)

    setattr(owner, inner.__name__, check)


def _keep_order(module: Any, orders: list[list[int]]) -> None:
    """Note in which order a trainer sees its examples."""
    inner = module.training_order

    def order(*args: Any) -> Any:
        found = inner(*args)
        orders.append(list(found))
        return found

    module.training_order = order


def _forget_unfinished(clock: Clock, run_folder: Path) -> None:
    """Remove what an interrupted stage has left: its next time would be too short."""
    if not clock.rows:
        shutil.rmtree(run_folder, ignore_errors=True)
        return
    os.truncate(run_folder / "calls.jsonl", clock.rows[-1]["store_bytes"])
    for name in STAGES:
        if not clock.has(name):
            shutil.rmtree(run_folder / name, ignore_errors=True)


def _run(job: dict[str, Any], run_folder: Path) -> None:
    import arte_edge as ae

    ae.distill(run=job["run_toml"], name=run_folder.name, runs=run_folder.parent, force=True)


def _run_older(job: dict[str, Any], run_folder: Path) -> None:
    pipeline, settings = (importlib.import_module(f"arte_edge.distill.{name}") for name in ("pipeline", "settings"))
    config = settings.build(job["run_toml"], settings.load_toml(Path(job["run_toml"])))
    pipeline.run_pipeline(config, run_folder, anyway=True, update=False, as_json=False)


def _compare_texts(job: dict[str, Any], run_folder: Path) -> None:
    """Let the older build answer the first greedy calls of this build's elicit stage; write how many texts are equal.

    They are sent together, as this build sends them, for a text depends a little on the others in its batch.
    """
    out = Path(job["folder"]) / "texts.json"
    stages = read_rows(Path(job["texts"]) / "inputs.jsonl")
    asks = [ask for row in stages if row["stage"] == "elicit" for ask in row["calls"]]
    greedy = [ask for ask in asks if ask["kind"] == "complete" and not ask["sampling"]["temperature"]]
    if out.is_file() or not greedy:
        return
    base, opening, resolving = (
        importlib.import_module(f"arte_edge.{name}") for name in ("engines.base", "engines.open", "models.resolve")
    )
    calls = greedy[0]["calls"][:TEXTS]
    how = greedy[0]["sampling"] | {"stop": tuple(greedy[0]["sampling"]["stop"])}
    engine = opening.open_local(resolving.resolve(job["teacher"]))
    requests = [base.Request(call["prompt"], call["sample"]) for call in calls]
    done = engine.complete(requests, base.Sampling(**how))
    same = sum(one.text == call["text"] for one, call in zip(done, calls, strict=True))
    out.write_text(json.dumps({"n": len(calls), "equal": same, "engine": engine.identity.kind}) + "\n", "utf-8")
    engine.close()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")))
