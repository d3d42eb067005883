"""The model card: README.md beside the files, written once and updated without losing manual edits.

The first run writes a whole card. Later runs change three things: missing keys of the front matter,
our results in ``model-index``, and the text between our markers. The rest stays byte for byte. A
README.md without any of our markers gets the sections at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from arte_edge.cache import write_atomic
from arte_edge.errors import InputError
from arte_edge.publish.card.body import SECTIONS, put_section, wrapped
from arte_edge.publish.card.front_matter import merge_head, merge_model_index, read_head, split_card
from arte_edge.publish.card.metadata import CardOptions, head_keys, hub_id, model_index
from arte_edge.results.locate import find_export, read_bench, read_export
from arte_edge.results.merge import merge_into, merge_rows
from arte_edge.results.student_json import FILE_NAME, StudentFile

__all__ = ["CARD", "Card", "CardOptions", "card", "render_card", "write_card"]

CARD = "README.md"


@dataclass(frozen=True)
class Card:
    """The card's text, the files that were written or updated, and notes on what was skipped."""

    folder: Path
    text: str
    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def card(
    folder: str | Path,
    *,
    base_model: str = "",
    dataset: Sequence[str] = (),
    license: str = "",
    repo: str = "",
    benchmark: Sequence[str] = (),
    checkpoint: Path | None = None,
    allow_throttled: bool = False,
    gguf_keys: bool = True,
    dry_run: bool = False,
) -> Card:
    """Write or update README.md, the GGUF files' metadata and student.json from the measured results.

    Args:
        folder: an export's folder, with ``student.json``; or the run it belongs to.
        base_model: Hub id of the 16-bit student; empty: the card names its base, as a finetune of it.
        dataset: Hub ids of published training data.
        license: licence; empty: that of the base.
        repo: repository that it will be pushed to, for links to the raw results.
        benchmark: benchmarks of the Hub to write ``.eval_results`` for: ``openai/gsm8k:gsm8k[=TASK]``.
        checkpoint: write the 16-bit student's card into this folder, and change nothing in `folder`.
        allow_throttled: include rates of a throttled device, marked so.
        gguf_keys: write the results into the GGUF files' metadata.
        dry_run: change nothing; `Card.text` is what would be written.

    Raises:
        InputError: an id that is none, no export there, a broken card, or files that do not match it.
        ArteError: the disk is full.
    """
    from arte_edge.publish.eval_results import parse_benchmark, write_eval_results
    from arte_edge.publish.gguf_results import write_keys

    for flag, ids in (("--base-model", [base_model]), ("--dataset", dataset), ("--repo", [repo])):
        for name in filter(None, ids):
            if hub_id(name) != name:
                raise InputError(f"{flag} {name}: not a Hub id", "It has the form user/name.")
    options = CardOptions(base_model, tuple(dataset), license, repo, allow_throttled, checkpoint is not None)
    benchmarks = [parse_benchmark(text) for text in benchmark]
    path = find_export(folder)
    target = checkpoint or path
    if not target.is_dir():
        raise InputError(f"{target}: no such folder", "Give the folder of the 16-bit checkpoint.")
    student, rows = read_export(path), read_bench(path)
    if dry_run:
        merged = merge_into(student, rows)
        return Card(target, render_card(merged.student, options, _read(target / CARD)), (), merged.notes)
    notes: list[str] = []
    changed: list[str] = []
    if checkpoint is None:
        before, student = student, merge_rows(path, rows, note=notes.append)
        changed += [FILE_NAME] if student != before else []
        done = write_eval_results(path, student, benchmarks, repo=repo, note=notes.append)
        if gguf_keys:
            changed += write_keys(path, allow_throttled=allow_throttled, note=notes.append)
            student = read_export(path)
        changed += [file.relative_to(path).as_posix() for file in done]
    else:
        student = merge_into(student, rows).student
    text, is_new = write_card(target, student, options)
    return Card(target, text, (*changed, *([CARD] if is_new else [])), tuple(notes))


def write_card(folder: Path, student: StudentFile, options: CardOptions | None = None) -> tuple[str, bool]:
    """Write or update ``README.md`` in `folder`; return its text and whether it changed.

    Raises:
        InputError: the card there cannot be read, or its markers or front matter are broken; it is not changed.
        ArteError: the disk is full.
    """
    path = folder / CARD
    before = _read(path)
    text = render_card(student, options or CardOptions(), before)
    if changed := text != before:
        write_atomic(path, text.encode())
    return text, changed


def render_card(student: StudentFile, options: CardOptions, before: str | None = None) -> str:
    """Return the card of `student`; `before` is the text of the existing card."""
    parts = split_card(_new_body(student, options) if before is None else before)
    if before is not None:
        parts = replace(parts, body=_updated(parts.body, parts.newline, student, options))
    keys = head_keys(student, options)
    given = {key for key in ("base_model", "datasets", "license") if getattr(options, key)}
    if options.base_model:
        given.add("base_model_relation")
    if options.license:
        given.add("license_name")
        keys.setdefault("license_name", None)
    there = read_head(parts).get("model-index")
    found = merge_model_index(there, model_index(student, options))
    if found != there:
        given.add("model-index")
        keys["model-index"] = found
    return merge_head(parts, keys, given).text


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8 at byte {error.start}", "Save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read: {error.strerror or error}") from error


def _updated(body: str, newline: str, student: StudentFile, options: CardOptions) -> str:
    found = False
    for name, (_, section) in SECTIONS.items():
        new = put_section(body, name, section(student, options), newline)
        if new is not None:
            body, found = new, True
    if found:
        return body
    gap = "" if not body or body.endswith(("\n", "\r")) else newline
    return body + gap + newline + _parts(student, options).replace("\n", newline)


def _new_body(student: StudentFile, options: CardOptions) -> str:
    """Return the whole body: a paragraph on what this is, and the sections."""
    lineage, name = student.lineage, student.student.name
    is_tuned = lineage.tuning is not None or lineage.source in ("run", "adapter")
    about = "A finetune" if is_tuned else "A small language model"
    about += f" of {lineage.base.name}" if lineage.base and is_tuned else ""
    about += f" for one task, `{lineage.task}`" if lineage.task else ""
    if options.checkpoint:
        return f"\n# {name}\n\n{about}: the 16-bit checkpoint.\n\n{_parts(student, options)}"
    about += (
        ", as files for llama.cpp or onnxruntime on small devices. Each file was "
        "compared with the 16-bit student before it was released; measurements on devices are below."
    )
    return f"\n# {name} for the edge\n\n{about}\n\n{_parts(student, options)}"


def _parts(student: StudentFile, options: CardOptions) -> str:
    left_out = ("files", "bench") if options.checkpoint else ()
    return "\n".join(
        f"## {title}\n\n{wrapped(name, section(student, options))}"
        for name, (title, section) in SECTIONS.items()
        if name not in left_out
    )
