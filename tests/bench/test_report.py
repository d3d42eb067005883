"""The table fits 80 columns, whatever is in it, and says what went wrong; CSV and JSON hold every field."""

import csv
import io
import json
from typing import Any

from arte_edge.bench.report import Table, as_csv, as_json, summary
from arte_edge.results.rows import DeviceFacts, SpeedRow


def row(device: DeviceFacts, **told: Any) -> SpeedRow:
    common = {
        "test": "tg128",
        "model_filename": "SmolLM2-135M-Instruct-Q4_K_M.gguf",
        "model_size": 105_454_144,
        "model_n_params": 134_515_008,
        "model_type": "llama",
        "format": "gguf",
        "quantization": "Q4_K_M",
        "runtime": "llama_cpp 0.3.36",
        "n_threads": 4,
        "n_prompt": 0,
        "n_gen": 128,
        "median_ts": 71.2,
        "stddev_ts": 0.4,
        "samples_ts": (71.2, 71.6),
        "samples_ns": (10, 11),
        "itl_p50_ms": 13.9,
        "itl_p95_ms": 15.1,
        "peak_rss_bytes": 190 << 20,
        "device": device,
    }
    return SpeedRow.model_validate(common | told)


def lines(*rows: SpeedRow) -> list[str]:
    table = Table()
    return [line for one in rows for line in table.add(one)] + table.end()


def test_a_row_shows_rate_times_memory_and_heat(this_device: DeviceFacts) -> None:
    reading = {
        "test": "pp512",
        "n_prompt": 512,
        "n_gen": 0,
        "ttft_ms": 1602.13,
        "itl_p50_ms": None,
        "itl_p95_ms": None,
    }
    shown = lines(row(this_device, **reading, temperature_c_max=61.4), row(this_device))
    assert shown[0] == "SmolLM2-135M-Instruct-Q4_K_M.gguf"
    assert shown[1] == "llama, 135 M parameters, 100.6 MiB, llama_cpp 0.3.36"
    first, second = (" ".join(line.split()) for line in shown if " pp512 " in line or " tg128 " in line)
    assert first == "| pp512 | 4 | 71.20 ± 0.40 | 1602 | | | 190 | 61 |"
    assert second == "| tg128 | 4 | 71.20 ± 0.40 | | 13.90 | 15.10 | 190 | |"


def test_everything_fits_into_80_columns(this_device: DeviceFacts) -> None:
    wide = {
        "model_filename": "x" * 120 + ".gguf",
        "test": "tg1024@d4096",
        "median_ts": 123456.0,
        "stddev_ts": 1234.5,
        "temperature_c_max": 101.0,
        "throttled": True,
        "throttle_reason": "too hot, throttled: cool it, or let it rest between tests " * 2,
        "expected_ts": 80.0,
        "expected_from": "probe",
        "energy_j": 12.0,
        "energy_source": "rapl",
        "slowed": True,
        "burst_ts": 90.0,
        "sustained_ts": 60.0,
        "cv": 0.4,
    }
    shown = lines(row(this_device, **{**wide, "test": "tg128@d512"}), row(this_device))
    assert max(map(len, shown)) <= 80
    words = " ".join(" ".join(shown).split())
    for said in (
        "throttled: too hot",
        "slowed down: 90.00 t/s at first",
        "expected 80.00 t/s (probe)",
        "(rapl)",
        "unsteady",
    ):
        assert said in words
    assert any("101!" in line for line in shown)
    both = summary([row(this_device), row(this_device, **wide)])
    assert both and max(map(len, both)) <= 80


def test_a_failure_has_its_status_in_the_table_and_its_reason_below(this_device: DeviceFacts) -> None:
    reason = "Killed for its memory, loading (the kernel's log says so). Take a smaller type or context."
    shown = lines(row(this_device, status="out-of-memory", reason=reason))
    assert any("out of memory" in line for line in shown)
    assert reason in " ".join(" ".join(shown).split())


def test_each_model_has_a_table_of_its_own_and_several_a_summary(this_device: DeviceFacts) -> None:
    other = row(this_device, model_filename="b.gguf", median_ts=12.0)
    shown = lines(row(this_device), other)
    assert sum(line.startswith("| test") for line in shown) == 2
    assert summary([row(this_device)]) == []
    both = summary([row(this_device), other])
    assert "12.00" in both[-2]


def test_csv_and_json_hold_every_field(this_device: DeviceFacts) -> None:
    one = row(this_device)
    assert [SpeedRow.model_validate(value) for value in json.loads(as_json([one]))] == [one]
    (read,) = csv.DictReader(io.StringIO(as_csv([one])))
    assert read["n_threads"] == "4" and read["device_cpu"] == "test"
    assert json.loads(read["samples_ts"]) == [71.2, 71.6]
    assert json.loads(as_json([])) == [] and as_csv([]).strip() == ""
