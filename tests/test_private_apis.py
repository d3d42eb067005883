"""Private names of other packages: all listed in one place, all where the installed versions have them."""

import ast
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from tiny import Patch

from arte_edge import private_apis
from arte_edge.distill.train import dpo
from arte_edge.distill.train.completion_head import attends_fully, score_completions_only
from arte_edge.errors import ArteError
from arte_edge.onnx.simplify import simplify
from arte_edge.private_apis import PRIVATE_NAMES, PrivateName, missing, problem
from arte_edge.runtimes.transformers import onednn_prepack, packed_kv_cache

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "arte_edge"
BOUNDED = {"torch", "trl", "transformers", "peft", "onnxruntime", "onnxruntime-genai", "gguf"}
BOUNDED |= {"llama-cpp-python", "xllamacpp", "ray"}
# Used on objects of our own, or Python's.
OURS = {"_exit", "_asdict", "_replace"}


@pytest.mark.parametrize("row", PRIVATE_NAMES, ids=lambda row: f"{row.name} in {row.used_in}")
def test_the_installed_versions_have_every_listed_name(row: PrivateName) -> None:
    pytest.importorskip(row.module.partition(".")[0])
    assert not problem(row), (
        f"{problem(row)}. {row.used_in} uses it; without it: {row.without}. "
        f"Adapt that module and the list in {private_apis.__name__}, then raise the bound in pyproject.toml."
    )


def test_every_row_names_a_module_that_uses_it_and_asks_first() -> None:
    for row in PRIVATE_NAMES:
        source = inspect.getsource(importlib.import_module(row.used_in))
        assert row.name.rpartition(".")[2] in source, f"{row.used_in} does not use {row.name}: drop the row"
        assert "missing(__name__)" in source, f"{row.used_in} does not ask whether {row.name} is there"


@pytest.fixture
def names_gone(monkeypatch: Patch) -> Iterator[None]:
    """No listed name is where it was, as after an update."""
    monkeypatch.setattr(private_apis, "problem", lambda row: f"{row.module} has no {row.name} any more")
    missing.cache_clear()
    yield
    missing.cache_clear()


def small_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes))


@pytest.mark.usefixtures("names_gone")
def test_scoring_runs_on_ordinary_layers_and_an_ordinary_cache_without_the_names() -> None:
    torch = pytest.importorskip("torch")
    model = small_llama().to(torch.bfloat16)
    assert not onednn_prepack.supported()
    assert onednn_prepack.pack(model) == 0
    assert not packed_kv_cache.supports_packing(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.usefixtures("names_gone")
def test_training_leaves_trls_own_head_and_rejects_a_trl_that_tokenizes_again() -> None:
    pytest.importorskip("trl")
    model = small_llama()
    forward = model.forward
    assert not score_completions_only(model, pairs=True)
    assert model.forward == forward
    assert not attends_fully(model.config)
    with pytest.raises(ArteError, match="_prepare_dataset") as error:
        dpo._Training(*[Any] * 7)  # nothing is looked at before
    assert "arte-edge[train]" in (error.value.hint or "")


@pytest.mark.usefixtures("names_gone")
def test_an_onnx_graph_stays_as_it_is_without_the_names(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    tensor = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [tensor], [result])), path)
    before = path.read_bytes()
    assert simplify(path) == (1, 1)
    assert path.read_bytes() == before


def private_attributes(path: Path) -> set[str]:
    """Return ``_names`` that a module takes from objects and that no module of ours defines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.fullmatch(r"_[a-z]\w*", node.attr)
    }


def defined_names() -> set[str]:
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name):
                            found.add(part.id)
                        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                            found.add(part.attr)
    return found


def test_no_private_name_of_another_package_is_used_without_being_listed() -> None:
    ours = defined_names() | OURS
    listed = {(row.used_in, row.name.rpartition(".")[2]) for row in PRIVATE_NAMES}
    unlisted = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module != private_apis.__name__:
            unlisted += [
                (module, name) for name in sorted(private_attributes(path) - ours) if (module, name) not in listed
            ]
    assert unlisted == []


def test_packages_with_listed_names_or_c_structs_have_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [Requirement(text) for texts in project["optional-dependencies"].values() for text in texts]
    for requirement in found:
        if requirement.name in BOUNDED:
            operators = {one.operator for one in requirement.specifier}
            assert "<" in operators or not operators, f"{requirement}: no upper bound"
    assert {row.module.partition(".")[0] for row in PRIVATE_NAMES} <= BOUNDED


def test_a_missing_name_and_a_lost_parameter_are_told_in_a_sentence() -> None:
    gone = PrivateName("json", "decoder._nothing", "x", "y")
    assert "json" in problem(gone) and "_nothing" in problem(gone)
    assert "no_module_of_this_name" in problem(PrivateName("no_module_of_this_name", "a", "x", "y"))
    assert "strictest" in problem(PrivateName("json", "loads", "x", "y", "s strictest"))
    assert not problem(PrivateName("json", "loads", "x", "y", "s"))
    with pytest.raises(ValueError, match="no listed name"):
        missing("arte_edge.errors")
