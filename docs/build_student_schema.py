"""Write docs/student.schema.json, the JSON Schema of ``student.json``, from its pydantic models.

Readers in other languages need the schema without this package. ``--check`` compares
and changes nothing.
"""

from __future__ import annotations

import json
import sys
from difflib import unified_diff
from pathlib import Path

from arte_edge.results.accuracy import SCHEMA_VERSION
from arte_edge.results.student_json import StudentFile

PAGE = Path(__file__).parent / "student.schema.json"


def render() -> str:
    """Return the schema as JSON text, in the dialect of draft 2020-12."""
    schema = StudentFile.model_json_schema(mode="serialization")
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:arte-edge:student:{SCHEMA_VERSION}",
        "title": "student.json",
    }
    return json.dumps({**head, **{k: v for k, v in schema.items() if k not in head}}, indent=1) + "\n"


def main(argv: list[str]) -> int:
    """Write the schema, or with ``--check`` compare it; return 1 if it is out of date."""
    wanted = render()
    if "--check" not in argv:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    found = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if found == wanted:
        return 0
    diff = unified_diff(found.splitlines(), wanted.splitlines(), PAGE.name, "the code", lineterm="", n=1)
    print("\n".join(diff))
    print(f"docs/{PAGE.name} differs from the code: make docs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
