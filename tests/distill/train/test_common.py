from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from arte_edge.distill.train.common import SftSettings, load, quiet_training
from arte_edge.distill.train.sft import train_sft
from arte_edge.errors import ArteError, InputError


def test_a_training_speaks_to_nobody_and_prints_nothing(
    tiny_checkpoint: Any,
    sft_rows: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import _telemetry

    monkeypatch.delenv("CI", raising=False)  # TRL reports itself unless it believes it is tested
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: asked.append(args) or [])
    reported: list[Any] = []
    monkeypatch.setattr(_telemetry._TELEMETRY_QUEUE, "put", lambda item: reported.append(item))
    train_sft(tiny_checkpoint(), sft_rows, tmp_path / "out", SftSettings(epochs=0.5))
    assert not asked and not reported
    assert capfd.readouterr().out == ""


def test_progress_bars_are_afterwards_as_they_were() -> None:
    from transformers.utils import logging

    for set_before, was in ((logging.disable_progress_bar, False), (logging.enable_progress_bar, True)):
        set_before()
        with quiet_training():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() is was


def test_an_unreadable_checkpoint_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=str(tmp_path)):
        load(tmp_path, frozen=False)


def test_missing_libraries_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arte_edge.extras.find_spec", lambda module: None if module == "trl" else object())
    with pytest.raises(ArteError, match="trl") as caught, quiet_training():
        pass
    assert "arte-edge[train]" in caught.value.hint
