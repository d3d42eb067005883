"""``arte-edge export --list``: the shipped recipes and every format there is."""

from __future__ import annotations

from arte_edge import catalog
from arte_edge.console import emit_json, out
from arte_edge.export.formats import ARCHS
from arte_edge.export.recipe import load_recipe
from arte_edge.gguf.types import QUANT_TYPES

__all__ = ["ONNX", "recipe_rows", "show_list"]

ONNX = ("int4", "int8", "fp32", "optimum-fp32", *(f"optimum-int8-{arch}" for arch in ARCHS))


def recipe_rows() -> list[dict[str, object]]:
    """Return name, description and formats of every shipped recipe."""
    rows: list[dict[str, object]] = []
    for name in catalog.names("export"):
        text = catalog.find("export", name).read_text("utf-8")
        formats = [format.label for format in load_recipe(name).formats]
        rows.append({"name": name, "description": catalog.describe(text), "formats": formats})
    return rows


def show_list(as_json: bool) -> None:
    """Print recipes and formats."""
    rows, ggufs = recipe_rows(), list(QUANT_TYPES)
    if as_json:
        emit_json({"recipes": rows, "gguf": ggufs, "onnx": list(ONNX)})
        return
    for row in rows:
        out.print(f"{row['name']:<16}{row['description']}", markup=False, soft_wrap=True)
        out.print(f"{'':<16}{', '.join(map(str, row['formats']))}", markup=False, soft_wrap=True)  # type: ignore[call-overload]
    out.print(f"\n--gguf  {', '.join(ggufs)}", markup=False)
    out.print(f"--onnx  {', '.join(ONNX)}", markup=False)
