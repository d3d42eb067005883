"""A checkpoint's config.json in the words of transformers 4, which optimum still reads.

transformers 5 writes all of a model's rotary embedding into ``rope_parameters`` and the weights'
type into ``dtype``. Version 4 does not know the first key, says nothing, and takes its default
base frequency: the model would load and write nonsense. So the old keys are written instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arte_edge.errors import InputError

__all__ = ["for_transformers_4"]

# What version 4 keeps at the top of a config and not in rope_scaling.
_TOP = ("rope_theta", "partial_rotary_factor")
_FULL, _LOCAL = "full_attention", "sliding_attention"


def for_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` as transformers 4 would have written it; one that it wrote comes back as it is.

    Raises:
        InputError: the rotary embedding cannot be said in version 4's words.
    """
    out = {key: value for key, value in config.items() if key not in ("rope_parameters", "_name_or_path")}
    if "dtype" in out:
        out.setdefault("torch_dtype", out.pop("dtype"))
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return out
    if _FULL in rope:  # Gemma 3: a rotary embedding of its own for the layers that see a window
        local = dict(rope.get(_LOCAL) or {})
        if local.get("rope_type", "default") != "default":
            raise InputError(
                "Optimum's transformers 4 knows no scaled rotary embedding for windowed layers",
                "Export to onnxruntime-genai's layout instead.",
            )
        out["rope_local_base_freq"] = local.get("rope_theta", 10_000.0)
        rope = rope[_FULL]
    for key in _TOP:
        if rope.get(key) is not None:
            out[key] = rope[key]
    rest = {key: value for key, value in rope.items() if key not in _TOP}
    out["rope_scaling"] = rest if rest.get("rope_type", "default") != "default" else None
    return out
