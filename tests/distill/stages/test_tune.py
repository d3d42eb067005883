"""Tailoring and tuning: what a student is trained on, and rounds that ask for more where it errs."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import Patch

from arte_edge.distill.stages.check import check
from arte_edge.distill.stages.target import target
from arte_edge.distill.stages.tune import tailor_and_tune
from arte_edge.models.resolve import LocalModel
from arte_edge.store import Stage
from arte_edge.tasks.task import Answer

N = 16
SIZE: dict[str, Any] = {"tailor": {"questions": N}}


def tuned(house: Any, **tables: Any) -> tuple[Any, LocalModel]:
    """Run what comes before and with the tuning of a student; return the closed run and the student."""
    run = house.run(**SIZE | tables)
    try:
        check(run, force=True)
        target(run)
        return run, tailor_and_tune(run, None)
    finally:
        run.close()


def summary(house: Any, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((house.folder / stage / "manifest.json").read_text())["summary"]
    return found


class TestTune:
    @pytest.mark.parametrize("form", ["answer", "answer-first", "reasoning-first"])
    def test_own_labels_are_in_the_mix_unless_reasons_come_first(self, house: Any, form: str) -> None:
        tuned(house, tune={"target": form})
        rows = house.rows("tune/student")
        seeds = [row for row in rows if any(seed.input in row["prompt"] for seed in house.task.seed)]
        assert len(rows) - len(seeds) == N
        assert len(seeds) == summary(house, "tune")["own_labels"] == (0 if form == "reasoning-first" else 8)
        if form != "answer":
            assert all("<ans>" in row["completion"] for row in rows)

    def test_own_labels_are_left_out_on_request(self, house: Any) -> None:
        tuned(house, tune={"target": "answer", "own_labels": False})
        assert len(house.rows("tune/student")) == N

    @pytest.mark.parametrize(
        ("form", "rule"), [("answer", "the answer alone"), ("reasoning-first", "Think step by step")]
    )
    def test_the_checkpoint_holds_the_template_that_it_was_trained_with(self, house: Any, form: str, rule: str) -> None:
        _, model = tuned(house, tune={"target": form})
        template = (house.folder / "tune" / "student" / "chat_template.jinja").read_text()
        assert house.task.description in template and rule in template
        assert rule in house.rows("tune/student")[0]["prompt"]
        assert house.open_tuned(model).chat_template == template

    def test_open_answers_have_their_trial_on_the_tailored_data_once(self, house: Any) -> None:
        house.task = replace(house.task, answer=Answer(kind="text"))
        house.learned = lambda rows: lambda n: n % 4 < (4 if "step by step" in rows[0]["prompt"] else 2)
        run, model = tuned(house)
        assert summary(house, "tune")["trial"]["form"] == run.form == "reasoning-first"
        trial = [path.name for path in house.trained if path.parent.name == "trial"]
        assert trial == ["answer", "answer-first", "reasoning-first"]
        spent, trainings = house.calls, len(house.trained)
        again, same = tuned(house)
        assert (again.form, same.sha256) == (run.form, model.sha256)
        assert (house.calls, len(house.trained)) == (spent, trainings)


def by_size(*of_forty: int) -> Callable[[Sequence[dict[str, str]]], Callable[[int], bool]]:
    """Return what a student knows of the validation numbers from 100 to 139 after round 1, 2 and so on."""

    def learned(rows: Sequence[dict[str, str]]) -> Callable[[int], bool]:
        known = of_forty[max(len(rows) // N, 1) - 1]
        return lambda n: n % 2 == 0 or n < 100 + known

    return learned


class TestRounds:
    def test_the_second_round_asks_where_the_student_of_the_first_errs(self, house: Any) -> None:
        house.by_label, house.learned = True, by_size(10, 40)  # the first takes odd numbers for even ones
        run, model = tuned(house, rounds=2)
        wrong = [row for row in run.read("validate", "answers.jsonl") if row["answer"] != row["target"]]
        assert {row["target"] for row in wrong} == {"odd"}
        first, second = (Counter(row["label"] for row in run.read(s, "train.jsonl")) for s in ("tailor", "tailor-2"))
        assert first == {"odd": 8, "even": 8} and second["odd"] >= 2 * second["even"] > 0
        texts = [row["input"] for stage in ("tailor", "tailor-2") for row in run.read(stage, "train.jsonl")]
        assert len(set(texts)) == len(texts) == 2 * N
        assert len(house.rows("tune-2/student")) == 2 * N + 8
        assert summary(house, "validate-2")["right"] == 40 > summary(house, "validate")["right"]
        near = [prompt for prompt in house.teacher.prompts if "easy to mistake for even" in prompt]
        assert near and all("answer is odd" in prompt for prompt in near)
        assert model.sha256 == summary(house, "tune")["student_sha256"] == summary(house, "tune-2")["student_sha256"]

    @pytest.mark.parametrize("by_label", [True, False])
    def test_no_validation_example_reaches_a_prompt_that_the_teacher_completes(
        self, house: Any, by_label: bool
    ) -> None:
        house.by_label, house.learned = by_label, by_size(10, 40)
        tuned(house, rounds=2)
        assert len(house.teacher.prompts) > 8
        for prompt in house.teacher.prompts:
            assert not any(example.input in prompt for example in house.task.validation), prompt

    @pytest.mark.parametrize(
        ("known", "made", "kept"), [((20, 20, 40), 2, 1), ((20, 30, 26), 3, 2), ((4, 20, 40), 3, 3)]
    )
    def test_a_round_that_raises_nothing_is_the_last_and_the_best_is_the_runs(
        self, house: Any, known: tuple[int, ...], made: int, kept: int
    ) -> None:
        house.by_label, house.learned = True, by_size(*known)
        _, model = tuned(house, rounds=3)
        folders = sorted(path.name for path in house.folder.glob("tune*"))
        assert folders == ["tune", *(f"tune-{n}" for n in range(1, made + 1))]
        final, best = house.folder / "tune", house.folder / f"tune-{kept}"
        assert (final / "manifest.json").read_bytes() == (best / "manifest.json").read_bytes()
        weights = "student-F16.gguf"
        assert (final / weights).samefile(best / weights), "a copy would cost the space of a model"
        assert model.sha256 == summary(house, "tune")["student_sha256"]

    @pytest.mark.parametrize("n_finished", range(8))
    @pytest.mark.parametrize("written", [False, True])
    def test_a_run_that_is_killed_at_the_end_of_a_stage_ends_with_the_same(
        self, house: Any, n_finished: int, written: bool, monkeypatch: Patch
    ) -> None:
        house.by_label, house.learned = True, by_size(10, 40)
        _, whole = tuned(house, rounds=2)
        expected, cost, trainings = contents(house.folder), house.calls, len(house.trained)
        house.folder, finish, left = house.folder.with_name("killed"), Stage.finish, n_finished
        house.folder.mkdir()

        def dies(stage: Stage, found: dict[str, Any]) -> None:
            nonlocal left
            left -= 1
            if left >= 0 or written:
                finish(stage, found)
            if left < 0:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Stage, "finish", dies)
            tuned(house, rounds=2)
        _, model = tuned(house, rounds=2)
        assert model.sha256 == whole.sha256 and contents(house.folder) == expected
        again = 2 if (n_finished, written) == (1, False) else 0  # a trial's students are removed before it ends
        assert (house.calls, len(house.trained)) == (2 * cost, 2 * trainings + again), "nothing else twice"


def contents(folder: Path) -> dict[str, bytes]:
    """Return the data of a run by file."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("events.jsonl", "calls.jsonl", ".lock", "manifest.json")
    }
