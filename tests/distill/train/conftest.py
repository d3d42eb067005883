"""A tiny random Llama with a real byte-level tokenizer, with and without a begin token of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import Folders, Make

TEXT = "Is true and false true? no yes maybe the answer is not 0123456789 <ans> </ans> . \n"


@pytest.fixture(scope="module", autouse=True)  # not the session: other folders follow
def one_thread() -> Iterator[None]:
    """Train tiny models on one thread: threads that wait for each other cost more than they bring."""
    import torch

    threads = torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that a training starts
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    del os.environ["OMP_NUM_THREADS"]


@pytest.fixture(scope="module", autouse=True)
def float32() -> Iterator[None]:
    """Train in float32 on every processor: tests compare two ways of computing one number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARTE_EDGE_DTYPE", "float32")
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: Folders) -> Make:
    """Make the checkpoint folder of a random two-layer model; the same call gives the same folder."""
    made: dict[tuple[bool, str], Path] = {}

    def make(*, adds_bos: bool = False, arch: str = "llama") -> Path:
        if (adds_bos, arch) not in made:
            specials = ["<pad>", "<bos>", "<eos>", "<|user|>"]
            inner = tiny.bpe([TEXT] * 20, specials, 330, begin="<bos>" if adds_bos else "")
            tokenizer = tiny.chat_tokenizer(
                inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", additional_special_tokens=["<|user|>"]
            )
            made[adds_bos, arch] = tiny.save_checkpoint(
                tmp_path_factory.mktemp("tiny") / "base",
                tokenizer,
                {"gemma3": "gemma3_text"}.get(arch, arch),
                seed=5,
                dtype="bfloat16",
                hidden_size=32,
                intermediate_size=48,
                head_dim=8,
                initializer_range=0.2,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                tie_word_embeddings=True,
            )
        return made[adds_bos, arch]

    return make


@pytest.fixture(scope="session")
def sft_rows() -> list[dict[str, str]]:
    """Prompt and completion pairs of different lengths."""
    return [
        {
            "prompt": f"<|user|>Is {i} true?" + " and" * (i % 5) + "\n",
            "completion": f"<ans>{'yes' if i % 2 else 'no'}</ans>",
        }
        for i in range(12)
    ]


# Imports once, which takes seconds, and forks for each training.
_KILLED = """
import json, os, signal, sys, traceback
from pathlib import Path
import peft, trl
from arte_edge.distill.train import common, dpo, sft
from arte_edge.distill.train.collapse import ProbeResult

def train(kind, checkpoint, rows, out, settings, step, look, more):
    looks = []
    def probe(folder):
        looks.append(folder.name)
        if len(looks) == look:
            os.kill(os.getpid(), signal.SIGKILL)
        return ProbeResult(0.75, 40.0)
    def progress(done, total):
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)
    start = dpo.train_dpo if kind == "Dpo" else sft.train_sft
    more |= {"probe": probe} if kind == "Dpo" else {}
    settings = getattr(common, f"{kind}Settings")(**settings)
    start(Path(checkpoint), rows, Path(out), settings, progress=progress, **more)

for line in sys.stdin:
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    try:
        os.dup2(2, 1)
        train(*json.loads(line))
    except BaseException:
        traceback.print_exc()
    os._exit(1)
"""


@pytest.fixture(scope="session")
def kill(tiny_checkpoint: Make, tmp_path_factory: Folders) -> Iterator[Make]:
    """Start a training that is killed after an optimizer step or during a look of the probe."""
    log = tmp_path_factory.mktemp("kill") / "log"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ARTE_EDGE_DTYPE": "float32"}
    environment |= {"OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES"}  # else macOS ends what is forked
    with log.open("wb") as said:
        server = subprocess.Popen([sys.executable, "-c", _KILLED], stderr=said, env=environment, **pipes)

    def killed(kind: str, rows: Any, out: Path, settings: Any, *, step: int = 0, look: int = 0, **more: Any) -> None:
        call = [kind, str(tiny_checkpoint()), rows, str(out), settings.model_dump(mode="json"), step, look, more]
        server.stdin.write(json.dumps(call) + "\n")
        server.stdin.flush()
        assert server.stdout.readline() == "-9\n", log.read_text()

    yield killed
    server.communicate()
