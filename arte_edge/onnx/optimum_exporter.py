"""Export a checkpoint to portable ONNX with optimum: the layout of plain onnxruntime and transformers.js.

On a CPU the layout of `genai_builder` is several times faster; this one runs wherever ONNX does, also in
browsers. optimum needs an older transformers than arte-edge, so it runs in its own environment
(`find_python`). transformers 5 writes the rotary embedding to ``rope_parameters``; version 4 silently ignores
that key and uses its default base frequency, so the old keys are written for it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from arte_edge.errors import ArteError, InputError
from arte_edge.extras import need
from arte_edge.files import read_json
from arte_edge.onnx.build import checkpoint_files, child_environment, run_worker, staged
from arte_edge.onnx.check import finish, model_file

# Keys that version 4 has at the top level and not in rope_scaling.
_TOP = ("rope_theta", "partial_rotary_factor")
_FULL, _LOCAL = "full_attention", "sliding_attention"


def for_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` in the format of transformers 4; one in that format is returned unchanged.

    Raises InputError: version 4 does not support the rotary embedding.
    """
    out = {key: value for key, value in config.items() if key not in ("rope_parameters", "_name_or_path")}
    if "dtype" in out:
        out.setdefault("torch_dtype", out.pop("dtype"))
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return out
    if _FULL in rope:  # Gemma 3: sliding-window layers have their own rotary embedding
        local = dict(rope.get(_LOCAL) or {})
        if local.get("rope_type", "default") != "default":
            raise InputError(
                "Optimum's transformers 4 does not support scaled rotary embeddings for windowed layers",
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


_ENVIRONMENT = ".venv-optimum"
_VARIABLE = "ARTE_EDGE_OPTIMUM_PYTHON"
# Not arte-edge[optimum] into this environment, which cannot have transformers 4 and 5 at once.
INSTALL = (
    f"python3 -m venv {_ENVIRONMENT} && {_ENVIRONMENT}/bin/pip install "
    "'optimum-onnx[onnxruntime]==0.1.0' 'transformers<4.58' torch"
)
# Read from package metadata: importing the packages takes longer than some exports.
_PROBE = """
from importlib.metadata import version
for name in ("optimum-onnx", "onnxruntime", "torch", "transformers"):
    found = version(name)
if tuple(int(part) for part in found.split(".")[:2]) >= (4, 58):
    raise SystemExit(f"it has transformers {found}")
"""
_PROBE_TIMEOUT_S = 60


def find_python() -> Path:
    """Return a Python with optimum: ``ARTE_EDGE_OPTIMUM_PYTHON``, ./.venv-optimum, or this one.

    Raises InputError: the variable's Python has no optimum;
    ArteError: there is none; the hint is the command that creates an environment.
    """
    if chosen := os.environ.get(_VARIABLE):
        if problem := _lacks_optimum(Path(chosen)):
            raise InputError(f"{_VARIABLE}={chosen}: {problem}", f"To create such an environment:\n{INSTALL}")
        return Path(chosen)
    below = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    own = Path(_ENVIRONMENT, below).absolute()
    problem = "not found"
    if own.exists() and not (problem := _lacks_optimum(own)):
        return own
    if find_spec("optimum") is not None and not _lacks_optimum(Path(sys.executable)):
        return Path(sys.executable)
    raise ArteError(
        f"The portable ONNX layout needs optimum-onnx in its own environment ({_ENVIRONMENT}: {problem})",
        f"{INSTALL}\nor set {_VARIABLE} to the Python of an environment with it.",
    )


def _lacks_optimum(python: Path) -> str:
    """Return why `python` cannot export, empty if it can."""
    try:
        done = subprocess.run(
            [str(python), "-P", "-c", _PROBE],
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be run ({error})"
    if not done.returncode:
        return ""
    return next(reversed(done.stderr.strip().splitlines()), f"exit {done.returncode}")


def build(
    checkpoint: Path,
    out: Path,
    precision: Literal["fp32", "int8"] = "int8",
    arch: str = "avx2",
    *,
    fp32: Path | None = None,
) -> Path:
    """Export `checkpoint` to the folder `out`, atomically and checked; return `out`.

    It contains ``onnx/model.onnx`` or ``onnx/model_quantized.onnx`` (the names for transformers.js), config
    files, and the checkpoint's tokenizer files. An earlier export is replaced. Nothing is downloaded.

    Args:
        precision: "int8" quantizes weights statically and activations dynamically.
        arch: instruction set for int8 products: arm64, avx2 or avx512; unused with "fp32".
        fp32: an existing fp32 export of the checkpoint, to quantize; unused with precision "fp32".

    Raises InputError: not a checkpoint, or `out` is something else;
    ArteError: no environment has optimum, optimum failed, or its output is invalid.
    """
    need("onnx", "Exporting to ONNX")
    checkpoint = checkpoint.absolute()
    weights = checkpoint_files(checkpoint)
    python = find_python()
    with staged(out) as folder:
        work = folder.parent
        source, written = work / "checkpoint", work / "written"
        written.mkdir()
        if fp32 is None or precision == "fp32":
            _link_checkpoint(checkpoint, weights, source)
            job = {"job": "optimum", "checkpoint": str(source), "out": str(written)}
            run_worker(job, work, python=str(python), what="optimum's export")
            job = {"job": "simplify", "path": str(written / "model.onnx")}
            run_worker(job, work, what="Simplifying optimum's graph")
        else:
            _link_checkpoint(checkpoint, [], source)
        if precision == "int8":
            model = model_file(fp32).absolute() if fp32 else written / "model.onnx"
            written = work / "quantized"
            written.mkdir()
            job = {"job": "quantize", "source": str(model), "out": str(written), "arch": arch}
            run_worker(job, work, python=str(python), what="optimum's quantizer")
        (folder / "onnx").mkdir()
        for path in sorted(written.glob("*.onnx*")):
            path.replace(folder / "onnx" / path.name)
        shutil.copyfile(source / "config.json", folder / "config.json")  # of version 4, as for transformers.js
        if (checkpoint / "generation_config.json").is_file():
            shutil.copyfile(checkpoint / "generation_config.json", folder / "generation_config.json")
        finish(checkpoint, folder)
    return out


def _link_checkpoint(checkpoint: Path, weights: list[Path], folder: Path) -> None:
    """Create `folder` with links to the weights and a config for transformers 4."""
    folder.mkdir()
    for path in weights:
        try:
            (folder / path.name).symlink_to(path)
        except OSError:  # Windows without permission to create links
            shutil.copyfile(path, folder / path.name)
    config = for_transformers_4(read_json(checkpoint / "config.json"))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
