"""Make the files: each format from the student's checkpoint, the shared steps once.

One 16-bit GGUF is the base of all quantized ones, one importance matrix serves them
all, and one fp32 export those of optimum. Files are made in the workshop and get their
names only from the gate.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from arte_edge import __version__
from arte_edge.cache import Progress, sha256_file, whole_file
from arte_edge.export.build_cache import Made, Workshop
from arte_edge.export.recipe import Recipe
from arte_edge.export.source import Source
from arte_edge.gguf.reader import Field
from arte_edge.models.formats import FULL_WIDTH, Format
from arte_edge.results.student_json import Student

__all__ = ["Builder", "needs_imatrix", "uses_base"]

# Rounding to eight bits is so fine that llama.cpp does not weigh it.
_WITHOUT_IMATRIX = (*FULL_WIDTH, "Q8_0")
_Wide = Literal["F16", "BF16", "F32"]


def uses_base(format: Format, base: str) -> bool:
    """True if `format` is made from the 16-bit GGUF, or is that file."""
    return format.family == "gguf" and (format.type not in FULL_WIDTH or format.type == base)


def needs_imatrix(format: Format) -> bool:
    """True if an importance matrix makes a difference to `format`."""
    return format.family == "gguf" and format.type not in _WITHOUT_IMATRIX


@dataclass
class Builder:
    """Everything that decides the bytes of a file. `make` returns what it made, or what is there already."""

    workshop: Workshop
    source: Source
    student: Student
    recipe: Recipe
    keys: dict[str, Field]  # metadata of every GGUF
    formats: Sequence[Format]
    llama_cpp: Path | None = None  # the user's own checkout, for a family that we do not know
    progress: Progress | None = None
    imatrix: Path | None = None
    imatrix_kept: bool = False  # it was there, of the same texts

    def collect(self) -> Path | None:
        """Return the importance matrix beside the files, made or continued; None where none is wanted or possible.

        Raises:
            ArteError: packages are missing, or the disk is full.
        """
        wanted = self.recipe.gguf.imatrix and any(map(needs_imatrix, self.formats))
        if wanted and self.source.training:
            from arte_edge.gguf.imatrix import collect

            out = self.workshop.out / f"{self.student.name}.imatrix.gguf"
            before = out.stat().st_mtime_ns if out.exists() else 0
            self.imatrix = collect(
                self.source.checkpoint,
                self.source.training,
                out,
                dataset=self.source.training_from,
                progress=self.progress,
            )
            self.imatrix_kept = before == out.stat().st_mtime_ns
        return self.imatrix

    def make(self, format: Format) -> Made:
        """Return the file of `format`.

        Raises:
            InputError: a family, type or override that cannot be.
            ArteError: a package is missing, the disk is full, or a builder failed.
        """
        name = format.file_name(self.student.name)
        shop = self.workshop
        places = (shop.final(name, accepted=True), shop.final(name, accepted=False))
        build = {"gguf": self._gguf, "onnx-genai": self._genai, "onnx-optimum": self._optimum}[format.family]
        return shop.make(
            f"make-{format.label}",
            self._inputs(format),
            shop.pending(name),
            lambda target: build(format, target),
            *places,
        )

    def _inputs(self, format: Format) -> list[Any]:
        """Return what decides the bytes of a format's file."""
        inputs: list[Any] = [__version__, self.student.sha256, format.label]
        if format.family == "gguf":
            keys = {key: repr(field) for key, field in self.keys.items()}
            inputs += [keys, self.llama_cpp is not None]
            if self.source.evaluated is not None:
                inputs.append(sha256_file(self.source.evaluated))
            if format.type not in FULL_WIDTH:
                imatrix = sha256_file(self.imatrix) if self.imatrix and needs_imatrix(format) else ""
                inputs += [self.recipe.gguf.base, self.recipe.gguf.overrides_of(format.type), imatrix]
        elif format.family == "onnx-genai":
            onnx = self.recipe.onnx
            inputs += [onnx.block_size, onnx.accuracy_level, onnx.algorithm, onnx.mixed]
        return inputs

    def _gguf(self, format: Format, target: Path) -> dict[str, Any]:
        base = self.recipe.gguf.base
        if format.type in FULL_WIDTH and format.type != base:
            return self._convert(cast(_Wide, format.type), target)
        wide = self._base()
        if format.type == base:
            _same_bytes(wide.path, target)
            return wide.summary
        from arte_edge.gguf.quantize import quantize

        report = quantize(
            wide.path,
            target,
            format.type,
            imatrix=self.imatrix if needs_imatrix(format) else None,
            overrides=self.recipe.gguf.overrides_of(format.type),
        )
        return asdict(report) | {"imatrix_used": self.imatrix is not None and needs_imatrix(format)}

    def _base(self) -> Made:
        """Return the one 16-bit file that the others are made from."""
        type = self.recipe.gguf.base
        target = self.workshop.base(f"{self.student.name}-{type}.gguf")
        inputs = self._inputs(Format("gguf", type))
        return self.workshop.make("base", inputs, target, lambda path: self._convert(type, path))

    def _convert(self, type: _Wide, target: Path) -> dict[str, Any]:
        from arte_edge.gguf.reader import read_header

        if self.llama_cpp is not None:
            from arte_edge.gguf.convert.convert import convert_with_llama_cpp
            from arte_edge.gguf.metadata import rewrite

            convert_with_llama_cpp(self.llama_cpp, self.source.checkpoint, target, type)
            rewrite(target, self.keys)
        elif self.source.evaluated is not None and type == "F16":
            from arte_edge.gguf.from_base import with_metadata

            with_metadata(self.source.evaluated, self.keys, target)
        else:
            from arte_edge.gguf.convert.convert import convert

            convert(self.source.checkpoint, target, type, extra_fields=self.keys)
        tensors = read_header(target).tensors.values()
        bits = 8 * sum(t.size_bytes for t in tensors) / sum(t.n_value for t in tensors)
        types = Counter(tensor.type for tensor in tensors)
        return {"bits_per_weight": bits, "tensor_types": dict(types.most_common())}

    def _genai(self, format: Format, target: Path) -> dict[str, Any]:
        from arte_edge.onnx.genai_builder import GenaiSettings, build

        settings = GenaiSettings(
            precision=cast(Any, format.type),
            block_size=self.recipe.onnx.block_size,
            accuracy_level=self.recipe.onnx.accuracy_level,
            algorithm=self.recipe.onnx.algorithm,
            mixed=self.recipe.onnx.mixed,
        )
        build(self.source.checkpoint, target, settings)
        return {}

    def _optimum(self, format: Format, target: Path) -> dict[str, Any]:
        from arte_edge.onnx.optimum_exporter import build

        several = sum(f.family == "onnx-optimum" for f in self.formats) > 1
        fp32 = self._optimum_base() if several and format.type == "int8" else None
        build(self.source.checkpoint, target, _optimum_settings(format), fp32=fp32)
        return {}

    def _optimum_base(self) -> Path:
        """Return the one fp32 export that several int8 ones are quantized from."""
        fp32 = Format("onnx-optimum", "fp32")
        if fp32 in self.formats:
            return self.make(fp32).path
        from arte_edge.onnx.optimum_exporter import build

        target = self.workshop.base(fp32.file_name(self.student.name))

        def body(path: Path) -> dict[str, Any]:
            build(self.source.checkpoint, path, _optimum_settings(fp32))
            return {}

        return self.workshop.make("optimum-base", self._inputs(fp32), target, body).path


def _optimum_settings(format: Format) -> Any:
    from arte_edge.onnx.optimum_exporter import OptimumSettings

    if format.arch:
        return OptimumSettings(precision=cast(Any, format.type), arch=cast(Any, format.arch))
    return OptimumSettings(precision=cast(Any, format.type))


def _same_bytes(source: Path, target: Path) -> None:
    """Make `target` the file `source`: a second name where the disk allows it, else a copy.

    Raises:
        ArteError: the disk is full.
    """
    try:
        os.link(source, target)
    except OSError:
        with whole_file(target) as partial:
            shutil.copyfile(source, partial)
