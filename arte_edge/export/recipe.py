"""Recipes: which formats to export for a device, with what settings and verification thresholds.

Recipes are the TOML files in ``export/`` and the user's own. An unknown key is an error that names the
nearest known one; thresholds that a recipe does not set are those of `arte_edge.verify.check`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from arte_edge import catalog
from arte_edge.files import for_pydantic, read_toml, validated
from arte_edge.models.artifact import Arch, Format, format_of, gguf_format, onnx_format, unique
from arte_edge.onnx.genai_builder import Rounding
from arte_edge.verify.check import TYPES, Thresholds, thresholds_for


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GgufSettings(_Section):
    """The GGUF files of a recipe."""

    types: tuple[str, ...] = Field(default=(), description="llama.cpp's names: Q4_K_M, Q8_0, F16, …")
    base: Literal["F16", "BF16", "F32"] = Field(
        default="F16", description="full-width file that the others are quantized from"
    )
    imatrix: bool = Field(
        default=True, description="weight rounding errors by activations on training texts, if there are any"
    )
    imatrix_prompts: int = Field(
        default=200, ge=1, description="largest number of training texts for the importance matrix"
    )
    overrides: dict[str, str] = Field(default={}, description="tensor pattern = type, for every quantized file")
    overrides_for: dict[str, dict[str, str]] = Field(
        default={}, description="overrides for one type: [gguf.overrides_for.Q4_K_M]"
    )

    @field_validator("types")
    @classmethod
    def _known(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(for_pydantic(gguf_format, name).type for name in types)

    @field_validator("overrides_for")
    @classmethod
    def _known_types(cls, tables: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
        return {for_pydantic(gguf_format, name).type: table for name, table in tables.items()}

    def overrides_of(self, type: str) -> dict[str, str]:
        """Return the per-tensor overrides of one type; its own override the general ones."""
        return {**self.overrides, **self.overrides_for.get(type, {})}


class OnnxSettings(Rounding):
    """The ONNX folders of a recipe."""

    formats: tuple[str, ...] = Field(
        default=(), description="int4, int8, fp32 (onnxruntime-genai), optimum-fp32, optimum-int8-arm64, …"
    )
    arch: Arch = Field(default="avx2", description="processor for an optimum int8 that names none")

    @field_validator("formats")
    @classmethod
    def _known(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        for name in formats:
            for_pydantic(onnx_format, name)
        return formats


class VerifySettings(_Section):
    """How many prompts and examples verification uses, and its thresholds."""

    prompts: int = Field(default=24, ge=4, description="held-out prompts for comparing logits")
    examples: int = Field(default=100, ge=0, description="held-out task examples that both models answer; 0: none")
    thresholds: dict[str, Thresholds] = Field(
        default={}, description="by format: [verify.thresholds.Q4_K_M]; unset ones have built-in values"
    )

    @field_validator("thresholds")
    @classmethod
    def _known(cls, tables: dict[str, Thresholds]) -> dict[str, Thresholds]:
        for name in tables:
            for_pydantic(format_of, name)
        return tables

    def limits(self, format: Format) -> Thresholds:
        """Return the thresholds of one format: the built-in ones, overridden by the recipe's.

        A table for ``optimum-int8`` is for every processor; one for ``optimum-int8-arm64`` overrides it.
        """
        general = format.label.removesuffix(f"-{format.arch}")
        limits = thresholds_for(general if general in TYPES else format.type)
        for name in dict.fromkeys((general, format.label)):
            if name in self.thresholds:
                given = self.thresholds[name]
                limits = limits.model_copy(update={key: getattr(given, key) for key in given.model_fields_set})
        return limits


class Recipe(_Section):
    """A whole recipe."""

    gguf: GgufSettings = GgufSettings()
    onnx: OnnxSettings = OnnxSettings()
    verify: VerifySettings = VerifySettings()

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats of the recipe, GGUF first."""
        ggufs = [gguf_format(name) for name in self.gguf.types]
        return unique([*ggufs, *(onnx_format(name, self.onnx.arch) for name in self.onnx.formats)])


def load_recipe(ref: str) -> Recipe:
    """Load a shipped recipe by name, or a recipe file by path.

    Raises InputError: no such recipe, not TOML, or wrong keys or values; lists all of them.
    """
    path = catalog.find("export", ref)
    return build(str(path if path.name != f"{ref}.toml" else ref), read_toml(path))


def build(source: str, tables: Mapping[str, Any]) -> Recipe:
    """Return the recipe in nested tables; `source` names it in errors.

    Raises InputError: lists all wrong keys and values; for an unknown key the nearest known one.
    """
    return validated(Recipe, tables, source)
