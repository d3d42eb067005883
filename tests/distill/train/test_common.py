import platform
import resource
import socket
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Capture, Patch

from arte_edge.distill.train import common, dpo, sft
from arte_edge.distill.train.checkpoints import Workspace
from arte_edge.distill.train.common import (
    Encoder,
    SftSettings,
    check_rows,
    freed_memory_kept,
    load,
    quiet_training,
    training_order,
)
from arte_edge.distill.train.sft import train_sft
from arte_edge.errors import ArteError, InputError


def test_a_training_speaks_to_nobody_and_prints_nothing(
    tiny_checkpoint: Any, sft_rows: Any, tmp_path: Path, monkeypatch: Patch, capfd: Capture
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


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_the_model_is_gone_when_its_memory_is_freed(
    kind: str, tiny_checkpoint: Any, sft_rows: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    room = {"dpo": dpo, "sft": sft}[kind]
    models: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def load_seen(*args: Any, **how: Any) -> Any:
        model, tokenizer = load(*args, **how)
        models.append(weakref.ref(model))
        return model, tokenizer

    def free_seen() -> None:
        common.free_memory()
        alive.extend(model() is not None for model in models)

    monkeypatch.setattr(room, "load", load_seen)
    monkeypatch.setattr(room, "free_memory", free_seen)
    if kind == "sft":
        train_sft(tiny_checkpoint(), sft_rows, tmp_path / "out", SftSettings(epochs=0.5))
    else:
        pairs = [{"prompt": "<|user|>Is it?\n", "chosen": "<ans>yes</ans>", "rejected": "no"}] * 2
        dpo.train_dpo(tiny_checkpoint(), pairs, tmp_path / "out", common.DpoSettings(batch_size=2, accumulate=1))
    assert alive == [False]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep memory by their own rules")
def test_a_training_takes_freed_memory_again_without_page_faults(monkeypatch: Patch) -> None:
    monkeypatch.setenv("ARTE_EDGE_DEVICE", "cpu")

    def page_faults() -> int:  # of 40 blocks of 64 MiB, one after the other
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(40):
            torch.ones(1 << 24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    cleared = page_faults()
    with freed_memory_kept():
        kept = page_faults()
    assert kept < cleared / 3


def test_progress_bars_are_afterwards_as_they_were() -> None:
    from transformers.utils import logging

    for set_before, was in ((logging.disable_progress_bar, False), (logging.enable_progress_bar, True)):
        set_before()
        with quiet_training():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() is was


@pytest.mark.parametrize(
    ("device", "floats", "flags"),
    [
        ("cuda", "float16", {"fp16", "dataloader_pin_memory"}),
        ("cuda", "bfloat16", {"bf16", "dataloader_pin_memory"}),
        ("mps", "float32", set()),
        ("cpu", "float32", {"use_cpu"}),
    ],
)
def test_a_training_uses_what_the_device_has(
    device: str, floats: str, flags: set[str], tiny_checkpoint: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(common, "pick_device", lambda: torch.device(device))
    monkeypatch.setattr(common, "training_floats", lambda checkpoint, frozen=False: floats)
    work = Workspace(tmp_path / "out", "")
    found = common.arguments(tiny_checkpoint(), work, SftSettings(), 8, "linear", most=8, at_once=8, labelled=4)
    assert {key for key in ("bf16", "fp16", "use_cpu", "dataloader_pin_memory") if found[key]} == flags
    dtypes = [load(tiny_checkpoint(), frozen=frozen)[0].dtype for frozen in (True, False)]
    assert dtypes == [getattr(torch, floats), torch.float32]  # trained weights are never rounded


def test_an_unreadable_checkpoint_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=str(tmp_path)):
        load(tmp_path, frozen=False)


def test_missing_libraries_are_named_with_the_command(monkeypatch: Patch) -> None:
    monkeypatch.setattr("arte_edge.extras.find_spec", lambda module: None if module == "trl" else object())
    with pytest.raises(ArteError, match="trl") as caught, quiet_training():
        pass
    assert "arte-edge[train]" in caught.value.hint


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=80), st.integers(1, 9), st.floats(0.1, 3.5), st.integers(0, 5)
)
def test_every_example_is_seen_as_often_as_any_other(
    lengths: list[int], batch_size: int, epochs: float, seed: int
) -> None:
    order = training_order(lengths, batch_size, epochs, seed)
    assert len(order) == max(1, round(len(lengths) * epochs))
    seen = Counter(order)
    counts = [seen[i] for i in range(len(lengths))]
    assert max(counts) - min(counts) <= 1
    assert order == training_order(lengths, batch_size, epochs, seed)


def test_batches_hold_like_lengths_and_come_in_random_order() -> None:
    lengths = [(i * 37) % 200 + 1 for i in range(64)]
    order = training_order(lengths, 8, 1.0, 0)
    batches = [order[i : i + 8] for i in range(0, 64, 8)]
    padded = sum(8 * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest != sorted(longest)
    assert training_order(lengths, 8, 1.0, 1) != order


BOS, EOS = 1, 2


def encoder(checkpoint: Any) -> Encoder:
    from transformers import AutoTokenizer

    return Encoder(AutoTokenizer.from_pretrained(checkpoint))


def test_a_prompt_has_the_begin_token_that_the_model_needs_once(tiny_checkpoint: Any) -> None:
    plain, wants = encoder(tiny_checkpoint()), encoder(tiny_checkpoint(adds_bos=True))
    for text in ("<bos><|user|>Is true?", "<|user|>Is true?"):
        ids = wants.prompt(text)
        assert ids[0] == BOS and ids.count(BOS) == 1
        assert plain.prompt(text).count(BOS) == text.count("<bos>")  # what the template wrote
    assert plain.tokenizer.convert_tokens_to_ids("<|user|>") in plain.prompt("<|user|>no")


def test_a_completion_is_closed_by_one_end_token(tiny_checkpoint: Any) -> None:
    for coder in (encoder(tiny_checkpoint()), encoder(tiny_checkpoint(adds_bos=True))):
        for text in ("<ans>no</ans>", "<ans>no</ans><eos>"):
            ids = coder.completion("Is true?\n", text)
            assert ids[-1] == EOS and ids.count(EOS) == 1 and BOS not in ids
    coder.tokenizer.eos_token = None
    with pytest.raises(InputError, match="end token"):
        coder.completion("a", "b")


@settings(max_examples=80, deadline=None)
@given(prompt=st.text("ab tre\n<>", min_size=1), completion=st.text("ab tre\n<>", min_size=1))
def test_prompt_and_completion_join_to_the_text_whatever_the_seam(
    prompt: str, completion: str, tiny_checkpoint: Any
) -> None:
    coder = encoder(tiny_checkpoint())
    ids = coder.prompt(prompt) + coder.completion(prompt, completion)
    assert coder.tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion


def test_a_word_cut_by_the_seam_leaves_the_prompt_as_the_engine_sees_it(tiny_checkpoint: Any) -> None:
    coder = encoder(tiny_checkpoint())
    whole = coder.prompt("the answer")
    assert whole[: len(coder.prompt("the ans"))] != coder.prompt("the ans")  # the seam would merge
    ids = coder.completion("the ans", "wer")
    assert coder.tokenizer.decode(ids[:-1]) == "wer"


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], "no example"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}], "example 2: 'completion'"),
        ([{"prompt": "a"}], "'completion'"),
        ([{"prompt": "a", "completion": "b", "target": "c"}], "'target'"),
    ],
)
def test_a_bad_row_is_named(rows: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        check_rows(rows, ("prompt", "completion"), "example")
