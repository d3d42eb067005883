"""The whole export on a tiny model: real files, and a gate whose verdict the test decides.

Mostly with full-width types: llama.cpp's quantizer runs in its own process, which takes a second.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import Patch, change_json, edited, edited_json

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from arte_edge.cache import sha256_file
from arte_edge.console import Reporter
from arte_edge.errors import ArteError, InputError
from arte_edge.export.outcome import Outcome
from arte_edge.export.pipeline import export
from arte_edge.export.recipe import Recipe, build
from arte_edge.export.source import Source, open_source
from arte_edge.gguf import reader
from arte_edge.gguf.convert import convert
from arte_edge.gguf.from_base import checkpoint_to_gguf
from arte_edge.gguf.quantize import quantize
from arte_edge.gguf.reader import STRING, Field, read_model_header
from arte_edge.gguf.writer import rewrite
from arte_edge.models.artifact import checksums_of, parse_list
from arte_edge.results.student_json import Speed, read_student, write_student
from arte_edge.runtimes.loader import open_model
from arte_edge.verify.check import Check
from arte_edge.verify.gate import Verdict

from .conftest import visible

RECIPE = build("test", {"gguf": {"imatrix": False}, "verify": {"examples": 0}})
_LOOSE = {"examples": 0, "thresholds": {"F16": {"kl_mean": 9.0}, "F32": {"kl_mean": 9.0}}}
LOOSE = build("loose", {"gguf": {"imatrix": False}, "verify": _LOOSE})


class Interrupt(BaseException):
    """A kill in the middle of an export."""


@dataclass
class Gate:
    """Replaces the gate, which is slow: rejects the types in `rejects` and counts its calls."""

    rejects: set[str] = field(default_factory=set)
    verified: list[str] = field(default_factory=list)
    allowed: list[int] = field(default_factory=list)  # stop tokens that may be missing
    budgets: list[int] = field(default_factory=list)  # tokens of an answer

    def verify_file(self, reference: Any, artifact: Path, _: Any, limits: Any, **more: Any) -> Verdict:
        self.budgets.append(more["answer_tokens"])
        self.allowed.append(limits.stop_differences)
        type = read_model_header(artifact).quantization  # the file is complete when it is verified
        self.verified.append(type)
        passed = type not in self.rejects
        note = "" if passed else "it answers in another language"
        return Verdict(passed, (Check("kl mean", 0.5, 0.1, passed, note),), artifact=artifact.name)


def rewrite_copy(gguf: Path, out: Path, drop: tuple[str, ...]) -> Path:
    rewrite(Path(shutil.copy(gguf, out)), {}, drop)
    return out


class Closed:
    def close(self) -> None: ...


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: Patch) -> Gate:
    gate = Gate()
    monkeypatch.setenv("ARTE_EDGE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("arte_edge.verify.gate.verify_file", gate.verify_file)
    monkeypatch.setattr("arte_edge.export.pipeline.open_model", lambda path: Closed())
    return gate


@pytest.fixture
def source(tiny_run: Path, gate: Gate) -> Source:
    return open_source(str(tiny_run))


def run(source: Source, out: Path, ggufs: str, recipe: Recipe = RECIPE, **more: Any) -> Outcome:
    return export(source, parse_list(ggufs, None), recipe, out, Reporter(quiet=True), **more)


def test_many_formats_in_one_call_share_one_conversion(
    source: Source, gate: Gate, tmp_path: Path, monkeypatch: Patch
) -> None:
    from arte_edge.gguf import convert as module

    conversions: list[Path] = []
    parsed: list[str] = []  # header of the F16 file, and of each quantized one
    parse = reader._parsed
    monkeypatch.setattr(reader, "_parsed", lambda path: parsed.append(path.name) or parse(path))
    real = module.convert

    def counted(checkpoint: Path, out: Path, *rest: Any, **more: Any) -> Path:
        conversions.append(out)
        return real(checkpoint, out, *rest, **more)

    monkeypatch.setattr(module, "convert", counted)
    outcome = run(source, tmp_path / "out", "F16,Q8_0,Q4_0")
    assert len(conversions) == 1 and len(parsed) == 3, parsed
    asking = read_student(tmp_path / "out").asking  # type: ignore[union-attr]
    assert gate.budgets == [asking.answer_tokens] * 3
    assert [a.quantization for a in outcome.artifacts] == ["F16", "Q8_0", "Q4_0"] == gate.verified
    names = {f"tiny-{type}.gguf" for type in gate.verified}
    beside = {"Modelfile", "answer.gbnf", "answer.schema.json", "student.json"}
    beside |= {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    assert set(visible(tmp_path / "out")) - {"tokenizer/chat_template.jinja"} == names | beside
    assert {path.name for path in (tmp_path / "out" / ".export").iterdir()} == {"lock", "records"}
    # Ollama gets the first quantized file, wherever F16 stood.
    assert "FROM ./tiny-Q8_0.gguf" in (tmp_path / "out" / "Modelfile").read_text()


def test_the_file_that_the_run_evaluated_is_the_one_that_is_exported(
    tiny_run: Path, gate: Gate, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    student, evaluated = folder / "tune" / "student", folder / "tune" / "student-F16.gguf"
    base = convert(student, tmp_path / "base.gguf")
    rewrite(base, {"general.url": Field(STRING, b"https://example.org/base")})
    checkpoint_to_gguf(student, base, evaluated)
    sums = {evaluated.name: sha256_file(evaluated)}
    change_json(folder / "tune" / "manifest.json", lambda manifest: manifest["files"].update(sums))
    before = checksums_of(evaluated)

    (artifact,) = run(open_source(str(folder)), tmp_path / "out", "F16").artifacts
    assert artifact.tensor_sha256 == before.tensor_sha256
    assert checksums_of(evaluated) == before
    exported, measured = (read_model_header(p).fields for p in (tmp_path / "out" / artifact.file, evaluated))
    for key in ("ggml.tokens", "chat_template", "ggml.pre"):
        assert exported[f"tokenizer.{key}"] == measured[f"tokenizer.{key}"]
    assert exported["general.name"].value == b"tiny" and "general.url" not in exported

    evaluated.unlink()  # the converter then writes the same tensors
    (again,) = run(open_source(str(folder)), tmp_path / "again", "F16").artifacts
    assert again.tensor_sha256 == before.tensor_sha256


def test_the_same_command_again_builds_and_verifies_nothing(source: Source, gate: Gate, tmp_path: Path) -> None:
    run(source, tmp_path / "out", "BF16,F16")
    before = visible(tmp_path / "out")
    gate.verified.clear()
    run(source, tmp_path / "out", "BF16,F16")
    assert gate.verified == [] and visible(tmp_path / "out") == before


def test_another_format_later_joins_the_others(source: Source, gate: Gate, tmp_path: Path) -> None:
    run(source, tmp_path / "out", "BF16")
    outcome = run(source, tmp_path / "out", "F32")
    assert gate.verified == ["BF16", "F32"]
    assert {a.quantization for a in outcome.student.artifacts} == {"BF16", "F32"}
    assert read_student(tmp_path / "out") == outcome.student


def test_a_file_that_fails_is_renamed_and_the_others_are_built(source: Source, gate: Gate, tmp_path: Path) -> None:
    gate.rejects = {"F32"}
    outcome = run(source, tmp_path / "out", "F32,BF16")
    assert [a.status for a in outcome.artifacts] == ["rejected", "ok"]
    files = visible(tmp_path / "out")
    assert "tiny-F32.gguf.rejected" in files and "tiny-F32.gguf" not in files
    document = json.loads(files["student.json"])
    assert "another language" in document["artifacts"][0]["reason"]
    assert document["artifacts"][0]["file"] == "tiny-F32.gguf.rejected"
    assert b"F32" not in files["Modelfile"] and b"FROM ./tiny-BF16.gguf" in files["Modelfile"]


def test_nothing_is_made_from_a_full_width_file_that_is_not_the_student(
    source: Source, gate: Gate, tmp_path: Path
) -> None:
    gate.rejects = {"F16"}
    outcome = run(source, tmp_path / "out", "Q8_0,BF16")
    assert gate.verified == ["F16", "BF16"]
    assert [(a.quantization, a.status) for a in outcome.artifacts] == [("BF16", "ok"), ("F16", "rejected")]
    assert [f.format.type for f in outcome.failures] == ["Q8_0"] and "F16" in outcome.failures[0].error.message
    assert "tiny-F16.gguf.rejected" in visible(tmp_path / "out") and not (tmp_path / "out/tiny-Q8_0.gguf").exists()
    gate.rejects = set()
    gate.verified.clear()
    assert [a.status for a in run(source, tmp_path / "out", "Q8_0", LOOSE).artifacts] == ["ok"]
    run(source, tmp_path / "out", "Q8_0,Q4_0", LOOSE)
    assert gate.verified == ["F16", "Q8_0", "Q4_0"]  # once it has passed, never again


def test_a_tuning_that_was_lost_shows_in_the_file_that_the_quantized_ones_are_made_from(
    tiny_student: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    import torch

    from arte_edge.gguf import convert as module
    from arte_edge.verify.check import thresholds_for
    from arte_edge.verify.gate import verify_file

    def tune(tensors: dict[str, Any]) -> None:
        torch.manual_seed(1)
        for name, tensor in tensors.items():
            if "mlp.up_proj" in name:
                tensor += 0.02 * torch.randn_like(tensor)

    monkeypatch.setenv("ARTE_EDGE_HOME", str(tmp_path / "home"))
    tuned, real = edited(tiny_student, tmp_path / "tuned", tune), module.convert
    lost = real(tiny_student, tmp_path / "lost.gguf")
    quantize(lost, tmp_path / "q4.gguf", "Q4_K_M")
    source = open_source(str(tuned))
    limits = thresholds_for("Q4_K_M").model_copy(update={"top1": None})  # a random model's likeliest are ties
    with contextlib.closing(open_model(tuned)) as reference:
        hidden = verify_file(reference, tmp_path / "q4.gguf", source.prompts[:8], limits)
    assert hidden.passed, hidden.reason
    monkeypatch.setattr(module, "convert", lambda checkpoint, *rest, **more: real(tiny_student, *rest, **more))
    outcome = run(source, tmp_path / "out", "Q4_K_M")
    assert [(a.quantization, a.status) for a in outcome.artifacts] == [("F16", "rejected")]
    assert "kl mean" in outcome.rejected[0].reason and [f.format.type for f in outcome.failures] == ["Q4_K_M"]


def test_looser_thresholds_bring_a_rejected_file_back(source: Source, gate: Gate, tmp_path: Path) -> None:
    gate.rejects = {"F32"}
    run(source, tmp_path / "out", "F32")
    gate.rejects = set()
    outcome = run(source, tmp_path / "out", "F32", LOOSE)
    assert outcome.artifacts[0].status == "ok" and gate.verified == ["F32", "F32"]
    assert "tiny-F32.gguf" in (files := visible(tmp_path / "out")) and "tiny-F32.gguf.rejected" not in files


def test_a_format_that_cannot_be_built_does_not_stop_the_others(source: Source, gate: Gate, tmp_path: Path) -> None:
    outcome = run(source, tmp_path / "out", "IQ2_XXS,BF16")  # the first needs an importance matrix
    assert [f.format.type for f in outcome.failures] == ["IQ2_XXS"]
    assert [a.quantization for a in outcome.artifacts] == ["BF16"]
    assert (tmp_path / "out" / ".export" / "base").is_dir()  # the next attempt starts from it


def test_a_folder_with_another_student_is_rejected(
    source: Source, gate: Gate, tiny_student: Path, tmp_path: Path
) -> None:
    other = edited_json(tiny_student, tmp_path / "other", rms_norm_eps=1e-4)
    run(source, tmp_path / "out", "BF16")
    with pytest.raises(InputError, match="another student"):
        run(open_source(str(other)), tmp_path / "out", "F16")
    run(open_source(str(other)), tmp_path / "out", "F16", force=True)
    files = visible(tmp_path / "out")
    assert "other-F16.gguf" in files and "tiny-BF16.gguf" not in files


def test_every_gguf_holds_its_lineage_and_no_path(source: Source, gate: Gate, tmp_path: Path) -> None:
    outcome = run(source, tmp_path / "out", "BF16,F16")
    for artifact in outcome.artifacts:
        keys = read_model_header(tmp_path / "out" / artifact.file).fields
        assert keys["general.name"].value == b"tiny"
        assert keys["arte_edge.student.sha256"].value == outcome.student.student.sha256.encode()
        assert keys["general.base_model.0.name"].value and keys["general.dataset.count"].value == 1
    private = [str(tmp_path), str(Path.home())]
    for name, data in visible(tmp_path / "out").items():
        assert not [text for text in private if text.encode() in data], name


def test_what_names_no_public_place_is_left_out_of_the_metadata_and_said(
    source: Source, gate: Gate, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(source.checkpoint, tmp_path / "student"))
    (folder / "README.md").write_text(
        "---\nbase_model: /gpfs/jane/base\nmodel_name: /gpfs/jane/out\nlicense_link: ../jane/LICENSE\n"
        "datasets: [/gpfs/jane/rows, org/rows]\nurl: https://jane:hush@example.org/x\n"
        "description: trained in /home/jane/lab\n"
        "tags: ['base_model:adapter:/gpfs/jane/base', 'base_model:adapter:org/base', lora, ~/jane/notes]\n---\n"
    )
    (artifact,) = run(open_source(str(folder)), tmp_path / "out", "F16").artifacts
    content = (tmp_path / "out" / artifact.file).read_bytes()
    assert b"jane" not in content and b"hush" not in content
    fields = read_model_header(tmp_path / "out" / artifact.file).fields
    assert fields["general.tags"].value == [b"base_model:adapter:org/base", b"lora"]
    assert fields["general.dataset.0.repo_url"].value == b"https://huggingface.co/org/rows"
    assert fields["general.dataset.count"].value == 1
    for key in ("base_model", "datasets", "tags", "license_link", "model_name", "url", "general.description"):
        assert key in artifact.notes[0] and "jane" not in artifact.notes[0]


def test_a_file_of_the_user_s_own_converter_holds_its_lineage_too(source: Source, gate: Gate, tmp_path: Path) -> None:
    run(source, tmp_path / "ours", "F16")
    ours = tmp_path / "ours" / "tiny-F16.gguf"
    bare = rewrite_copy(ours, tmp_path / "bare.gguf", drop=("arte_edge.", "general.name"))
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    (checkout / "convert_hf_to_gguf.py").write_text(
        f"import shutil, sys; shutil.copy({str(bare)!r}, sys.argv[sys.argv.index('--outfile') + 1])"
    )
    run(source, tmp_path / "theirs", "F16", llama_cpp=checkout)
    fields = read_model_header(tmp_path / "theirs" / "tiny-F16.gguf").fields
    assert "arte_edge.student.sha256" in fields and "arte_edge.student.sha256" not in read_model_header(bare).fields
    assert fields["general.name"] == read_model_header(ours).fields["general.name"]


def test_measurements_survive_another_export(source: Source, gate: Gate, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(source, out, "F16").student
    speed = Speed(device="kitchen", runtime="llama_cpp", threads=4, decode_tokens_per_s=9.0)
    artifact = first.artifacts[0].model_copy(update={"speeds": (speed,)})
    write_student(out, first.model_copy(update={"artifacts": (artifact,)}))
    (out / "tiny-F16.gguf").unlink()
    assert run(source, out, "F16").student.artifacts[0].speeds == (speed,)


def test_an_end_token_that_finds_no_place_in_a_gguf_is_a_note(source: Source, gate: Gate, tmp_path: Path) -> None:
    ends = edited_json(source.checkpoint, tmp_path / "ends", "generation_config.json", eos_token_id=[2, 0, 1, 9])
    (artifact,) = run(open_source(str(ends)), tmp_path / "out", "Q8_0").artifacts
    assert gate.allowed[-1] == 1 and len(artifact.notes) == 1 and "stop text" in artifact.notes[0]


def test_the_tokenizer_beside_the_files_is_the_base_s(source: Source, gate: Gate, tmp_path: Path) -> None:
    run(source, tmp_path / "out", "F16")
    for path in (tmp_path / "out" / "tokenizer").iterdir():
        assert path.read_bytes() == (source.checkpoint / path.name).read_bytes()


def test_a_disk_that_is_too_small_is_reported_first(source: Source, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=9))
    with pytest.raises(ArteError, match="no room for these formats"):
        run(source, tmp_path / "out", "F16")
    with pytest.raises(InputError, match="No format"):
        export(source, (), RECIPE, tmp_path / "out", Reporter(quiet=True))


@pytest.fixture
def interrupted(monkeypatch: Patch) -> Iterator[Callable[[int], None]]:
    """Cut the process at the n-th rename: every file's and every record's last step."""
    real = Path.replace
    left = 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left == 0:
            raise Interrupt
        return real(self, target)

    def after(n: int) -> None:
        nonlocal left
        left = n

    monkeypatch.setattr(Path, "replace", replace)
    yield after


def test_an_export_killed_at_any_rename_shows_only_complete_files_and_resumes(
    source: Source, gate: Gate, tmp_path: Path, interrupted: Callable[[int], None]
) -> None:
    gate.rejects = {"F32"}
    interrupted(0)
    run(source, tmp_path / "alone", "BF16,F32,F16")
    whole = visible(tmp_path / "alone")
    n = 0
    while True:
        n += 1
        out = tmp_path / f"cut-{n}"
        interrupted(n)
        try:
            run(source, out, "BF16,F32,F16")
            break
        except (Interrupt, ArteError):
            shown = visible(out)
            assert [name for name in shown if shown[name] != whole.get(name)] == []
        interrupted(0)
        run(source, out, "BF16,F32,F16")
        assert visible(out) == whole
    assert n > 12
