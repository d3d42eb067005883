"""The gate on a real model: good files pass, and faults that need a real model are found."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import Folders

from arte_edge.models import LocalModel
from arte_edge.runtimes.loader import open_model
from arte_edge.runtimes.protocol import Runtime
from arte_edge.verify.gate import Verdict, verify_file
from arte_edge.verify.logits import built_in_prompts

from .conftest import with_tensor
from .test_broken_exports import unpermuted

pytestmark = pytest.mark.model
_PROMPTS = slice(0, 16, 5)  # four of the built-in dialogues: enough for a verdict, quick on one core


@pytest.fixture(scope="module")
def checkpoint(smollm2: LocalModel) -> Path:
    return smollm2.checkpoint()


@pytest.fixture(scope="module")
def f16(smollm2: LocalModel, checkpoint: Path, tmp_path_factory: Folders) -> Path:
    from arte_edge.gguf.from_base import checkpoint_to_gguf

    assert smollm2.gguf is not None
    return checkpoint_to_gguf(checkpoint, smollm2.gguf, tmp_path_factory.mktemp("smollm2") / "F16.gguf")


@pytest.fixture(scope="module")
def student(checkpoint: Path) -> Iterator[Runtime]:
    model = open_model(checkpoint)
    yield model
    model.close()


def quantized(f16: Path, type: str) -> Path:
    from arte_edge.gguf.quantize import quantize

    out = f16.with_name(f"{type}.gguf")
    if not out.exists():
        quantize(f16, out, type)
    return out


def gate(student: Runtime, artifact: Path) -> Verdict:
    return verify_file(student, artifact, built_in_prompts(student)[_PROMPTS])


@pytest.mark.parametrize("type", ["F16", "Q8_0"])
def test_a_good_file_raises_no_alarm(student: Runtime, f16: Path, type: str) -> None:
    verdict = gate(student, f16 if type == "F16" else quantized(f16, type))
    assert verdict.thresholds_of == type
    assert verdict.passed, verdict.reason


def shuffled(rows: NDArray[Any]) -> NDArray[Any]:
    return np.random.default_rng(0).permutation(rows, axis=0)


@pytest.mark.parametrize(
    ("name", "change"), [("blk.15.ffn_down.weight", shuffled), ("blk.3.attn_q.weight", partial(unpermuted, heads=9))]
)
def test_one_wrong_tensor_shows_through_the_rounding_of_4_bits(
    student: Runtime, f16: Path, tmp_path: Path, name: str, change: Any
) -> None:
    verdict = gate(student, with_tensor(quantized(f16, "Q4_K_M"), tmp_path / "wrong.gguf", name, change))
    assert "kl mean" in {check.name for check in verdict.failed}
