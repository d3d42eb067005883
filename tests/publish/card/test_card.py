import ast
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tiny import accuracy, facts, metrics, quality_row, speed_row

from arte_edge.errors import InputError
from arte_edge.publish.card.card import CARD, CardOptions, render_card, write_card
from arte_edge.results.comparison import ComparisonRow
from arte_edge.results.merge import merge_rows
from arte_edge.results.student_json import Asking, StudentFile, Tuning, read_student


def read(folder: Path) -> StudentFile:
    return read_student(folder) or pytest.fail(f"no student.json in {folder}")


@pytest.fixture
def measured(export_folder: Path) -> StudentFile:
    rows = [speed_row("tg128", 20.5), speed_row("pp512", 150.0), quality_row(80)]
    return merge_rows(export_folder, rows)


def part(text: str, name: str) -> str:
    return text.split(f"<!-- arte-edge:{name}:start -->")[1].split(f"<!-- arte-edge:{name}:end -->")[0]


def head(student: StudentFile, **options: Any) -> Any:
    """Return the card's metadata as the Hub's own reader sees it."""
    return ModelCard(render_card(student, CardOptions(**options))).data


def test_the_hubs_own_reader_accepts_the_head(measured: StudentFile) -> None:
    data = head(measured, datasets=("ada/intents",))
    base = (data.base_model, data["base_model_relation"], data.license)
    assert base == ("HuggingFaceTB/SmolLM2-135M-Instruct", "finetune", "apache-2.0")
    assert (data.datasets, data.pipeline_tag) == (["ada/intents"], "text-generation")
    assert data.library_name == "llama-cpp-python"
    assert {"gguf", "arte-edge", "arxiv:2406.19227"} <= set(data.tags)
    found = {(r.metric_type, r.dataset_split): r for r in data.eval_results}
    score = found["accuracy", "test"]
    assert (score.metric_value, score.dataset_name) == (0.8, "home_intents")
    expected = {"quantization": "Q8_0", "device": "raspberry-pi-5", "threads": 4, "n": 100, "low": 0.72}
    assert expected.items() <= score.metric_args.items()
    assert found["decode_tokens_per_s", None].metric_value == 20.5


def test_a_student_of_no_task_is_shown_too_and_no_other_file_is_named(measured: StudentFile) -> None:
    text = part(render_card(measured, CardOptions(base_model="ada/tiny")), "use")
    assert "llama-server -m tiny-Q8_0.gguf" in text and 'model="ada/tiny"' in text
    assert "onnxruntime" not in text and "grammar" not in text and "instruction" not in text


def test_a_question_with_quotes_reaches_its_program_as_it_is(measured: StudentFile) -> None:
    question = 'it\'s "dark" $HOME é'
    asking = Asking(form="answer", instruction="Do.", answer_tokens=4, stops=("\n",), example=question)
    text = part(render_card(measured.model_copy(update={"asking": asking}), CardOptions()), "use")
    (curl,) = [line for line in text.splitlines() if line.startswith("curl")]
    body = json.loads(shlex.split(curl)[-1])
    assert (body["messages"][0]["content"], body["stop"], body["max_tokens"]) == (question, ["\n"], 4)
    (cli,) = [line for line in text.splitlines() if line.startswith("llama-cli")]
    assert shlex.split(cli)[-1] == question
    (messages,) = [line for line in text.splitlines() if line.startswith("messages = ")]
    assert ast.literal_eval(messages.removeprefix("messages = "))[0]["content"] == question


def test_options_and_their_absence_show_in_the_head(measured: StudentFile) -> None:
    assert head(measured).datasets is None  # nobody published one
    data = head(measured, base_model="ada/tiny")
    assert (data.base_model, data["base_model_relation"]) == ("ada/tiny", "quantized")
    data = head(measured, license="My Own 1.0")  # which the Hub does not list
    assert (data.license, data.license_name) == ("other", "My Own 1.0")


def test_the_body_tells_files_accuracies_and_speeds(measured: StudentFile) -> None:
    text = render_card(measured, CardOptions())
    assert "| 80.0% | 72.0% to 88.0% |" in part(text, "accuracy")
    assert "tiny-Q8_0.gguf" in part(text, "files") and "0.0058" in part(text, "files")
    assert "raspberry-pi-5" in part(text, "bench") and "| 150.0 | 20.5 | 900 ms |" in part(text, "bench")
    assert "arXiv:2406.19227" in part(text, "lineage")
    assert "rejected" not in text and "Q4_K_M" not in text


def test_an_accuracy_with_a_grammar_and_a_divergence_of_answers_have_their_own_places(
    measured: StudentFile, export_folder: Path
) -> None:
    plain = render_card(measured, CardOptions())
    assert "grammar" not in part(plain, "accuracy") and "KL of answers" not in part(plain, "files")
    student = merge_rows(export_folder, [quality_row(82, with_grammar=accuracy(90, 100, difference=0.08))])
    good = student.artifacts[0]
    fidelity = good.fidelity.model_copy(update={"metrics": metrics(answers=metrics(kl_mean=0.0123))})
    files = (good.model_copy(update={"fidelity": fidelity}), *student.artifacts[1:])
    text = render_card(student.model_copy(update={"artifacts": files}), CardOptions())
    free, bound = (line for line in part(text, "accuracy").splitlines() if "raspberry-pi-5" in line)
    assert "| 82.0% |" in free and "`, with grammar |" in bound and "| 90.0% | 80.0% to 100.0% | +8.0 |" in bound
    assert "KL of answers" in part(text, "files") and "| 0.0058 | 0.0123 |" in part(text, "files")


def test_the_student_of_the_own_labels_is_beside_the_tuned_one(measured: StudentFile) -> None:
    share = {"setting": "as asked", "n": 199, "right": 155, "accuracy": 0.779, "low": 0.716, "high": 0.831}
    test = {"difference": 0.1, "difference_low": -0.05, "difference_high": 0.25, "p_value": 0.2}
    rows = (ComparisonRow(model="own labels", **share, **test), ComparisonRow(model="tuned student", **share))
    student = measured.model_copy(update={"comparison": rows})
    for options in (CardOptions(), CardOptions(checkpoint=True)):
        text = part(render_card(student, options), "accuracy")
        own = "| trained on the own labels alone | as asked | 199 | 77.9% | 71.6% to 83.1% | +10.0 (-5.0 to +25.0) |"
        assert own in text and "| this student | as asked | 199 |" in text and "16-bit student (F16)" in text
        assert "a part of" not in text
    assert "own labels" not in part(render_card(measured, CardOptions()), "accuracy")


@pytest.mark.parametrize("method", ["original-teacher", "arte"])  # the second: as older versions wrote it
def test_a_student_of_the_original_teacher_is_not_labelled_arte(measured: StudentFile, method: str) -> None:
    tuning = Tuning(method="full", data="original-teacher")
    lineage = measured.lineage.model_copy(update={"method": method, "tuning": tuning})
    student = measured.model_copy(update={"lineage": lineage})
    tags = head(student).tags
    assert "distillation" in tags and not [tag for tag in tags if "arxiv" in tag]
    lines = part(render_card(student, CardOptions()), "lineage")
    assert "| method | original-teacher |" in lines and "arXiv" not in lines


def test_the_16_bit_score_is_never_a_files(export_folder: Path) -> None:
    student = read(export_folder)
    bare = student.artifacts[0].model_copy(update={"accuracy": None})
    text = render_card(student.model_copy(update={"artifacts": (bare,)}), CardOptions())
    (row,) = [line for line in part(text, "accuracy").splitlines() if "90.0%" in line]
    assert row.startswith("| 16-bit student (F16) |")
    assert "| `tiny-Q8_0.gguf` | not measured |" in text
    assert ModelCard(text).data.eval_results is None


def test_a_portable_folder_alone_is_a_file_that_passed(export_folder: Path) -> None:
    student = read(export_folder).model_copy(update={"asking": None})
    folder = student.artifacts[0].model_copy(update={"file": "tiny-onnx/", "format": "onnx-optimum"})
    text = part(render_card(student.model_copy(update={"artifacts": (folder,)}), CardOptions()), "use")
    assert "`tiny-onnx/` runs in plain onnxruntime" in text and "No file passed" not in text
    bad = folder.model_copy(update={"status": "rejected"})
    none = part(render_card(student.model_copy(update={"artifacts": (bad,)}), CardOptions()), "use")
    assert "No file passed the gate." in none


def test_throttled_rates_and_partial_accuracies_are_omitted(export_folder: Path) -> None:
    rows = [speed_row("tg128", 9.25, throttled=True), quality_row(3, n=4, partial=True, low=0.3, high=0.95)]
    student = merge_rows(export_folder, rows)
    text = render_card(student, CardOptions())
    assert "9.2" not in text and "75.0%" not in text and "1 measurement(s)" in part(text, "bench")
    allowed = render_card(student, CardOptions(allow_throttled=True))
    assert "(throttled)" in part(allowed, "bench") and "throttled: true" in allowed
    student = merge_rows(export_folder, [speed_row("tg128", 9.25, contended=True, test_time="2027")])
    for options in (CardOptions(), CardOptions(allow_throttled=True)):
        text = render_card(student, options)
        assert "9.2" not in text and "run the same `arte-edge bench` again" in part(text, "bench")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_edits_by_hand_stay(export_folder: Path, measured: StudentFile, newline: str) -> None:
    write_card(export_folder, measured)
    path = export_folder / CARD
    text = path.read_text("utf-8")
    for old, new in (
        ("license: apache-2.0\n", "license: mit  # asked our lawyer\n# a comment\n"),
        ("## Speed\n", "## How fast\n\nMeasured in my kitchen, with a fan.  \n"),
        ("tags:\n", "language: de\ntags:\n- mine\n"),
    ):
        text = text.replace(old, new)
    text += "\n## Thanks\n\n\tTo Ada | and Bob.\n\n\n"
    path.write_bytes(text.replace("\n", newline).encode())
    student = merge_rows(export_folder, [speed_row("tg128", 33.25, test_time="2026-12-01T00:00:00Z")])
    assert write_card(export_folder, student)[1]
    before, after = text, path.read_bytes().decode()
    assert ("\r\n" in after) == (newline == "\r\n")
    assert after.count("\r") == (after.count("\n") if newline == "\r\n" else 0)
    after = after.replace("\r\n", "\n")
    assert "| 33.2 |" in part(after, "bench")
    before, after = (t.replace(part(t, "bench"), "") for t in (before, after))
    head, body = (t.split("\n---\n", 1) for t in (before, after))
    assert head[1] == body[1]  # all words
    index = "model-index:"
    assert head[0].split(index)[0] == body[0].split(index)[0]  # all keys but the results
    assert "33.25" in body[0].split(index)[1]


def test_a_foreign_card_gets_the_parts_at_its_end(export_folder: Path, measured: StudentFile) -> None:
    path = export_folder / CARD
    path.write_text("# Mine\n\nAll mine.")
    write_card(export_folder, measured)
    text = path.read_text("utf-8")
    assert "\n---\n# Mine\n\nAll mine.\n\n## How to use\n" in text
    assert "20.5" in part(text, "bench")


def test_a_part_that_was_taken_out_stays_out(export_folder: Path, measured: StudentFile) -> None:
    write_card(export_folder, measured)
    text = (export_folder / CARD).read_text("utf-8")
    cut = text.split("## Accuracy")[0] + "## Speed" + text.split("## Speed")[1]
    (export_folder / CARD).write_text(cut)
    assert not write_card(export_folder, measured)[1]


def test_broken_markers_are_an_error_and_nothing_is_lost(export_folder: Path, measured: StudentFile) -> None:
    write_card(export_folder, measured)
    path = export_folder / CARD
    text = path.read_text("utf-8")
    bench, accuracy = (f"<!-- arte-edge:{name}:end -->" for name in ("bench", "accuracy"))
    one_inside_the_other = text.replace(accuracy, "").replace(bench, f"{accuracy}\n{bench}")
    for broken in (text.replace(bench, ""), text + "<!-- arte-edge:bench:start -->", one_inside_the_other):
        path.write_text(broken)
        with pytest.raises(InputError, match=r"README\.md: "):
            write_card(export_folder, measured)
        assert path.read_text() == broken


def test_a_name_cannot_break_out_of_its_cell(export_folder: Path) -> None:
    evil = facts(profile="", cpu="a|b <!-- arte-edge:bench:end -->\n# x `")
    student = merge_rows(export_folder, [speed_row(device=evil)])
    write_card(export_folder, student)
    assert not write_card(export_folder, student)[1]
    assert "a\\|b &lt;!--" in (export_folder / CARD).read_text("utf-8")


def test_a_private_device_name_is_left_out(export_folder: Path) -> None:
    own = speed_row(device=facts(profile="adas-kitchen"))
    text = render_card(merge_rows(export_folder, [own]), CardOptions())
    assert "kitchen" not in text and "Cortex-A76" in text


def test_the_checkpoints_card_is_a_finetune_and_names_no_quantized_file(measured: StudentFile) -> None:
    data = head(measured, checkpoint=True)
    assert (data.library_name, data["base_model_relation"]) == ("transformers", "finetune")
    assert "Q8_0" not in render_card(measured, CardOptions(checkpoint=True))
    assert [r.metric_value for r in data.eval_results] == [0.9]
