"""The table fits 80 columns, whatever is in it, and says what went wrong; CSV and JSON hold every field."""

import csv
import io
import json
from typing import Any

from tiny import accuracy, quality_row, speed_row

from arte_edge.bench.report import Table, as_csv, as_html, as_json, quality_line, summary
from arte_edge.results.rows import SpeedRow


def row(test: str = "tg128", **more: Any) -> SpeedRow:
    model = {"model_filename": "SmolLM2-135M-Instruct-Q4_K_M.gguf", "model_size": 105_454_144}
    kind = {"model_n_params": 134_515_008, "model_type": "llama", "quantization": "Q4_K_M"}
    rates = {"stddev_ts": 0.4, "samples_ts": (71.2, 71.6), "samples_ns": (10, 11), "ttft_ms": None}
    times = {"itl_p50_ms": 13.9, "itl_p95_ms": 15.1, "peak_rss_bytes": 190 << 20, "temperature_c_max": None}
    return speed_row(test, 71.2, **model | kind | rates | times | more)


def lines(*rows: SpeedRow) -> list[str]:
    table = Table()
    return [line for one in rows for line in table.add(one)] + table.end()


def test_a_row_shows_rate_times_memory_and_heat() -> None:
    times = {"ttft_ms": 1602.13, "itl_p50_ms": None, "itl_p95_ms": None, "temperature_c_max": 61.4}
    shown = lines(row("pp512", **times), row())
    assert shown[0] == "SmolLM2-135M-Instruct-Q4_K_M.gguf"
    assert shown[1] == "llama, 135 M parameters, 100.6 MiB, llama_cpp 0.3.36"
    first, second = (" ".join(line.split()) for line in shown if " pp512 " in line or " tg128 " in line)
    assert first == "| pp512 | 4 | 71.20 ± 0.40 | 1602 | | | 190 | 61 |"
    assert second == "| tg128 | 4 | 71.20 ± 0.40 | | 13.90 | 15.10 | 190 | |"


def test_everything_fits_into_80_columns() -> None:
    wide = {"model_filename": "x" * 120 + ".gguf", "median_ts": 123456.0, "stddev_ts": 1234.5}
    wide |= {"temperature_c_max": 101.0, "throttled": True, "slowed": True, "cv": 0.4}
    wide |= {"throttle_reason": "too hot, throttled: cool it, or let it rest between tests " * 2}
    wide |= {"expected_ts": 80.0, "expected_from": "probe", "energy_j": 12.0, "energy_source": "rapl"}
    wide |= {"burst_ts": 90.0, "sustained_ts": 60.0}
    shown = lines(row("tg128@d512", **wide), row())
    assert max(map(len, shown)) <= 80
    words = " ".join(" ".join(shown).split())
    for part in ("throttled: too hot", "90.00 t/s", "expected 80.00 t/s (probe)", "(rapl)", "unsteady"):
        assert part in words
    assert any("101!" in line for line in shown)
    both = summary([row(), row("tg1024@d4096", **wide)])
    assert both and max(map(len, both)) <= 80


def test_a_failure_has_its_status_in_the_table_and_its_reason_below() -> None:
    reason = "Killed for its memory, loading (the kernel's log says so). Take a smaller type or context."
    shown = lines(row(status="out-of-memory", reason=reason))
    assert any("out of memory" in line for line in shown)
    assert reason in " ".join(" ".join(shown).split())


def test_each_model_has_a_table_of_its_own_and_several_a_summary() -> None:
    other = row(model_filename="b.gguf", median_ts=12.0)
    shown = lines(row(), other)
    assert sum(line.startswith("| test") for line in shown) == 2
    assert summary([row()]) == []
    both = summary([row(), other])
    assert "12.00" in both[-2]


def test_csv_and_json_hold_every_field() -> None:
    one = row()
    assert [SpeedRow.model_validate(value) for value in json.loads(as_json([one]))] == [one]
    (read,) = csv.DictReader(io.StringIO(as_csv([one])))
    assert read["n_threads"] == "4" and read["device_cpu"] == "Cortex-A76"
    assert json.loads(read["samples_ts"]) == [71.2, 71.6]
    assert json.loads(as_json([])) == [] and as_csv([]).strip() == ""


def test_the_accuracy_with_a_grammar_stands_beside_the_one_without() -> None:
    assert "grammar" not in quality_line(quality_row(80)) + as_html([quality_row(80)])
    paired = {"difference": 0.1, "difference_low": 0.04, "difference_high": 0.17}
    one = quality_row(80, with_grammar=accuracy(90, 100, **paired))
    line = " ".join(quality_line(one).split())
    assert "80/100 correct, 80.0%" in line
    assert "with grammar 90/100, 90.0% (80.0% to 100.0%), +10.0 (+4.0 to +17.0) points" in line
    (read,) = csv.DictReader(io.StringIO(as_csv([one])))
    assert (read["right"], read["with_grammar_right"]) == ("80", "90")
    assert "with grammar 90/100" in as_html([one])
