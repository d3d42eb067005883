from pathlib import Path

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from tiny import Make, Patch, quality_row

from arte_edge.errors import InputError
from arte_edge.publish.eval_results import Benchmark, check_registered, parse_benchmark, write_eval_results
from arte_edge.results.merge import merge_rows

GSM8K = Benchmark("openai/gsm8k", "gsm8k")


@pytest.fixture(autouse=True)
def offline(monkeypatch: Patch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_whole_test_split_becomes_an_entry_of_the_hubs_form(export_folder: Path) -> None:
    notes: list[str] = []
    student = merge_rows(export_folder, [quality_row(80)])
    (path,) = write_eval_results(export_folder, student, [GSM8K], repo="ada/tiny-GGUF", note=notes.append)
    assert path == export_folder / ".eval_results" / "gsm8k-gsm8k-tiny-q8_0.gguf.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 80.0)
    assert entry.date == "2026-11-24"  # a quoted text, not a date of YAML's
    assert str(entry.notes).startswith("GGUF Q8_0, llama_cpp 0.3.36, greedy, n=100")
    assert entry.source_url == "https://huggingface.co/ada/tiny-GGUF/blob/main/bench.jsonl"
    assert len(notes) == 1 and "not checked" in notes[0]
    assert write_eval_results(export_folder, student, [GSM8K], repo="ada/tiny-GGUF") == []


def test_every_file_has_an_entry_and_one_that_was_rejected_has_none_any_more(export_folder: Path) -> None:
    student = merge_rows(export_folder, [quality_row(80)])
    first = student.artifacts[0]
    folders = [
        first.model_copy(update={"file": f"tiny-{kind}/", "format": kind[:-5], "quantization": "int8"})
        for kind in ("onnx-genai-int8", "onnx-optimum-int8")
    ]
    several = student.model_copy(update={"artifacts": (first, *folders)})
    assert len(write_eval_results(export_folder, several, [GSM8K])) == 3
    mine = export_folder / ".eval_results" / "gsm8k-gsm8k-mine.yaml"
    mine.write_text("- value: 1\n")  # written by hand
    rejected = folders[0].model_copy(update={"status": "rejected"})
    several = student.model_copy(update={"artifacts": (first, rejected, folders[1])})
    assert write_eval_results(export_folder, several, [GSM8K]) == []
    names = ("mine", "tiny-onnx-optimum-int8", "tiny-q8_0.gguf")
    assert sorted(path.name for path in mine.parent.iterdir()) == [f"gsm8k-gsm8k-{name}.yaml" for name in names]


@pytest.mark.parametrize("change", [{"partial": True}, {"split": "validation"}])
def test_only_the_whole_test_split_is_an_entry(export_folder: Path, change: dict[str, object]) -> None:
    student = merge_rows(export_folder, [quality_row(80, **change)])
    with pytest.raises(InputError, match="no file was measured on the whole test split"):
        write_eval_results(export_folder, student, [GSM8K])
    assert not (export_folder / ".eval_results").exists()


def test_of_several_tasks_one_must_be_named(export_folder: Path) -> None:
    student = merge_rows(export_folder, [quality_row(80), quality_row(70, task="gsm8k")])
    with pytest.raises(InputError, match="which of gsm8k, home_intents"):
        write_eval_results(export_folder, student, [GSM8K])
    named = parse_benchmark("openai/gsm8k:gsm8k=gsm8k")
    (path,) = write_eval_results(export_folder, student, [named])
    assert yaml.safe_load(path.read_text())[0]["value"] == 70.0


@pytest.mark.parametrize("text", ["gsm8k", "openai/gsm8k", "a/b/c:d", "openai/gsm8k:", "../x:y"])
def test_a_benchmark_of_another_form_is_rejected(text: str) -> None:
    with pytest.raises(InputError, match="not DATASET:TASK_ID"):
        parse_benchmark(text)


def test_the_hub_is_asked_where_it_can_be_reached(monkeypatch: Patch, hub: Make) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub(benchmarks=["openai/gsm8k"])
    assert check_registered(GSM8K) == ""
    with pytest.raises(InputError, match="does not list it as a benchmark"):
        check_registered(Benchmark("ada/mine", "default"))
