from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from arte_edge.errors import InputError
from arte_edge.gguf.reader import FILE_TYPES
from arte_edge.verify.check import STRICTEST, TYPES, Thresholds, thresholds_for
from arte_edge.verify.gate import _type_of


def test_every_gguf_type_has_thresholds() -> None:
    assert set(FILE_TYPES.values()) <= set(TYPES)
    assert {"fp32", "int8", "int4"} <= set(TYPES)
    assert thresholds_for("q4_k_m") is TYPES["Q4_K_M"]
    with pytest.raises(InputError, match="Q9_X"):
        thresholds_for("Q9_X")


@pytest.mark.parametrize("name", ["kl_mean", "kl_p99", "perplexity_ratio", "accuracy_drop"])
def test_fewer_bits_never_have_a_stricter_threshold(name: str) -> None:
    order = (STRICTEST, "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "IQ1_S")
    limits = [getattr(TYPES[type], name) for type in order]
    assert limits == sorted(limits)
    assert [TYPES[type].top1 for type in order] == sorted((TYPES[t].top1 for t in order), reverse=True)  # type: ignore[type-var]


def test_int8_of_optimum_is_judged_by_the_limits_of_its_export(tmp_path: Path) -> None:
    model: Any = SimpleNamespace(quantization="int8")
    assert _type_of(model, tmp_path) == "optimum-int8"
    (tmp_path / "genai_config.json").touch()
    assert _type_of(model, tmp_path) == "int8"
    model.quantization = "int3"
    assert _type_of(model, tmp_path) == STRICTEST


def test_thresholds_of_a_recipe_are_checked() -> None:
    assert Thresholds(kl_mean=None).token_differences == 0
    for wrong in ({"kl_meen": 1.0}, {"top1": 1.5}, {"kl_mean": -1}):
        with pytest.raises(ValidationError):
            Thresholds.model_validate(wrong)
