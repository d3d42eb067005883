"""An aligned teacher as an artifact: what a run's alignment made, for other tasks and students.

``runs/A/aligned/`` holds the adapter, as PEFT's folder and for a teacher in llama.cpp as GGUF, and ``teacher.json``:
the base model and the sha256 of base and adapters. `teacher.model` names the folder or its run. The adapter is only
used on the very weights that it was trained on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from arte_edge.cache import sha256_file, write_atomic
from arte_edge.errors import InputError
from arte_edge.files import read_json, user_path
from arte_edge.models.resolve import LocalModel
from arte_edge.store import link_folder

_FILE = "teacher.json"
_AGAIN = "Run the same `distill` command of that run again: it writes the folder; finished stages are kept."


@dataclass(frozen=True)
class AlignedTeacher:
    """The base model's reference and sha256, and the sha256 of each adapter by its name in `folder`."""

    folder: Path
    base: str
    base_sha256: str
    adapters: dict[str, str]

    def adapter_for(self, base: LocalModel, *, llamacpp: bool) -> tuple[Path, str]:
        """Return the adapter (path, sha256) in the form that the base's engine loads.

        Raises InputError: `base` has other weights, or the adapter is missing or changed.
        """
        if base.sha256 != self.base_sha256:
            raise InputError(
                f"{self.folder}: aligned on other weights than {self.base} has here",
                f"sha256 {self.base_sha256[:16]}…, here {base.sha256[:16]}….",
            )
        path = self.folder / ("adapter.gguf" if llamacpp else "adapter")
        weights = path if llamacpp else path / "adapter_model.safetensors"
        if not weights.is_file() or sha256_file(weights) != self.adapters.get(path.name):
            raise InputError(f"{weights}: missing, or not the adapter in {_FILE}", _AGAIN)
        return path, self.adapters[path.name]


def aligned_teacher(ref: str) -> AlignedTeacher | None:
    """Return the aligned teacher that `ref` names, a folder ``aligned`` or its run; None if it is another model.

    Raises InputError: a run without an aligned teacher, or a damaged file.
    """
    given = user_path(ref)
    folder = given / "aligned" if (given / "run.toml").is_file() else given
    if not (folder / _FILE).is_file():
        if folder is not given:
            raise InputError(f"{ref}: this run has no aligned teacher", _AGAIN)
        return None
    found = read_json(folder / _FILE, _AGAIN)
    try:
        adapters = {str(name): str(sha256) for name, sha256 in found["adapters"].items()}
        return AlignedTeacher(folder, str(found["base"]), str(found["base_sha256"]), adapters)
    except (KeyError, AttributeError) as error:
        raise InputError(f"{folder / _FILE}: lacks {error}", _AGAIN) from error


def write_aligned(run_folder: Path, base_ref: str, base: LocalModel) -> None:
    """Write ``aligned/`` from the finished stage ``align`` of a run."""
    folder, stage = run_folder / "aligned", run_folder / "align"
    weights = {"adapter": stage / "adapter" / "adapter_model.safetensors", "adapter.gguf": stage / "adapter.gguf"}
    adapters = {name: sha256_file(path) for name, path in weights.items() if path.is_file()}
    here = user_path(base_ref)
    told = {"base": str(here.resolve()) if here.exists() else base_ref, "base_sha256": base.sha256}
    data = json.dumps(told | {"adapters": adapters}, indent=2).encode()
    if (folder / _FILE).is_file() and (folder / _FILE).read_bytes() == data:
        return
    folder.mkdir(exist_ok=True)
    for name in adapters:
        link_folder(stage / name, folder / name)
    write_atomic(folder / _FILE, data)
