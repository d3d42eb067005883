"""What is settled before the first file is made: who the student is, whose folder this is, whether the disk will do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arte_edge.cache import sha256_checkpoint
from arte_edge.errors import InputError
from arte_edge.export.build import uses_base
from arte_edge.export.build_cache import Workshop, remove
from arte_edge.export.formats import Format
from arte_edge.export.plan import predicted_bytes
from arte_edge.export.recipe import Recipe
from arte_edge.export.source import Source
from arte_edge.export.weights import model_config, parameter_count, shapes_of, weights_dtype
from arte_edge.results.student_json import Artifact, Student, read_student

__all__ = ["check_room", "describe", "kept_artifacts"]


def describe(source: Source) -> Student:
    """Return what identifies the 16-bit student of a source, whose adapter is merged by now.

    Raises:
        InputError: its checkpoint cannot be read.
    """
    return Student(
        name=source.name,
        sha256=sha256_checkpoint(source.checkpoint),
        architecture=str(model_config(source.checkpoint).get("model_type", "")),
        dtype=weights_dtype(source.checkpoint),
        parameter_count=parameter_count(source.checkpoint),
    )


def kept_artifacts(out: Path, student: Student, force: bool) -> tuple[Artifact, ...]:
    """Return what earlier exports of this student made in `out` and is still there.

    With `force` another student's files are removed.

    Raises:
        InputError: `out` holds another student's files and `force` is not given.
    """
    try:
        there = read_student(out)
    except InputError:
        if not force:
            raise
        there = None
    if there is None:
        return ()
    if there.student.sha256 == student.sha256:
        return tuple(artifact for artifact in there.artifacts if (out / artifact.file.rstrip("/")).exists())
    if not force:
        raise InputError(
            f"{out}: holds the files of another student ({there.student.name})",
            "Choose another -o, or give --force to replace them.",
        )
    for artifact in there.artifacts:
        remove(out / Path(artifact.file).name)
    return ()


def check_room(
    shop: Workshop, checkpoint: Path, student: Student, formats: Sequence[Format], recipe: Recipe
) -> None:
    """Raise before an hour's work if what is still to be made cannot fit on the disk.

    Raises:
        ArteError: it cannot.
    """
    shapes = shapes_of(checkpoint)
    missing = {format for format in formats if not _is_there(shop, format.file_name(student.name))}
    base = Format("gguf", recipe.gguf.base)
    if any(uses_base(format, base.type) for format in missing):
        missing.add(base)
    shop.require_room(sum(predicted_bytes(format, shapes) for format in missing))


def _is_there(shop: Workshop, name: str) -> bool:
    places = (shop.pending(name), shop.final(name, accepted=True), shop.final(name, accepted=False))
    return any(place.exists() for place in places)
