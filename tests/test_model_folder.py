"""What a folder with a model is: one table of the layouts that trainers, merges and downloads leave behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import Folders

from arte_edge.checkpoint import check_tied, shapes_of
from arte_edge.errors import InputError
from arte_edge.export.chat import read_chat
from arte_edge.gguf.convert import convert
from arte_edge.gguf.reader import read_model_header
from arte_edge.model_folder import chat_templates, look, tokenizer_files
from arte_edge.models.resolve import from_folder

ONE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
A, B, C = (f"model-0000{i}-of-0000{n}.safetensors" for i, n in ((1, 2), (2, 2), (1, 3)))
SHARDED = [A, B, f"{INDEX}:{A},{B}"]
BOTH = ["adapter_config.json", ADAPTER]


def lay_out(folder: Path, names: list[str]) -> Path:
    """Create empty files; ``index:a,b`` is a weights index that names a and b."""
    for name in (*names, "config.json"):
        path, _, files = name.partition(":")
        (folder / path).parent.mkdir(exist_ok=True)
        listed = {f"tensor.{i}": file for i, file in enumerate(files.split(","))}
        (folder / path).write_text(json.dumps({"weight_map": listed} if files else {}))
    return folder


@pytest.mark.parametrize(
    ("names", "kind", "weights", "others"),
    [
        ([ONE], "checkpoint", [ONE], []),
        (SHARDED, "checkpoint", [A, B], []),
        ([ONE, f"{INDEX}:{ONE}"], "checkpoint", [ONE], []),
        ([ONE, f"{INDEX}:{A},{B}"], "checkpoint", [ONE], []),  # of shards that are gone
        ([ONE, C], "checkpoint", [ONE], []),
        (
            [ONE, "pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors", "x.gguf"],
            *("checkpoint", [ONE]),
            ["consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "x.gguf"],
        ),
        ([*BOTH, "adapter_model.bin", f"b/{ADAPTER}"], "adapter", [ADAPTER], ["adapter_model.bin", "b/"]),
        (["x.gguf", "training_args.bin"], "gguf", ["x.gguf"], []),
    ],
)
def test_what_transformers_would_load_is_found(
    names: list[str], kind: str, weights: list[str], others: list[str], tmp_path: Path
) -> None:
    found = look(lay_out(tmp_path, names))
    assert (found.kind, [path.name for path in found.weights], list(found.others)) == (kind, weights, others)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([ONE, *SHARDED], rf"two sets of weights, {ONE} .*\n.*{A}"),
        ([*SHARDED, C], rf"two sets of weights.*{C}.*\n.*Delete"),
        ([A, f"{INDEX}:{A},{B}"], f"{B} is missing"),
        ([f"{INDEX}:{A},{B}"], f"{A} is missing"),
        ([A, B], f"{INDEX} is missing"),
        ([A, f"{INDEX}:../{A}"], "not a weights index"),
        ([ONE, *BOTH], "two models"),
        ([ONE, "adapter_config.json"], "two models"),
        (["adapter_config.json", "adapter_model.bin"], "adapter_model.bin, which is not read"),
        (["pytorch_model.bin"], "pickles"),
        (["consolidated.safetensors"], "only consolidated.safetensors, which is not read"),
        (["model.fp16.safetensors"], "only model.fp16.safetensors"),
        (["a.gguf", "b.gguf"], "holds 2 GGUF files"),
        ([f"checkpoint-{n}/{ADAPTER}" for n in (20, 100, 3)], "Give that folder: .*checkpoint-100"),
        (["checkpoint-5/model.safetensors"], "checkpoint-5"),
        ([], "no model here"),
    ],
)
def test_two_models_half_a_model_and_none_are_named(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        look(lay_out(tmp_path, names))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: Folders) -> Path:
    """A tied checkpoint with a tokenizer."""
    return tiny.write_student(tmp_path_factory.mktemp("tied") / "m")


def test_an_output_matrix_of_its_own_under_a_tied_flag_is_rejected(tied: Path, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    same = tiny.edited(tied, tmp_path / "same", lambda t: t.update({"lm_head.weight": t[name].clone()}))
    own = tiny.edited(tied, tmp_path / "own", lambda t: t.update({"lm_head.weight": t[name] * 2}))
    check_tied(same)
    assert "output.weight" not in read_model_header(convert(same, tmp_path / "x.gguf")).tensors
    for read in (from_folder, lambda folder: convert(folder, tmp_path / "y.gguf")):
        with pytest.raises(InputError, match="tie_word_embeddings"):
            read(own)
    untied = tiny.edited_json(own, tmp_path / "untied", tie_word_embeddings=False)
    assert from_folder(untied).folder == untied
    unsaid = tiny.edited_json(tied, tmp_path / "unsaid", tie_word_embeddings=None)
    with pytest.raises(InputError, match="tie_word_embeddings"):  # transformers makes up a matrix
        convert(unsaid, tmp_path / "z.gguf")


def test_a_merge_into_the_folder_of_old_shards_is_what_transformers_loads(tied: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tied, tmp_path / "merged"))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": A}}))
    assert shapes_of(folder) == shapes_of(tied)
    assert np.array_equal(tiny.hf_logits(folder, [5, 6]), tiny.hf_logits(tied, [5, 6]))


def test_an_adapters_tokenizer_comes_first_whole_or_by_file(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for path in (base / "tokenizer.json", base / "chat_template.jinja", adapter / "tokenizer_config.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"chat_template": "own", "eos_token": "<x>"}')
    assert set(tokenizer_files(base, adapter)) == {"tokenizer.json", "tokenizer_config.json"}
    chat = read_chat(base, adapter)
    assert (chat.chat_template, chat.special_tokens) == ("own", {"eos_token": "<x>"})
    (adapter / "chat_template.jinja").write_text("file")
    assert chat_templates(tokenizer_files(base, adapter)) == {"default": "file"}
