"""Build the file of each format from the student's checkpoint, and cache finished steps so that a rerun resumes.

All quantized GGUFs are made from one 16-bit GGUF, which is held to the student first, and one importance
matrix, all int8 models of optimum from one fp32 export. Files get their names in DIR by a rename, after verification:

    DIR/.export/
        lock            one process at a time
        records/        one JSON file a step: hash of its inputs, checksums of the file it built
        pending/        files that are built and not verified yet
        base/           the 16-bit GGUF that others are quantized from; removed at the end

A step's record is written after its file is complete, so a kill between the two repeats one step. A record
is valid only while its file has the recorded checksums.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from filelock import FileLock, Timeout

from arte_edge import __version__
from arte_edge.cache import Progress, access_error, cleanup_on_full_disk, sha256_file, write_atomic
from arte_edge.checkpoint import read_config
from arte_edge.errors import ArteError, InputError
from arte_edge.export.recipe import Recipe
from arte_edge.export.source import Source, private_fields
from arte_edge.gguf.reader import FULL_WIDTH, UINT32, Field
from arte_edge.models.artifact import Checksums, Format, checksums_of
from arte_edge.pii_scan import this_machine
from arte_edge.results.student_json import Student
from arte_edge.store import content_key, link_folder

REJECTED = ".rejected"


@dataclass(frozen=True)
class BuiltFile:
    """A complete file or folder, its checksums, and the summary that its builder returned."""

    path: Path
    checksums: Checksums
    summary: dict[str, Any]
    cached: bool  # built by an earlier process


class BuildCache:
    """The cache in the folder `out` of an export. A context manager that holds the folder's lock."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / ".export"
        self._lock = FileLock(self.folder / "lock")

    def __enter__(self) -> BuildCache:
        """Create the folder and lock it.

        Raises InputError: another process exports into it, or it cannot be written.
        """
        try:
            for name in ("records", "pending", "base"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"{self.out}: another process exports into this folder", "Wait for it, or choose another -o."
            ) from error
        except OSError as error:
            raise access_error(error, self.out) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def pending(self, name: str) -> Path:
        return self.folder / "pending" / name

    def base(self, name: str) -> Path:
        return self.folder / "base" / name

    def final(self, name: str, *, accepted: bool) -> Path:
        return self.out / (name if accepted else name + REJECTED)

    def places(self, name: str) -> tuple[Path, Path, Path]:
        """Return where the file `name` may be: not verified yet, accepted, or rejected."""
        return (self.pending(name), self.final(name, accepted=True), self.final(name, accepted=False))

    def find(self, step: str, inputs: Any, *places: Path) -> BuiltFile | None:
        """Return the file that `step` built from the same inputs, if it is unchanged in one of `places`."""
        record = self._read(step, inputs)
        for place in places:
            if not record or not place.exists():
                continue
            try:
                checksums = checksums_of(place)
            except InputError:  # damaged since
                continue
            if checksums.sha256 == record.get("sha256"):
                return BuiltFile(place, checksums, dict(record.get("summary") or {}), cached=True)
        return None

    @contextmanager
    def building(self, target: Path) -> Iterator[None]:
        """Remove an old `target`; turn "no space left" while the block builds it into a clear error."""
        remove(target)
        with cleanup_on_full_disk(target, target.name):
            yield

    def record(self, step: str, inputs: Any, target: Path, summary: Mapping[str, Any]) -> BuiltFile:
        """Record that `step` built `target` from `inputs`."""
        checksums = checksums_of(target)
        self._write(step, inputs, sha256=checksums.sha256, summary=summary)
        return BuiltFile(target, checksums, dict(summary), cached=False)

    def find_result(self, step: str, inputs: Any) -> dict[str, Any] | None:
        """Return what `record_result` stored for the same inputs."""
        return self._read(step, inputs).get("summary")

    def record_result(self, step: str, inputs: Any, result: Mapping[str, Any]) -> None:
        """Store a result that is not a file, such as a verdict."""
        self._write(step, inputs, summary=result)

    def place(self, built: Path, name: str, *, accepted: bool) -> Path:
        """Rename a verified file to `name`, or `name` with ``.rejected``, and remove the other of the two."""
        target, other = self.final(name, accepted=accepted), self.final(name, accepted=not accepted)
        if built != target:
            if target.is_dir():  # a folder cannot be renamed over one that holds files
                remove(target)
            built.replace(target)
        remove(other)
        return target

    def close(self, *, keep_base: bool) -> None:
        """Remove what a finished export does not need; with `keep_base` the next attempt reuses the base."""
        remove(self.folder / "pending")
        if not keep_base:
            remove(self.folder / "base")

    def _read(self, step: str, inputs: Any) -> dict[str, Any]:
        """Return the record of `step`, empty if there is none for these inputs."""
        try:
            record = json.loads((self.folder / "records" / f"{step}.json").read_bytes())
        except (OSError, ValueError):
            return {}
        matches = isinstance(record, dict) and record.get("inputs") == content_key(step, inputs)
        return record if matches else {}

    def _write(self, step: str, inputs: Any, **document: Any) -> None:
        record = {"inputs": content_key(step, inputs), **document}
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_atomic(self.folder / "records" / f"{step}.json", text.encode())


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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

    @property
    def uses_imatrix(self) -> bool:
        """True if a format uses an importance matrix and there are training texts for one."""
        return bool(self.recipe.gguf.imatrix and self.source.training) and any(map(needs_imatrix, self.formats))

    def collect_imatrix(self, progress: Progress) -> None:
        """Collect the importance matrix beside the files, if one is used.

        Raises ArteError: packages are missing, or the disk is full.
        """
        if not self.uses_imatrix:
            return
        from arte_edge.gguf.imatrix import collect

        source, out = self.source, self.cache.out / f"{self.student.name}.imatrix.gguf"
        before = out.stat().st_mtime_ns if out.exists() else 0
        self.imatrix = collect(source.checkpoint, source.training, out, dataset=source.training_from, progress=progress)
        self.imatrix_cached = before == out.stat().st_mtime_ns

    def build(self, format: Format) -> BuiltFile:
        """Return the file of `format`, built now or by an earlier process.

        Raises:
            InputError: an unknown model family, type or override.
            ArteError: a package is missing, the disk is full, or a builder failed.
        """
        name = format.file_name(self.student.name)
        step, inputs, target = f"make-{format.label}", self.inputs(format), self.cache.pending(name)
        if cached := self.cache.find(step, inputs, *self.cache.places(name)):
            return cached
        base = self.base() if uses_base(format, self.recipe.gguf.base) else None
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

    def inputs(self, format: Format) -> list[Any]:
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

    def base(self) -> BuiltFile:
        """Return the full-width GGUF that the other files are made from, built now or by an earlier process.

        Raises:
            InputError: a checkpoint that cannot be converted.
            ArteError: a package is missing, the disk is full, or the converter failed.
        """
        format = Format("gguf", self.recipe.gguf.base)
        places = self.cache.places(format.file_name(self.student.name))
        return self._kept("base", format, lambda out: self._convert(self.recipe.gguf.base, out), *places)

    def _kept(self, step: str, format: Format, build: Callable[[Path], dict[str, Any]], *places: Path) -> BuiltFile:
        """Return a file that others are made from, found in `places` or built beside them."""
        target, inputs = self.cache.base(format.file_name(self.student.name)), self.inputs(format)
        if cached := self.cache.find(step, inputs, target, *places):
            return cached
        with self.cache.building(target):
            summary = build(target)
        return self.cache.record(step, inputs, target, summary)

    def _from_base(self, format: Format, base: BuiltFile, target: Path) -> dict[str, Any]:
        if format.type == self.recipe.gguf.base:
            link_folder(base.path, target)
            return base.summary
        from arte_edge.gguf.quantize import quantize

        imatrix = self.imatrix if needs_imatrix(format) else None
        overrides = self.recipe.gguf.overrides_of(format.type)
        report = quantize(base.path, target, format.type, imatrix=imatrix, overrides=overrides)
        warnings = [*base.summary.get("warnings", ()), *report.warnings]
        ends = {"unwritten_ends": base.summary.get("unwritten_ends", 0)}
        return asdict(report) | ends | {"warnings": warnings, "imatrix_used": imatrix is not None}

    def _convert(self, type: _FullWidth, target: Path) -> dict[str, Any]:
        from arte_edge.gguf.reader import read_header
        from arte_edge.gguf.tokenizer import end_tokens, read_tokenizer

        checkpoint = self.source.checkpoint
        ends, unwritten = end_tokens(read_tokenizer(checkpoint, read_config(checkpoint)))
        fields = {f"tokenizer.ggml.{role}_token_id": Field(UINT32, token) for role, token in ends.items()}
        fields |= self.gguf_fields
        if self.llama_cpp is not None:
            from arte_edge.gguf.convert import convert_with_llama_cpp
            from arte_edge.gguf.writer import rewrite

            convert_with_llama_cpp(self.llama_cpp, checkpoint, target, type)
            rewrite(target, fields)
        elif self.source.evaluated is not None and type == "F16":
            from arte_edge.gguf.from_base import with_metadata

            with_metadata(self.source.evaluated, fields, target)
        else:
            from arte_edge.gguf.convert import convert

            convert(checkpoint, target, type, extra_fields=self.gguf_fields)
        left_out = self._drop_private(target)
        tensors = read_header(target).tensors.values()
        bits = 8 * sum(t.size_bytes for t in tensors) / sum(t.n_value for t in tensors)
        types = Counter(tensor.type for tensor in tensors)
        stops = ", ".join(map(repr, unwritten))
        warnings = [f"llama.cpp has no place for more end tokens: give {stops} as stop texts"] if stops else []
        if left_out:
            warnings.append(f"left out of the metadata, since it names no public place: {', '.join(left_out)}")
        counts = {"bits_per_weight": bits, "tensor_types": dict(types.most_common())}
        return counts | {"warnings": warnings, "unwritten_ends": len(unwritten)}

    def _drop_private(self, gguf: Path) -> list[str]:
        """Remove descriptions that hold a path or a secret; return their keys, and those of the model card left out."""
        from arte_edge.gguf.convert import public_card
        from arte_edge.gguf.writer import rewrite

        own = this_machine().private_paths(self.source.checkpoint.absolute(), self.cache.out.absolute())
        keys = private_fields(gguf, own)
        if needed := [key for key in keys if not key.startswith(("general.", "quantize."))]:
            hint = "Change it in the files of the tokenizer."
            raise ArteError(f"{gguf.name}: {needed[0]} contains a path of this machine", hint)
        if keys:
            rewrite(gguf, {}, keys)
        return [*(f"{key} of the model card" for key in public_card(self.source.checkpoint)[1]), *keys]

    def _build_genai(self, format: Format, target: Path) -> dict[str, Any]:
        from arte_edge.onnx.genai_builder import GenaiSettings, Rounding, build

        rounding = self.recipe.onnx.model_dump(include={*Rounding.model_fields})
        build(self.source.checkpoint, target, GenaiSettings(precision=cast(Any, format.type), **rounding))
        return {}

    def _build_optimum(self, format: Format, target: Path) -> dict[str, Any]:
        from arte_edge.onnx.optimum_exporter import build

        fp32 = None
        if format.type == "int8" and sum(f.family == "onnx-optimum" for f in self.formats) > 1:
            fp32 = self._optimum_base()
        build(self.source.checkpoint, target, cast(Any, format.type), format.arch, fp32=fp32)
        return {}

    def _optimum_base(self) -> Path:
        """Return the fp32 export that several int8 ones are quantized from."""
        fp32 = Format("onnx-optimum", "fp32")
        if fp32 in self.formats:
            return self.build(fp32).path
        return self._kept("optimum-base", fp32, lambda out: self._build_optimum(fp32, out)).path
