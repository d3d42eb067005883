"""The model card: README.md beside the files, written once and kept up to date without losing a person's edits.

The first run writes a whole card. Later runs change three things: keys of the head that are missing,
our results in ``model-index``, and what stands between the markers. All else stays byte for
byte. A README.md that somebody wrote without any marker of ours gets the parts at its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from arte_edge.errors import InputError
from arte_edge.publish import shown
from arte_edge.publish.card_head import CardOptions, head_keys, model_index
from arte_edge.publish.card_sections import SECTIONS, put_section, wrapped
from arte_edge.publish.front_matter import FrontMatter, merge_head, merge_model_index, read_head, split_card
from arte_edge.results.student_json import StudentFile
from arte_edge.store import write_atomic

__all__ = ["CARD", "Card", "CardOptions", "render_card", "write_card"]

CARD = "README.md"


@dataclass(frozen=True)
class Card:
    """The text of a card, and whether it differs from what was there."""

    text: str
    changed: bool


def write_card(folder: Path, student: StudentFile, options: CardOptions | None = None) -> Card:
    """Write or update ``README.md`` in `folder`.

    Raises:
        InputError: the card there cannot be read, or its markers or its head are broken; it is left as it is.
        ArteError: the disk is full.
    """
    path = folder / CARD
    before = _read(path)
    text = render_card(student, options or CardOptions(), before)
    if changed := text != before:
        write_atomic(path, text.encode())
    return Card(text, changed)


def render_card(student: StudentFile, options: CardOptions, before: str | None = None) -> str:
    """Return the card of `student`; `before` is the text of the card that is there."""
    card = split_card(_fresh(student, options) if before is None else before)
    if before is not None:
        card = _with_body(card, _updated(card.body, card.newline, student, options))
    wanted = head_keys(student, options)
    replace = {key for key in ("base_model", "datasets", "license") if getattr(options, key)}
    if options.base_model:
        replace.add("base_model_relation")
    if options.license:
        replace.add("license_name")
        wanted.setdefault("license_name", None)
    there = read_head(card).get("model-index")
    found = merge_model_index(there, model_index(student, options))
    if found != there:
        replace.add("model-index")
        wanted["model-index"] = found
    return merge_head(card, wanted, replace).text


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8 at byte {error.start}", "Save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read: {error.strerror or error}") from error


def _with_body(card: FrontMatter, body: str) -> FrontMatter:
    return FrontMatter(card.opening, card.block, card.closing, body, card.newline)


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


def _fresh(student: StudentFile, options: CardOptions) -> str:
    title = f"# {student.student.name}" if options.checkpoint else f"# {student.student.name} for the edge"
    return f"\n{title}\n\n{_about(student, options)}\n\n{_parts(student, options)}"


def _about(student: StudentFile, options: CardOptions) -> str:
    """Return one paragraph that says what this is, and the lines that run it."""
    lineage = student.lineage
    tuned = (
        "A finetune" if lineage.tuning or lineage.source in ("run", "adapter") else "A small language model"
    )
    base = f" of {lineage.base.name}" if lineage.base and tuned == "A finetune" else ""
    purpose = f" for one task, `{lineage.task}`" if lineage.task else ""
    if options.checkpoint:
        return f"{tuned}{base}{purpose}: the 16-bit checkpoint."
    text = (
        f"{tuned}{base}{purpose}, as files for llama.cpp or onnxruntime on small devices. Each file was "
        "compared with the 16-bit student before it was let out; what was measured on devices stands below."
    )
    ggufs = [artifact.file for artifact in shown.files(student) if artifact.format == "gguf"]
    if ggufs:  # files are sorted, the smallest last: the one for the smallest device
        text += f"\n\n```\nollama create {student.student.name} -f Modelfile\nllama-cli -m {ggufs[-1]}\n```"
    return text


def _parts(student: StudentFile, options: CardOptions) -> str:
    left_out = ("files", "bench") if options.checkpoint else ()
    return "\n".join(
        f"## {title}\n\n{wrapped(name, section(student, options))}"
        for name, (title, section) in SECTIONS.items()
        if name not in left_out
    )
