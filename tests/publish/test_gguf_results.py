import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import Make, quality_row, speed_row

from arte_edge.errors import InputError
from arte_edge.gguf.reader import Field, read_model_header
from arte_edge.gguf.writer import rewrite
from arte_edge.models.artifact import checksums_of
from arte_edge.publish.card.card import write_keys
from arte_edge.results.merge import merge_rows
from arte_edge.results.student_json import FILE_NAME, read_student

NAME = "tiny-Q8_0.gguf"


def values(path: Path) -> dict[str, Any]:
    return read_model_header(path).metadata


def test_results_stand_in_the_file_and_its_sum_in_the_document(export_folder: Path) -> None:
    rows = [speed_row("tg128", 20.5), speed_row("pp512", 150.0), quality_row(80)]
    merge_rows(export_folder, rows)
    assert write_keys(export_folder) == (NAME,)
    found = values(export_folder / NAME)
    bench = {key.removeprefix("arte_edge.bench."): v for key, v in found.items() if "arte_edge.bench" in key}
    assert bench["count"] == 1
    assert (bench["0.device"], bench["0.threads"]) == ("raspberry-pi-5", 4)
    assert (bench["0.decode_tps"], bench["0.prefill_tps"]) == (20.5, 150.0)
    assert (bench["0.peak_rss_bytes"], bench["0.throttled"]) == (300_000_000, False)
    assert (bench["0.task"], bench["0.date"]) == ("home_intents", "2026-11-24")
    assert bench["0.accuracy"] == pytest.approx(0.8)
    assert found["arte_edge.fidelity.kl_mean"] == pytest.approx(0.0058)
    student = read_student(export_folder)
    sums = checksums_of(export_folder / NAME)
    assert (student.artifacts[0].sha256, student.artifacts[0].size_bytes) == (sums.sha256, sums.size_bytes)
    assert student.artifacts[0].tensor_sha256 == sums.tensor_sha256
    assert write_keys(export_folder) == ()
    # and what is measured from now on still finds its file
    (speed,) = merge_rows(export_folder, [speed_row("tg128", 21.0, test_time="2027")]).artifacts[0].speeds
    assert speed.decode_tokens_per_s == 21.0


def test_throttled_rates_and_partial_accuracies_stay_out_of_the_file(export_folder: Path) -> None:
    merge_rows(export_folder, [speed_row(throttled=True), quality_row(8, n=10, partial=True)])
    write_keys(export_folder)
    assert not [key for key in values(export_folder / NAME) if key.startswith("arte_edge.bench.")]
    write_keys(export_folder, allow_throttled=True)
    found = values(export_folder / NAME)
    assert found["arte_edge.bench.0.throttled"] is True
    assert "arte_edge.bench.0.accuracy" not in found
    write_keys(export_folder)  # and they go again
    assert "arte_edge.bench.count" not in values(export_folder / NAME)
    merge_rows(export_folder, [speed_row(contended=True, test_time="2027")])
    write_keys(export_folder, allow_throttled=True)
    assert "arte_edge.bench.count" not in values(export_folder / NAME)


def test_another_files_results_are_not_written_into_it(export_folder: Path, make_gguf: Make) -> None:
    shutil.copy(make_gguf("other.gguf", rows=32), export_folder / NAME)
    before = (export_folder / NAME).read_bytes(), (export_folder / FILE_NAME).read_bytes()
    with pytest.raises(InputError, match="its tensors are not those"):
        write_keys(export_folder)
    assert before == ((export_folder / NAME).read_bytes(), (export_folder / FILE_NAME).read_bytes())


@pytest.mark.model
def test_llama_cpp_loads_the_rewritten_file_and_answers_the_same(smollm2: Any, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    path = tmp_path / "model.gguf"
    shutil.copyfile(smollm2.gguf, path)

    def answer() -> str:
        model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False)
        try:
            return str(model("The capital of France is", max_tokens=8, temperature=0)["choices"][0]["text"])
        finally:
            model.close()

    before, sums = answer(), checksums_of(path)
    keys = {f"arte_edge.bench.{i}.device": Field(8, b"raspberry-pi-5") for i in range(40)}
    rewrite(path, keys)
    assert checksums_of(path).tensor_sha256 == sums.tensor_sha256
    assert set(keys) < set(read_model_header(path).fields)
    assert answer() == before
