"""Build the file of each format from the student's checkpoint; steps that formats share run once.

All quantized GGUFs are made from one 16-bit GGUF and one importance matrix, all int8 models of optimum
from one fp32 export. Files are built below ``.export/`` and get their names after verification.
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
from arte_edge.cache import Progress, atomic_file, sha256_file
from arte_edge.export.build_cache import BuildCache, BuiltFile
from arte_edge.export.recipe import Recipe
from arte_edge.export.source import Source
from arte_edge.gguf.reader import FULL_WIDTH, Field
from arte_edge.models.artifact import Format
from arte_edge.results.student_json import Student

__all__ = ["Builder", "needs_imatrix", "uses_base"]

# llama.cpp does not use the matrix for 8 bits, whose rounding errors are small.
_WITHOUT_IMATRIX = (*FULL_WIDTH, "Q8_0")
_FullWidth = Literal["F16", "BF16", "F32"]


def uses_base(format: Format, base: str) -> bool:
    """True if `format` is made from the 16-bit GGUF, or is that file."""
    return format.family == "gguf" and (format.type not in FULL_WIDTH or format.type == base)


def needs_imatrix(format: Format) -> bool:
    """True if an importance matrix makes a difference to `format`."""
    return format.family == "gguf" and format.type not in _WITHOUT_IMATRIX


@dataclass
class Builder:
    """Everything that determines the bytes of the files of one export."""

    cache: BuildCache
    source: Source
    student: Student
    recipe: Recipe
    gguf_fields: dict[str, Field]  # metadata of every GGUF
    formats: Sequence[Format]
    llama_cpp: Path | None = None  # convert with this checkout of llama.cpp
    imatrix: Path | None = None
    imatrix_cached: bool = False  # collected by an earlier process, from the same texts

    def collect_imatrix(self, progress: Progress) -> None:
        """Collect the importance matrix beside the files, if a format uses one and there are training texts.

        Raises:
            ArteError: packages are missing, or the disk is full.
        """
        used = self.recipe.gguf.imatrix and any(map(needs_imatrix, self.formats))
        if not used or not self.source.training:
            return
        from arte_edge.gguf.imatrix import collect

        source, out = self.source, self.cache.out / f"{self.student.name}.imatrix.gguf"
        before = out.stat().st_mtime_ns if out.exists() else 0
        self.imatrix = collect(
            source.checkpoint, source.training, out, dataset=source.training_from, progress=progress
        )
        self.imatrix_cached = before == out.stat().st_mtime_ns

    def build(self, format: Format) -> BuiltFile:
        """Return the file of `format`, built now or by an earlier process.

        Raises:
            InputError: an unknown model family, type or override.
            ArteError: a package is missing, the disk is full, or a builder failed.
        """
        name = format.file_name(self.student.name)
        step, inputs, target = f"make-{format.label}", self._inputs(format), self.cache.pending(name)
        if cached := self.cache.find(step, inputs, *self.cache.places(name)):
            return cached
        base = self._gguf_base() if uses_base(format, self.recipe.gguf.base) else None
        with self.cache.building(target):
            if base is not None:
                summary = self._from_base(format, base, target)
            elif format.family == "gguf":
                summary = self._convert(cast(_FullWidth, format.type), target)
            elif format.family == "onnx-genai":
                summary = self._build_genai(format, target)
            else:
                summary = self._build_optimum(format, target)
        return self.cache.record(step, inputs, target, summary)

    def _inputs(self, format: Format) -> list[Any]:
        """Return everything that determines the bytes of a format's file."""
        inputs: list[Any] = [__version__, self.student.sha256, format.label]
        if format.family == "gguf":
            fields = {key: repr(field) for key, field in self.gguf_fields.items()}
            inputs += [fields, self.llama_cpp is not None]
            if self.source.evaluated is not None:
                inputs.append(sha256_file(self.source.evaluated))
            if format.type not in FULL_WIDTH:
                imatrix = sha256_file(self.imatrix) if self.imatrix and needs_imatrix(format) else ""
                inputs += [self.recipe.gguf.base, self.recipe.gguf.overrides_of(format.type), imatrix]
        elif format.family == "onnx-genai":
            onnx = self.recipe.onnx
            inputs += [onnx.block_size, onnx.accuracy_level, onnx.algorithm, onnx.mixed]
        return inputs

    def _gguf_base(self) -> BuiltFile:
        """Return the 16-bit GGUF that the other files are made from."""
        type = self.recipe.gguf.base
        target = self.cache.base(f"{self.student.name}-{type}.gguf")
        inputs = self._inputs(Format("gguf", type))
        if cached := self.cache.find("base", inputs, target):
            return cached
        with self.cache.building(target):
            summary = self._convert(type, target)
        return self.cache.record("base", inputs, target, summary)

    def _from_base(self, format: Format, base: BuiltFile, target: Path) -> dict[str, Any]:
        if format.type == self.recipe.gguf.base:
            _link_or_copy(base.path, target)
            return base.summary
        from arte_edge.gguf.quantize import quantize

        imatrix = self.imatrix if needs_imatrix(format) else None
        overrides = self.recipe.gguf.overrides_of(format.type)
        report = quantize(base.path, target, format.type, imatrix=imatrix, overrides=overrides)
        return asdict(report) | {"imatrix_used": imatrix is not None}

    def _convert(self, type: _FullWidth, target: Path) -> dict[str, Any]:
        from arte_edge.gguf.reader import read_header

        if self.llama_cpp is not None:
            from arte_edge.gguf.convert import convert_with_llama_cpp
            from arte_edge.gguf.writer import rewrite

            convert_with_llama_cpp(self.llama_cpp, self.source.checkpoint, target, type)
            rewrite(target, self.gguf_fields)
        elif self.source.evaluated is not None and type == "F16":
            from arte_edge.gguf.from_base import with_metadata

            with_metadata(self.source.evaluated, self.gguf_fields, target)
        else:
            from arte_edge.gguf.convert import convert

            convert(self.source.checkpoint, target, type, extra_fields=self.gguf_fields)
        tensors = read_header(target).tensors.values()
        bits = 8 * sum(t.size_bytes for t in tensors) / sum(t.n_value for t in tensors)
        types = Counter(tensor.type for tensor in tensors)
        return {"bits_per_weight": bits, "tensor_types": dict(types.most_common())}

    def _build_genai(self, format: Format, target: Path) -> dict[str, Any]:
        from arte_edge.onnx.genai_builder import GenaiSettings, build

        onnx = self.recipe.onnx
        settings = GenaiSettings(
            precision=cast(Any, format.type),
            block_size=onnx.block_size,
            accuracy_level=onnx.accuracy_level,
            algorithm=onnx.algorithm,
            mixed=onnx.mixed,
        )
        build(self.source.checkpoint, target, settings)
        return {}

    def _build_optimum(self, format: Format, target: Path) -> dict[str, Any]:
        from arte_edge.onnx.optimum_exporter import OptimumSettings, build

        fp32 = None
        if format.type == "int8" and sum(f.family == "onnx-optimum" for f in self.formats) > 1:
            fp32 = self._optimum_base()
        settings = OptimumSettings(precision=cast(Any, format.type))
        if format.arch:
            settings = OptimumSettings(precision=cast(Any, format.type), arch=cast(Any, format.arch))
        build(self.source.checkpoint, target, settings, fp32=fp32)
        return {}

    def _optimum_base(self) -> Path:
        """Return the fp32 export that several int8 ones are quantized from."""
        fp32 = Format("onnx-optimum", "fp32")
        if fp32 in self.formats:
            return self.build(fp32).path
        target, inputs = self.cache.base(fp32.file_name(self.student.name)), self._inputs(fp32)
        if cached := self.cache.find("optimum-base", inputs, target):
            return cached.path
        with self.cache.building(target):
            summary = self._build_optimum(fp32, target)
        return self.cache.record("optimum-base", inputs, target, summary).path


def _link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the file `source`: a hard link where the file system has them, else a copy.

    Raises:
        ArteError: the disk is full.
    """
    try:
        os.link(source, target)
    except OSError:
        with atomic_file(target) as partial:
            shutil.copyfile(source, partial)
