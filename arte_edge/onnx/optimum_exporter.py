"""A checkpoint's config.json in the words of transformers 4, which optimum still reads.

transformers 5 writes all of a model's rotary embedding into ``rope_parameters`` and the weights'
type into ``dtype``. Version 4 does not know the first key, says nothing, and takes its default
base frequency: the model would load and write nonsense. So the old keys are written instead.

A checkpoint as portable ONNX: the layout that plain onnxruntime and transformers.js read.

Exported by optimum, which needs an older transformers than the rest of arte-edge, so it runs in
an environment of its own (see `find_python`). For a CPU the layout of `genai_builder` is several
times faster; this one runs wherever ONNX does, browsers included.
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

from pydantic import BaseModel, ConfigDict

from arte_edge.errors import ArteError, InputError
from arte_edge.extras import need
from arte_edge.onnx.check import model_file, require_sound
from arte_edge.onnx.child_process import child_environment, run_worker
from arte_edge.onnx.folder import checkpoint_files, copy_tokenizer, refuse_leaks, staged
from arte_edge.onnx.tokenizer import read_json

__all__ = ["INSTALL", "OptimumSettings", "build", "find_python", "for_transformers_4"]

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


_ENVIRONMENT = ".venv-optimum"
_VARIABLE = "ARTE_EDGE_OPTIMUM_PYTHON"
# Not arte-edge[optimum] into the environment at hand: transformers 4 and 5 cannot both be there.
INSTALL = (
    f"python3 -m venv {_ENVIRONMENT} && {_ENVIRONMENT}/bin/pip install "
    "'optimum-onnx[onnxruntime]==0.1.0' 'transformers<4.58' torch"
)
# Read from the installed packages' own data: importing them takes longer than some exports.
_PROBE = """
from importlib.metadata import version
for name in ("optimum-onnx", "onnxruntime", "torch", "transformers"):
    found = version(name)
if tuple(int(part) for part in found.split(".")[:2]) >= (4, 58):
    raise SystemExit(f"it has transformers {found}")
"""
_PROBE_TIMEOUT_S = 60


class OptimumSettings(BaseModel):
    """What optimum writes.

    Attributes:
        precision: "int8" quantizes weights beforehand and activations while the model runs (dynamic).
        arch: the instruction set whose int8 products the file is made for; unused with "fp32".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["fp32", "int8"] = "int8"
    arch: Literal["arm64", "avx2", "avx512"] = "avx2"


def find_python() -> Path:
    """Return a Python that has optimum: ``ARTE_EDGE_OPTIMUM_PYTHON``, ./.venv-optimum, or this one.

    Raises:
        InputError: the variable names no program that has optimum.
        ArteError: there is none; the hint is the command that makes one.
    """
    if chosen := os.environ.get(_VARIABLE):
        if problem := _lacks_optimum(Path(chosen)):
            raise InputError(f"{_VARIABLE}={chosen}: {problem}", f"To make such an environment:\n{INSTALL}")
        return Path(chosen)
    below = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    own = Path(_ENVIRONMENT, below).absolute()
    problem = "there is none"
    if own.exists() and not (problem := _lacks_optimum(own)):
        return own
    if find_spec("optimum") is not None and not _lacks_optimum(Path(sys.executable)):
        return Path(sys.executable)
    raise ArteError(
        f"The portable ONNX layout needs optimum-onnx in an environment of its own ({_ENVIRONMENT}: {problem})",
        f"{INSTALL}\nor set {_VARIABLE} to the Python of an environment that has it.",
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
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def build(checkpoint: Path, out: Path, settings: OptimumSettings, *, fp32: Path | None = None) -> Path:
    """Export `checkpoint` to the folder `out`, which appears whole and checked or not at all.

    Args:
        checkpoint: a folder of config.json, safetensors and tokenizer files; nothing is fetched.
        out: ``onnx/model.onnx`` or ``onnx/model_quantized.onnx`` (the names transformers.js knows),
            config files, and the checkpoint's tokenizer files, byte for byte. An earlier export
            there is replaced.
        fp32: an fp32 export of the same checkpoint by this function, to quantize without a new one;
            unused with precision "fp32".

    Returns:
        `out`.

    Raises:
        InputError: `checkpoint` is no checkpoint, or `out` is taken by something else.
        ArteError: no environment has optimum, optimum failed, or what it wrote is not sound.
    """
    need("onnx", "Exporting to ONNX")
    checkpoint = checkpoint.absolute()
    weights = checkpoint_files(checkpoint)
    python = find_python()
    with staged(out) as folder:
        work = folder.parent
        source, written = work / "checkpoint", work / "written"
        written.mkdir()
        if fp32 is None or settings.precision == "fp32":
            readable = _readable(checkpoint, weights, source)
            job = {"job": "optimum", "checkpoint": str(readable), "out": str(written)}
            run_worker(job, work, python=str(python), what="optimum's export")
            job = {"job": "slim", "path": str(written / "model.onnx")}
            run_worker(job, work, what="Simplifying optimum's graph")
        else:
            _readable(checkpoint, [], source)
        if settings.precision == "int8":
            whole = model_file(fp32).absolute() if fp32 else written / "model.onnx"
            written = work / "quantized"
            written.mkdir()
            job = {"job": "quantize", "source": str(whole), "out": str(written), "arch": settings.arch}
            run_worker(job, work, python=str(python), what="optimum's quantizer")
        (folder / "onnx").mkdir()
        for path in sorted(written.glob("*.onnx*")):
            path.replace(folder / "onnx" / path.name)
        _write_configs(checkpoint, source, folder)
        tokenizer = copy_tokenizer(checkpoint, folder)
        require_sound(folder, checkpoint)
        refuse_leaks(folder, checkpoint, besides=tokenizer)
    return out


def _readable(checkpoint: Path, weights: list[Path], folder: Path) -> Path:
    """Fill `folder` with links to the weights and a config that transformers 4 reads; no tokenizer, none is needed."""
    folder.mkdir()
    for path in [*weights, *checkpoint.glob("*.safetensors.index.json")]:
        try:
            (folder / path.name).symlink_to(path)
        except OSError:  # Windows without the right to make links
            shutil.copyfile(path, folder / path.name)
    config = for_transformers_4(read_json(checkpoint / "config.json"))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _write_configs(checkpoint: Path, source: Path, folder: Path) -> None:
    """Write the config in version 4's words, which transformers.js shares, and the generation config as it was."""
    shutil.copyfile(source / "config.json", folder / "config.json")
    if (checkpoint / "generation_config.json").is_file():
        shutil.copyfile(checkpoint / "generation_config.json", folder / "generation_config.json")
