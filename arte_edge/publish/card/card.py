"""The model card: README.md beside the files, written once and updated without losing manual edits.

The first run writes a whole card. Later runs change three things: missing keys of the front matter,
our results in ``model-index``, and the text between our markers. The rest stays byte for byte. A
README.md without any of our markers gets the sections at its end.

Measured results go into a GGUF file's own metadata too: one group of scalars a device; few, because loaders print all
keys. Only publishable results are written (see `publishable`), so no throttled rate and no accuracy on a part of a
split. The keys of an earlier run are replaced as a whole. Tensors do not change, so results still belong to the file;
its checksum in ``student.json`` is updated.

    arte_edge.bench.count                       uint32
    arte_edge.bench.{i}.device, .runtime, .date string
    arte_edge.bench.{i}.threads                 uint32
    arte_edge.bench.{i}.prefill_tps, .decode_tps, .ttft_ms   float32
    arte_edge.bench.{i}.peak_rss_bytes          uint64
    arte_edge.bench.{i}.throttled               bool; missing where the device does not report it
    arte_edge.bench.{i}.task, .split            string, with .accuracy float32 and .accuracy_n uint32
    arte_edge.fidelity.kl_mean, .top1_agreement, .ppl_ratio  float32, against the 16-bit student
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from arte_edge.cache import write_atomic
from arte_edge.errors import InputError
from arte_edge.gguf.reader import BOOL, FLOAT32, STRING, UINT32, UINT64, Field
from arte_edge.gguf.writer import rewrite
from arte_edge.models.artifact import checksums_of
from arte_edge.publish.card.body import SECTIONS, put_section, wrapped
from arte_edge.publish.card.front_matter import merge_head, merge_model_index, read_head, split_card
from arte_edge.publish.card.metadata import CardOptions, head_keys, hub_id, model_index
from arte_edge.publish.publishable import accuracy_on, device_title, speeds
from arte_edge.results.merge import merge_into, merge_rows, student_lock
from arte_edge.results.student_json import (
    FILE_NAME,
    Artifact,
    StudentFile,
    find_export,
    read_bench,
    read_export,
    write_student,
)

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


_BENCH, _FIDELITY = "arte_edge.bench.", "arte_edge.fidelity."


def _bench_fields(artifact: Artifact, allow_throttled: bool) -> dict[str, Field]:
    found = speeds(artifact, allow_throttled)
    fields = {f"{_BENCH}count": Field(UINT32, len(found))} if found else {}
    for i, speed in enumerate(found):
        quality = accuracy_on(artifact, speed.fingerprint) if speed.fingerprint else None
        values: dict[str, tuple[int, str | float | None]] = {
            "device": (STRING, device_title(speed)),
            "runtime": (STRING, speed.runtime),
            "threads": (UINT32, speed.threads),
            "depth": (UINT32, speed.n_depth or None),
            "prefill_tps": (FLOAT32, speed.prefill_tokens_per_s),
            "decode_tps": (FLOAT32, speed.decode_tokens_per_s),
            "ttft_ms": (FLOAT32, speed.ttft_ms),
            "peak_rss_bytes": (UINT64, speed.peak_rss_bytes),
            "throttled": (BOOL, speed.throttled),
            "date": (STRING, speed.date or None),
            "task": (STRING, quality.task if quality else None),
            "split": (STRING, quality.split if quality else None),
            "accuracy": (FLOAT32, quality.accuracy if quality else None),
            "accuracy_n": (UINT32, quality.n if quality else None),
        }
        for name, (kind, value) in values.items():
            if value is not None:
                data = value.encode() if isinstance(value, str) else value
                fields[f"{_BENCH}{i}.{name}"] = Field(kind, data)
    return fields


def _fidelity_fields(artifact: Artifact) -> dict[str, Field]:
    if (metrics := artifact.fidelity.metrics) is None:
        return {}
    found = {"kl_mean": metrics.kl_mean, "top1_agreement": metrics.top1, "ppl_ratio": metrics.perplexity_ratio}
    return {f"{_FIDELITY}{name}": Field(FLOAT32, v) for name, v in found.items() if v is not None}


def write_keys(
    folder: Path, *, allow_throttled: bool = False, note: Callable[[str], None] | None = None
) -> tuple[str, ...]:
    """Write the results of every accepted GGUF into it; return the files that changed.

    Their new checksums are written to ``student.json``. A kill in between leaves an old one there, which the
    next run corrects, since the tensors identify the file.

    Raises:
        InputError: a file's tensors differ from ``student.json``, which leaves it unchanged; or there is no
            readable ``student.json``.
        ArteError: no room for a second copy of a file, or a disk error.
    """
    changed: list[str] = []
    with student_lock(folder):
        student = read_export(folder)
        artifacts = list(student.artifacts)
        for i, artifact in enumerate(artifacts):
            if artifact.format != "gguf" or artifact.status != "ok":
                continue
            if not (folder / artifact.file).is_file():
                if note:
                    note(f"{artifact.file} is not here; its keys were not written")
                continue
            artifacts[i], is_new = _write_one(folder / artifact.file, artifact, allow_throttled)
            if is_new:
                changed.append(artifact.file)
            if artifacts[i] != artifact:
                write_student(folder, student.model_copy(update={"artifacts": tuple(artifacts)}))
    return tuple(changed)


def _write_one(path: Path, artifact: Artifact, allow_throttled: bool) -> tuple[Artifact, bool]:
    """Rewrite one file; return its entry with its new checksum, and whether the file changed."""
    checksums = checksums_of(path)
    if checksums.tensor_sha256 != artifact.tensor_sha256:
        raise InputError(
            f"{artifact.file}: its tensors are not those that student.json describes",
            "Export it again; results of another file are not written into it.",
        )
    fields = _bench_fields(artifact, allow_throttled) | _fidelity_fields(artifact)
    done = rewrite(path, fields, drop=(_BENCH, _FIDELITY))
    update = {"sha256": done.sha256 or checksums.sha256, "size_bytes": path.stat().st_size}
    return artifact.model_copy(update=update), done.changed
