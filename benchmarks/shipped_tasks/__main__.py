"""Write the data of the shipped tasks: ``PYTHONPATH=benchmarks python -m shipped_tasks [NAME ...]``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from arte_edge import catalog
from arte_edge.tasks.folder import write_rows
from arte_edge.tasks.task import Example
from shipped_tasks import boolean_expressions, date_understanding, home, object_counting, snips

GENERATORS: dict[str, Callable[[], dict[str, list[Example]]]] = {
    "boolean_expressions": boolean_expressions.generate,
    "date_understanding": date_understanding.generate,
    "home_commands": home.generate_calls,
    "home_intents": home.generate_intents,
    "object_counting": object_counting.generate,
    "snips_slots": snips.generate,
}


def write_data(name: str, folder: Path) -> None:
    """Write the three splits of the shipped task `name` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in GENERATORS[name]().items():
        write_rows(folder / f"{split}.jsonl", rows, as_json=name == "snips_slots")
    if name == "snips_slots":
        snips.write_schema(folder)


def main(names: list[str]) -> int:
    """Write the data of the tasks `names`, default all shipped ones."""
    if unknown := set(names) - set(GENERATORS):
        print(f"no generator for {', '.join(sorted(unknown))}; known: {', '.join(GENERATORS)}")
        return 2
    for name in names or GENERATORS:
        try:
            write_data(name, catalog.root("tasks") / name)
        except FileNotFoundError as missing:
            print(missing)
            return 2
        print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
