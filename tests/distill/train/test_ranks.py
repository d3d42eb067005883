"""Two processes that share a training: the losses and the model of one, and only one of them writes."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tiny import hf_logits

from arte_edge.distill.train import sft
from arte_edge.distill.train.collapse import ProbeResult
from arte_edge.distill.train.common import DpoSettings, Lora, SftSettings
from arte_edge.distill.train.dpo import train_dpo
from arte_edge.distill.train.ranks import refuse_processes, shared_batch, slot_weights
from arte_edge.distill.train.sft import train_sft
from arte_edge.errors import ArteError, InputError

SFT = SftSettings(learning_rate=3e-3, batch_size=4, seed=3)
DPO = DpoSettings(
    learning_rate=2e-2, batch_size=1, accumulate=4, epochs=1.0, lora=Lora(rank=4, alpha=8), probe_every=2, seed=1
)
PAIRS = [
    {
        "prompt": f"<|user|>Write a question {i % 4}." + " not" * (i % 3) + "\n",
        "chosen": f"<ans>yes{i}</ans>",
        "rejected": "maybe " * (1 + i % 3) + "no",
    }
    for i in range(11)  # the last step has three, which two processes cannot share evenly
]


def losses(result: Any) -> list[float]:
    return [row["loss"] for row in result.history]


@pytest.mark.parametrize("kind", ["full", pytest.param("lora, soft labels", marks=pytest.mark.slow)])
def test_two_processes_tune_as_one_does(
    kind: str, tiny_checkpoint: Any, sft_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "_without_labels", None)  # one process fills no step up
    rows = [*sft_rows, {"prompt": "<|user|>Is it true?\n", "completion": "<ans>no</ans>"}]  # 13: the last step has one
    settings = SFT.model_copy(update={} if kind == "full" else {"lora": Lora(rank=4, alpha=8)})
    if kind != "full":
        rows = [row | {"others": {"<ans>maybe</ans>": 0.05 + 0.05 * (i % 7)}} for i, row in enumerate(rows)]
    one = train_sft(tiny_checkpoint(), rows, tmp_path / "one", settings)
    steps: list[tuple[int, int]] = []
    listening: set[str] = set()

    def look(done: int, total: int) -> None:
        steps.append((done, total))
        for process in psutil.Process().children(recursive=True):
            sockets = process.net_connections("inet")
            listening.update(socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN)

    two = train_sft(tiny_checkpoint(), rows, tmp_path / "two", settings, processes=2, progress=look)
    # where gradients are exchanged: some kernels write 127.0.0.1 as an IPv6 address
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert losses(two) == pytest.approx(losses(one), abs=1e-4) and len(losses(two)) == 4
    assert losses(one)[-1] < losses(one)[0] - 0.01
    assert steps == [(i, 4) for i in range(1, 5)]
    assert (two.steps, two.examples, two.dropped) == (one.steps, one.examples, one.dropped)
    ids = range(5, 25)
    assert np.abs(hf_logits(two.checkpoint, ids) - hf_logits(one.checkpoint, ids)).max() < 0.02  # written in 16 bits
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("target_kl", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_two_processes_align_as_one_does(
    target_kl: float, tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DPO.model_copy(update={"target_kl": target_kl} | ({"learning_rate": 1e-4} if target_kl else {}))
    looks: list[str] = []
    kill: list[str] = []

    def probe(folder: Path) -> ProbeResult:
        looks.append(folder.name)
        assert (folder / "adapter_model.safetensors").is_file()
        step = int(folder.name.removeprefix("step-"))
        if step == 2 and kill:
            os.kill(rank_ids(tmp_path)[kill.pop()], signal.SIGKILL)
        return ProbeResult(valid_rate=0.7 + step / 100, mean_tokens=40.0 + step)

    more: dict[str, Any] = {"held_out": PAIRS[:3], "probe": probe}
    one = train_dpo(tiny_checkpoint(), PAIRS, tmp_path / "one", settings, **more)
    looks.clear()
    more["processes"] = 2
    if not target_kl and Path("/proc/self/environ").exists():  # a check gets the result of its own step then too
        (tmp_path / "noise").mkdir()
        (tmp_path / "noise" / "sitecustomize.py").write_text(_NOISE)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'noise'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        kill.append("0")
        with pytest.raises(ArteError, match="process 0 ended with SIGKILL"):
            train_dpo(tiny_checkpoint(), PAIRS, tmp_path / "two", settings, **more)
    two = train_dpo(tiny_checkpoint(), PAIRS, tmp_path / "two", settings, **more)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert len(losses(two)) == 3 or target_kl
    for key in ("rewards/chosen", "rewards/margins", "learning_rate"):
        assert [row[key] for row in two.history[:2]] == pytest.approx([row[key] for row in one.history[:2]], abs=1e-4)
    for key in ("step", "valid_rate", "mean_tokens"):
        assert [check[key] for check in two.probes] == [check[key] for check in one.probes]
    assert list(dict.fromkeys(looks)) == [f"step-{check['step']}" for check in two.probes]
    assert two.held_out.kl == pytest.approx(one.held_out.kl, rel=1e-3, abs=1e-5)
    assert two.held_out.margin == pytest.approx(one.held_out.margin, abs=1e-3)
    ids = range(5, 25)
    a, b = (hf_logits(tiny_checkpoint(), ids, result.adapter) for result in (one, two))
    assert np.abs(a - b).max() < 1e-3 and np.abs(a - hf_logits(tiny_checkpoint(), ids)).max() > 0.01


# A library that prints, without ever ending a line.
_NOISE = """
import os, threading, time
if "RANK" in os.environ:
    def print_on():
        while True:
            os.write(1, b"noise")
            time.sleep(0.02)
    threading.Thread(target=print_on, daemon=True).start()
"""


# Writes down what a process other than rank 0 opens for writing, makes, moves or removes below the folder.
_WATCH = """
import os, sys
if os.environ.get("RANK", "0") != "0":
    root, log = os.environ["WATCHED"], os.environ["WATCH_LOG"]
    busy = []
    def hook(event, args):
        names = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        writes = event in names or event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes and not busy and str(args[0]).startswith(root):
            busy.append(1)
            with open(log, "a") as file:
                print(event, args[0], file=file)
            busy.clear()
    sys.addaudithook(hook)
"""


def rank_ids(folder: Path) -> dict[str, int]:
    """Return the process ids of the ranks that train in this folder."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, names = (process / "cmdline").read_bytes(), (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((name[5:].decode() for name in names if name.startswith(b"RANK=")), None)
        if rank is not None and str(folder).encode() in words:
            found[rank] = int(process.name)
    return found


# accelerate shards on GPUs alone; torch also does on a CPU, where this test runs.
_SHARD_ON_CPU = """
from accelerate import PartialState
from accelerate.utils import DistributedType
init = PartialState.__init__
def sharded(self, *args, **kwargs):
    init(self, *args, **kwargs)
    if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_XPU
PartialState.__init__ = sharded
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_a_teacher_that_is_spread_over_processes_is_aligned_as_on_one(
    broken: bool, tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(_SHARD_ON_CPU)

    def probe(folder: Path) -> ProbeResult:
        return ProbeResult(0.1 if broken and folder.name == "step-4" else 0.75, 40.0)

    settings = DPO.model_copy(update={"target_kl": 0.1, "learning_rate": 1e-4})
    more: dict[str, Any] = {"held_out": PAIRS[:3], "probe": probe}
    one = train_dpo(tiny_checkpoint(), PAIRS, tmp_path / "one", settings, **more)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'shim'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    more |= {"processes": 2, "sharded": True}

    def kill(done: int, total: int) -> None:
        if done == 3:
            os.kill(rank_ids(tmp_path)["1"], signal.SIGKILL)

    if not broken:  # it resumes from the check after step 2
        with pytest.raises(ArteError, match="one was lost"):
            train_dpo(tiny_checkpoint(), PAIRS, tmp_path / "two", settings, **more, progress=kill)
    steps: list[int] = []
    more["progress"] = lambda done, total: steps.append(done)
    two = train_dpo(tiny_checkpoint(), PAIRS, tmp_path / "two", settings, **more)
    assert steps[0] == (1 if broken else 3)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    for key in ("steps", "kept_step", "collapse"):
        assert getattr(two, key) == getattr(one, key), key
    assert bool(one.collapse) == broken
    assert two.held_out.kl == pytest.approx(one.held_out.kl, rel=1e-3, abs=1e-6)
    assert two.held_out.margin == pytest.approx(one.held_out.margin, abs=1e-3)
    ids = range(5, 25)
    a, b = (hf_logits(tiny_checkpoint(), ids, result.adapter) for result in (one, two))
    assert np.abs(a - b).max() < 1e-3


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_lost_process_ends_the_training_which_resumes_on_any_number(
    tiny_checkpoint: Any, sft_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(_WATCH)
    folder, log = tmp_path / "runs", tmp_path / "written"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'watch'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("WATCHED", str(folder))
    monkeypatch.setenv("WATCH_LOG", str(log))
    settings = SFT.model_copy(update={"epochs": 2.0, "save_every_s": 0.0})

    def kill(done: int, total: int) -> None:
        if done == 3:
            os.kill(rank_ids(folder)["1"], signal.SIGKILL)

    with pytest.raises(ArteError, match=r"2 processes: one was lost") as caught:
        train_sft(tiny_checkpoint(), sft_rows, folder / "out", settings, processes=2, progress=kill)
    assert "resumes" in caught.value.hint
    assert not rank_ids(folder) and not log.exists()
    steps: list[int] = []
    found = train_sft(
        tiny_checkpoint(), sft_rows, folder / "out", settings, progress=lambda done, total: steps.append(done)
    )
    whole = train_sft(tiny_checkpoint(), sft_rows, tmp_path / "whole", settings)
    assert steps[0] >= 3 and steps[-1] == 6
    assert losses(found) == pytest.approx(losses(whole), abs=1e-4)


@pytest.mark.slow
def test_what_a_rank_cannot_use_is_the_error_of_one_process(
    tiny_checkpoint: Any, sft_rows: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="fits into 8 tokens"):
        train_sft(tiny_checkpoint(), sft_rows, tmp_path / "out", SFT.model_copy(update={"max_length": 8}), processes=2)


@pytest.mark.parametrize(
    ("batch", "accumulate", "n", "most", "expected"),
    [(4, 1, 2, 4, (2, 1)), (1, 4, 2, 1, (1, 2)), (8, 2, 4, 8, (4, 1)), (2, 8, 2, 2, (2, 4)), (6, 1, 2, 2, (1, 3))],
)
def test_a_steps_examples_are_dealt_out(
    batch: int, accumulate: int, n: int, most: int, expected: tuple[int, int]
) -> None:
    assert shared_batch(batch, accumulate, n, most) == expected


def test_a_step_that_cannot_be_dealt_out_names_the_keys() -> None:
    with pytest.raises(InputError, match="the 4 examples") as caught:
        shared_batch(4, 1, 3, 4)
    assert "align.batch_size" in caught.value.hint


@pytest.mark.parametrize(
    ("n_example", "batch", "accumulate", "n"), [(11, 1, 4, 2), (8, 1, 4, 2), (7, 2, 2, 2), (5, 4, 1, 4)]
)
def test_weights_make_the_mean_over_ranks_that_of_one_process(
    n_example: int, batch: int, accumulate: int, n: int
) -> None:
    weights = slot_weights(n_example, batch, accumulate, n)
    assert len(weights) % n == 0 and len(weights) - n_example < n
    values = np.random.default_rng(0).normal(size=n_example)
    last = n_example % (batch * accumulate) or batch * accumulate
    tail = values[-last:]
    alone = np.mean([tail[i : i + batch].mean() for i in range(0, last, batch)])
    slots = weights[n_example - last :]
    shared = np.mean([w * v for w, v in zip(slots, [*tail, *[9.0] * n], strict=False)])
    assert shared == pytest.approx(alone)


def test_a_run_is_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_processes(2)
    with pytest.raises(InputError, match=r"train\.shard_teacher"):
        refuse_processes(2, sharded=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match="accelerate launch"):
        refuse_processes(1)
