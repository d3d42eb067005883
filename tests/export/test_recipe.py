from pathlib import Path

import pytest

from arte_edge import catalog
from arte_edge.api import plan_export
from arte_edge.errors import InputError
from arte_edge.export.recipe import build, load_recipe
from arte_edge.models.artifact import format_of
from arte_edge.verify.check import thresholds_for

SHIPPED = {"laptop", "raspberry-pi-5", "raspberry-pi-4", "browser-onnx", "f16", "everything"}


def test_every_shipped_recipe_loads_and_has_thresholds() -> None:
    names = catalog.names("export")
    assert set(names) >= SHIPPED
    for name in names:
        recipe = load_recipe(name)
        assert recipe.formats, name
        for format in recipe.formats:
            recipe.verify.limits(format)


@pytest.mark.parametrize(
    ("tables", "key", "near"),
    [
        ({"ggfu": {}}, "ggfu", "gguf"),
        ({"gguf": {"typs": []}}, "gguf.typs", "types"),
        ({"verify": {"thresholds": {"Q4_K_M": {"kl_maen": 1}}}}, "verify.thresholds.Q4_K_M.kl_maen", "kl_mean"),
    ],
)
def test_an_unknown_key_names_its_nearest_neighbour(tables: dict[str, object], key: str, near: str) -> None:
    with pytest.raises(InputError, match=f"mine: unknown key '{key}'") as error:
        build("mine", tables)
    assert f"'{near}'" in error.value.hint


def test_every_problem_is_named_at_once() -> None:
    limits = {"Q4_Z": {"kl_mean": 1.0}}
    tables = {"gguf": {"types": ["Q4_X"]}, "onnx": {"block_size": 33}, "verify": {"thresholds": limits}}
    with pytest.raises(InputError) as error:
        build("mine", tables)
    assert all(part in error.value.message for part in ("Q4_X", "onnx.block_size", "verify.thresholds"))


def test_a_recipe_changes_only_the_thresholds_it_names() -> None:
    recipe = build("mine", {"verify": {"thresholds": {"Q4_K_M": {"kl_mean": 0.5, "kl_p99": "off"}}}})
    limits, built_in = recipe.verify.limits(format_of("Q4_K_M")), thresholds_for("Q4_K_M")
    assert (limits.kl_mean, limits.kl_p99, limits.top1) == (0.5, None, built_in.top1)
    assert recipe.verify.limits(format_of("Q8_0")) == thresholds_for("Q8_0")


def test_thresholds_for_one_processor_override_those_for_all() -> None:
    tables = {"optimum-int8": {"kl_mean": 0.5, "top1": 0.5}, "optimum-int8-arm64": {"kl_mean": 0.7}}
    recipe = build("mine", {"verify": {"thresholds": tables}})
    arm, avx = (recipe.verify.limits(format_of(f"optimum-int8-{arch}")) for arch in ("arm64", "avx2"))
    assert (arm.kl_mean, arm.top1) == (0.7, 0.5)
    assert (avx.kl_mean, avx.top1) == (0.5, 0.5)


def test_overrides_for_one_type_extend_those_for_all() -> None:
    tables = {"overrides": {"token_embd": "Q8_0"}, "overrides_for": {"q4_k_m": {"ffn_down": "Q6_K"}}}
    gguf = build("mine", {"gguf": tables}).gguf
    assert gguf.overrides_of("Q4_K_M") == {"token_embd": "Q8_0", "ffn_down": "Q6_K"}
    assert gguf.overrides_of("Q8_0") == {"token_embd": "Q8_0"}


def test_a_user_s_recipe_is_found_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[gguf]\ntypes = ["q8_0"]\n[onnx]\nformats = ["optimum-int8"]\narch = "arm64"\n')
    assert [f.label for f in load_recipe(str(path)).formats] == ["Q8_0", "optimum-int8-arm64"]


def test_a_recipe_without_formats_is_rejected_before_its_source_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("[gguf]\ntypes = []\n[onnx]\nformats = []\n")
    assert load_recipe(str(path)).formats == ()
    with pytest.raises(InputError, match="no format"):
        plan_export("no/such-model", recipe=path)
