"""``arte-edge devices``: what it prints, in which form, and how it ends."""

import json
from pathlib import Path

import pytest
from tiny import Capture, Make, Patch, cli_json

from arte_edge import catalog
from arte_edge.cli.main import main
from arte_edge.device.ssh import environment, workdir
from arte_edge.device.ssh.environment import Finding, Report


@pytest.fixture
def model(make_gguf: Make) -> Path:
    sizes = {"llama__block_count": 2, "llama__embedding_length": 32, "llama__attention__head_count": 4}
    return make_gguf("tiny.gguf", **sizes)


def test_ls_shows_what_ships_and_ones_own_in_80_columns(capsys: Capture, model_cache: Path) -> None:
    assert main(["devices", "add", "kitchen", "pi@kitchen", "--base", "raspberry-pi-5"]) == 0
    capsys.readouterr()
    assert main(["devices", "ls"]) == 0
    printed = capsys.readouterr()
    assert all(len(line) <= 80 for line in printed.out.splitlines())
    assert all(name in printed.out for name in [*catalog.names("devices"), "kitchen", "pi@kitchen"])
    assert str(model_cache) in printed.err.replace("\n", "")
    rows = cli_json(capsys, "devices", "ls")
    assert [row["name"] for row in rows] == [*catalog.names("devices"), "kitchen"]


@pytest.mark.parametrize("name", catalog.names("devices"))
def test_show_gives_every_fact_with_its_source(capsys: Capture, name: str) -> None:
    told = cli_json(capsys, "devices", "show", name)
    assert main(["devices", "show", name]) == 0
    printed = capsys.readouterr().out
    words = " ".join(printed.split())
    assert all(len(line) <= 80 or " " not in line[21:] for line in printed.splitlines())
    for fact in (value for value in told.values() if isinstance(value, dict) and "evidence" in value):
        assert f"({fact['evidence']}: {fact['source']})" in words
    for source in told["sources"].values():
        assert source in words


def test_show_with_a_model_says_if_it_fits_and_how_fast_it_should_be(capsys: Capture, model: Path) -> None:
    told = cli_json(capsys, "devices", "show", "raspberry-pi-5", "--model", str(model))
    assert told["fit"]["verdict"] == "fits" and told["fit"]["needed_bytes"] > 0
    assert told["expected"]["source"] == "published"
    assert told["model"]["n_layer"] == 2
    assert main(["devices", "show", "orange-pi-5", "--model", str(model), "--context", "64"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(part in printed for part in ("of 64 tokens", "tokens/s (assumed:", "34.0 GB/s"))


def test_detect_describes_this_machine(capsys: Capture, model_cache: Path) -> None:
    told = cli_json(capsys, "devices", "detect")
    assert told["cores"] >= 1 and told["read_bytes_per_s"] is None
    assert isinstance(told["sensors"], list)
    assert main(["devices", "detect"]) == 0
    printed = capsys.readouterr().out
    assert told["fingerprint"] in printed and all(len(line) <= 80 for line in printed.splitlines())


def test_detect_probes_when_asked(capsys: Capture, model_cache: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("arte_edge.device.roofline.measure_bandwidth", lambda threads: 12.5e9)
    assert cli_json(capsys, "devices", "detect", "--probe")["read_bytes_per_s"] == 12.5e9
    assert main(["devices", "detect", "--probe"]) == 0
    assert "12.5 GB/s" in capsys.readouterr().out


def test_detect_predicts_from_the_bandwidth_that_it_prints(
    capsys: Capture, model_cache: Path, monkeypatch: Patch, model: Path
) -> None:
    rates = iter([12e9, 13e9])
    monkeypatch.setattr("arte_edge.device.roofline.measure_bandwidth", lambda threads: next(rates))
    found = cli_json(capsys, "devices", "detect", "--probe", "--model", str(model))
    assert found["read_bytes_per_s"] == 12e9 and "12.0 GB/s" in found["expected"]["basis"]


def test_add_show_rm_is_a_round_trip(capsys: Capture, model_cache: Path) -> None:
    added = cli_json(capsys, "devices", "add", "kitchen", "pi@kitchen", "--base", "raspberry-pi-4b", "--notes", "fan")
    assert Path(added["file"]).is_file()
    told = cli_json(capsys, "devices", "show", "kitchen")
    assert told["remote"]["host"] == "pi@kitchen" and told["remote"]["notes"] == "fan" and told["cores"] == 4
    assert main(["devices", "show", "kitchen"]) == 0
    assert "host = pi@kitchen" in capsys.readouterr().out
    assert cli_json(capsys, "devices", "rm", "kitchen")["name"] == "kitchen"
    assert main(["devices", "show", "kitchen"]) == 2


def test_check_prints_findings_and_fails(capsys: Capture, model_cache: Path, monkeypatch: Patch) -> None:
    full = Finding("disk", "warning", "1 MB free", "A lot is needed.")
    found = (Finding("ssh", "ok", "Linux aarch64"), full)
    monkeypatch.setattr(environment, "check", lambda profile: Report(profile.remote.host, found))
    monkeypatch.setattr(workdir, "clean", lambda profile: "/home/pi/.cache/arte-edge-device")
    assert main(["devices", "check", "pi@kitchen"]) == 0
    printed = capsys.readouterr().out
    assert "Linux aarch64" in printed and "warning: 1 MB free" in printed and "A lot is needed." in printed
    removed = cli_json(capsys, "devices", "check", "pi@kitchen", "--clean")["removed"]
    assert removed == "/home/pi/.cache/arte-edge-device"
    failed = Report("pi@kitchen", (Finding("ssh", "failed", "no answer", "Is it on?"),))
    monkeypatch.setattr(environment, "check", lambda profile: failed)
    assert main(["devices", "check", "pi@kitchen", "--clean", "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["removed"] == "" and "Is it on?" in printed.err
