"""Write the tables of docs/presets.md: every key of a run, its default, and what each shipped preset sets.

The words around the tables are written by hand; what lies between the two marks is
made from the code, so that a default cannot go stale. ``--check`` compares and changes
nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from arte_edge import catalog
from arte_edge.distill.config import RunConfig, load_toml

PAGE = Path(__file__).parent / "presets.md"
BEGIN, END = "<!-- keys: written by docs/build_presets_page.py -->", "<!-- end of keys -->"


def render(page: str) -> str:
    """Return `page` with the tables between the marks made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{_tables()}\n{END}{after}"


def _tables() -> str:
    presets = {name: load_toml(catalog.find("presets", name)) for name in catalog.names("presets")}
    config = RunConfig()
    top = [name for name in RunConfig.model_fields if not isinstance(getattr(config, name), BaseModel)]
    parts = ["## At the top", "", *_head(presets), *(_row((name,), config, presets) for name in top), ""]
    for name in RunConfig.model_fields:
        section = getattr(config, name)
        if isinstance(section, BaseModel):
            words = (type(section).__doc__ or "").splitlines()[0]
            parts += [f"## `[{name}]`", "", words, "", *_head(presets)]
            parts += [_row((name, key), section, presets) for key in type(section).model_fields]
            parts.append("")
    return "\n".join(parts)


def _head(presets: dict[str, Any]) -> list[str]:
    cells = ["key", "default", *presets, "what it is"]
    return [f"| {' | '.join(cells)} |", "|" + "---|" * len(cells)]


def _row(path: tuple[str, ...], model: BaseModel, presets: dict[str, Any]) -> str:
    default, field = getattr(model, path[-1]), type(model).model_fields[path[-1]]
    sets = (_cell(_set_by(tables, path)) for tables in presets.values())
    about = f"{field.description or ''}{_limits(field.metadata)}"
    cells = [f"`{'.'.join(path)}`", _cell(default), *sets, about]
    return f"| {' | '.join(cells)} |"


def _limits(metadata: list[Any]) -> str:
    """Return the limits of a count that a reader would not guess: a minimum above 1, and a maximum."""
    limits = {name: getattr(one, name, None) for one in metadata for name in ("ge", "le") if hasattr(one, name)}
    counts = {name: value for name, value in limits.items() if isinstance(value, int) and value > 1}
    parts = [f"{word} {counts[name]}" for name, word in (("ge", "at least"), ("le", "at most")) if name in counts]
    return f" ({', '.join(parts)})" if parts else ""


def _cell(value: Any) -> str:
    """Return a value as TOML spells it; nothing for none."""
    return "" if value is None else f"`{json.dumps(value)}`"


def _set_by(tables: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        tables = tables.get(part, {})
    return None if tables == {} else tables


def main(argv: list[str]) -> int:
    """Write the page, or with ``--check`` compare it; return 1 if it is out of date."""
    found = PAGE.read_text(encoding="utf-8")
    wanted = render(found)
    if "--check" not in argv:
        PAGE.write_text(wanted, encoding="utf-8")
    elif found != wanted:
        print("docs/presets.md differs from the code: python docs/build_presets_page.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
