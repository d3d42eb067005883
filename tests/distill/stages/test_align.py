"""The alignment of a scripted teacher, its training replaced: pairs, probe, fresh drafts, damaged results."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import Patch

from arte_edge.console import Reporter
from arte_edge.distill import run_context
from arte_edge.distill.generation.rationales import rationale_prompt
from arte_edge.distill.pipeline import run_pipeline
from arte_edge.distill.stages import align as module
from arte_edge.distill.stages.align import align
from arte_edge.distill.stages.calibrate import calibrate
from arte_edge.distill.stages.elicit import elicit
from arte_edge.distill.stages.prefer import prefer
from arte_edge.distill.train.collapse import ProbeResult
from arte_edge.distill.train.dpo import DpoResult
from arte_edge.distill.train.kl_target import HeldOut
from arte_edge.errors import InputError
from arte_edge.publish.report.page import _TEXTS, _result
from arte_edge.results.student_json import Alignment
from arte_edge.runtimes.completion import Request, Sampling

SIDES = ("chosen", "rejected")


@pytest.fixture
def aligned(house: Any, monkeypatch: Patch) -> Any:
    """Run elicit to align with a training that probes once; return what the probe found, the result and the run.

    The training finds `kl`, and the aligned teacher is `engine`.
    """
    found: list[ProbeResult] = []

    def by_prompt(request: Request, text: str, sampling: Sampling) -> str:
        return f"{sum(map(ord, request.prompt))} {text}"  # no two techniques write the same

    house.teacher = replace(house.teacher, say=by_prompt)
    house.kl, house.aligned = 0.09, house.teacher
    (house.folder / "check").mkdir(parents=True)
    (house.folder / "check" / "answers.jsonl").write_text("")

    def train(
        base: Path, pairs: list[Any], out: Path, settings: Any, *, held_out: Any, probe: Any, progress: Any, **_: Any
    ) -> DpoResult:
        found.append(probe(out / "step-1"))
        with Patch.context() as patch:  # the adapter of before needs no engine of its own
            patch.delattr(module, "open_local")
            assert probe(out / "step-0") == found[-1]
        progress(1, 1)
        held = HeldOut(house.kl, len(held_out), len(held_out), 0.5)
        return DpoResult(out, 1, 1, "", len(pairs), 0, 0.0, held, ({"rewards/margins": 0.007},), ())

    def write(adapter: Path, base: Path, out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(b"adapter")

    def open_aligned(model: Any, *, adapter: Any = None, **more: Any) -> Any:
        return house.aligned if adapter else opens(model, **more)

    opens = run_context.open_local
    monkeypatch.setattr(run_context, "open_local", open_aligned)
    monkeypatch.setattr(module, "train_dpo", train)
    monkeypatch.setattr(module, "open_local", lambda *_, **__: house.teacher)
    monkeypatch.setattr("arte_edge.gguf.from_base.adapter_to_gguf", write)

    def start(**tables: Any) -> tuple[list[ProbeResult], Any, Any]:
        align_table = {"min_gap": 0.0, "min_gap_errors": 0.0, **tables.pop("align", {})}
        run = house.run(align=align_table, **tables)
        elicit(run)
        calibrate(run)
        prefer(run)
        result = align(run)
        run.close()
        return found, result, run

    return start


@pytest.mark.parametrize("n_seed", [1, 2, 8])
def test_the_probe_shows_the_seeds_that_there_are(house: Any, aligned: Any, n_seed: int) -> None:
    house.task = replace(house.task, seed=house.task.seed[:n_seed])
    found, (summary, adapter), run = aligned()
    assert found == [ProbeResult(valid_rate=1.0, mean_tokens=7.0)]
    assert adapter[0].read_bytes() == b"adapter" and adapter[1] == summary["adapter_sha256"]
    assert run.config.elicit.shown == 3


def test_the_line_of_an_alignment_that_learned_nothing_says_so(aligned: Any) -> None:
    summary = aligned()[1][0]
    assert summary["margin"] == 0.007
    assert "50.2% (untrained: 50 %)" in module._describe(summary)
    del summary["kl"], summary["fresh"]  # of an older run
    assert Alignment.of(summary) is None
    assert module._describe(summary) and module.caveats(summary) == []


def warnings(house: Any) -> list[str]:
    rows = map(json.loads, (house.folder / "events.jsonl").read_text("utf-8").splitlines())
    return [row["text"] for row in rows if row["event"] == "warning" and "alignment" in row["text"]]


def test_a_teacher_that_writes_the_same_as_before_is_a_warning_again_at_every_start(house: Any, aligned: Any) -> None:
    few = {"calibrate": {"k": 20}}  # so that validation examples are left
    _, (summary, _), run = aligned(**few)
    fresh = summary["fresh"]
    assert (fresh["prompts"], fresh["changed"]) == (24, 0) and fresh["gain"] == 0.0
    assert fresh["valid_before"] == fresh["valid_after"] == 1.0
    assert run.caveats == warnings(house) and "changed nothing" in run.caveats[0]
    _, again, run = aligned(**few)
    assert again[0] == summary and len(run.caveats) == 1 and len(warnings(house)) == 2


def test_a_teacher_whose_drafts_the_student_learns_more_from_is_no_warning(house: Any, aligned: Any) -> None:
    by_draft = dict[str, float]()

    def better(run: Any, drafts: list[Any], questions: Any, *, may_adapt: bool) -> Any:
        assert not may_adapt, "a mean is compared, not an order"
        assert {draft["question"] for draft in drafts} == set(questions)
        by_draft.update((draft["text"], 0.5 + 0.1 * ("improved" in draft["text"])) for draft in drafts)
        return [{"score": by_draft[draft["text"]] + 0.001 * i} for i, draft in enumerate(drafts)], {}

    house.aligned = replace(house.teacher, name="aligned", word=lambda prompt: "improved here")
    module_of_scores = "arte_edge.distill.stages.fresh_drafts.scored_rows"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_of_scores, better)
        _, (summary, _), run = aligned(align={"fresh_drafts": 10, "question_pairs": 0}, calibrate={"k": 20})
    fresh = summary["fresh"]
    assert (fresh["prompts"], fresh["changed"], fresh["scored"], run.caveats) == (10, 10, 10, [])
    assert fresh["gain"] == pytest.approx(0.1, abs=0.01) and fresh["gain_low"] > 0.09
    told = Alignment.of(summary)
    assert told and (told.score_gain, told.drafts_changed, told.kl_nats_per_token) == (fresh["gain"], 10, 0.09)
    page = _result(summary, _TEXTS["stages"]["align"]["result"], _TEXTS["stages"]["align"]["more"])
    assert "Of 10 new drafts 10 changed" in page and f"{fresh['gain']:+.3f} (95 %" in page
    assert fresh["score_after"] == pytest.approx(fresh["score_before"] + fresh["gain"], abs=1e-4)


def test_the_answers_of_the_preference_set_are_in_no_fresh_draft(house: Any, aligned: Any) -> None:
    house.aligned = replace(house.teacher, name="aligned", prompts=[])
    run = aligned(align={"fresh_drafts": 30, "question_pairs": 0}, calibrate={"k": 20})[2]
    taken = [row["input"] for row in run.read("calibrate", "preference_set.jsonl")]
    prompts = house.aligned.prompts
    assert len(taken) == len(prompts) == 20  # of 40 validation examples
    assert not any(text in prompt.rpartition("Question:")[2] for text in taken for prompt in prompts)


@pytest.mark.parametrize("data", ["arte", "random"])
def test_no_fresh_drafts_are_written_where_they_are_switched_off(house: Any, aligned: Any, data: str) -> None:
    house.kl = 1e-5
    _, (summary, _), run = aligned(data=data, align={"fresh_drafts": 0})
    told = Alignment.of(summary)
    assert told and told.drafts is None and told.held_out_right == told.held_out_pairs
    assert "fresh" not in summary and "changed nothing" in run.caveats[0]


def test_the_random_control_is_trained_on_the_questions_of_the_run_that_it_controls(house: Any, aligned: Any) -> None:
    def pairs(data: str) -> list[Any]:
        run = aligned(data=data, elicit={"questions": 24})[2]
        rows = run.read("align", "pairs.jsonl")
        return sorted((row["prompt"], *sorted((row["chosen"], row["rejected"]))) for row in rows)

    arte = pairs("arte")
    assert pairs("random") == arte and len(arte) > 50


@pytest.mark.parametrize("by_label", [False, True])
def test_a_prompt_asks_for_as_many_questions_as_its_sides_have(house: Any, aligned: Any, by_label: bool) -> None:
    house.by_label = by_label
    rows = aligned(elicit={"questions": 24}, align={"rationale_pairs": 0})[2].read("align", "pairs.jsonl")
    for row in rows:
        counts = {row[side].count("<target>") if not by_label else row[side].count("\n") + 1 for side in SIDES}
        assert counts == {row["n"]}
        said = int(re.findall(r"Write (\d+) ", row["prompt"])[-1])
        shown = row["prompt"].rpartition("<Question_")[2] if not by_label else row["prompt"].rpartition("\n")[2]
        first = int(shown.split(">")[0].removesuffix("."))
        assert said == (row["n"] if not by_label else first - 1 + row["n"])


def test_rationale_prompts_are_those_of_tailoring_unless_set(house: Any, aligned: Any) -> None:
    run = aligned(align={"question_pairs": 0})[2]
    (row, *_) = run.read("align", "pairs.jsonl")
    text = next(q["input"] for q in run.read("prefer", "questions.jsonl") if q["id"] == row["question"])
    assert row["prompt"] == rationale_prompt(run, house.teacher, text, None)
    assert row["prompt"].count("Question:") == 1 + run.config.teacher.shots
    (row, *_) = aligned(align={"question_pairs": 0, "shots": 0})[2].read("align", "pairs.jsonl")
    assert row["prompt"].count("Question:") == 1


@pytest.mark.parametrize("damage", ["[1]", '{"inputs": 3}', "[" * 5000, "no summary", "no margin", "a text"])
def test_a_damaged_manifest_is_made_again(house: Any, aligned: Any, damage: str) -> None:
    found, result, _ = aligned()
    path = house.folder / "align" / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    if damage == "no summary":
        del manifest["summary"]
    elif damage == "no margin":
        del manifest["summary"]["margin"]
    elif damage == "a text":
        manifest["summary"]["margin"] = "much"
    path.write_text(damage if damage[0] in "[{" else json.dumps(manifest), "utf-8")
    assert aligned()[1] == result and len(found) == 2
    assert json.loads(path.read_text("utf-8"))["summary"] == result[0]


def test_the_pairs_of_other_tasks_runs_are_trained_on_too(house: Any, aligned: Any) -> None:
    mine, also, task = house.folder, house.folder.with_name("other"), house.task
    tasks = {name: replace(task, description=f"{name}: {task.description}") for name in ("other", "mine")}
    folders = {"other": also, "mine": mine}
    align_table = {"min_gap": 0.0, "min_gap_errors": 0.0, "fresh_drafts": 0}

    def prompts_of(name: str, **more: Any) -> set[str]:
        house.task = tasks[name]
        config = house.config(task={"ref": name}, align=align_table | more)
        run_pipeline(config, folders[name], Reporter(quiet=True), update=True)
        rows = (folders[name] / "align" / "pairs.jsonl").read_text("utf-8").splitlines()
        return {json.loads(row)["prompt"] for row in rows}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arte_edge.distill.pipeline.load_task", lambda ref, **_: tasks[ref])
        alone = {name: prompts_of(name) for name in tasks}
        both = prompts_of("mine", also=[str(also)])
    assert not alone["other"] & alone["mine"] and both == alone["other"] | alone["mine"]
    summary = json.loads((mine / "align" / "manifest.json").read_text("utf-8"))["summary"]
    assert summary["tasks"] == 2 and "of 2 tasks" in module._describe(summary)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.unlink(), "not the folder of another run"),
        (lambda path: path.write_text(path.read_text().replace("shots = 8", "shots = 7")), "its teacher is"),
    ],
)
def test_a_run_that_cannot_be_aligned_with_this_one_says_so(
    house: Any, aligned: Any, tmp_path: Path, damage: Any, why: str
) -> None:
    align_table = {"min_gap": 0.0, "min_gap_errors": 0.0, "fresh_drafts": 0}
    run_pipeline(house.config(task={"ref": "parity"}, align=align_table), tmp_path / "other", Reporter(quiet=True))
    damage(tmp_path / "other" / "run.toml")
    config = house.config(task={"ref": "parity"}, align=align_table | {"also": [str(tmp_path / "other")]})
    with pytest.raises(InputError, match=why):
        run_pipeline(config, house.folder, Reporter(quiet=True))
    assert (house.folder / "run.toml").exists() == (
        why == "its teacher is"
    )  # what is not there is found before any work
