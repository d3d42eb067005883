"""Write docs/cli.md, the reference of every command, from the commands themselves.

Help text that is typed twice goes stale, so the page is made by Typer's own documenter and
``--check`` (part of ``make check``) fails while the page differs from the code.
"""

from __future__ import annotations

import subprocess
import sys
from difflib import unified_diff
from pathlib import Path

__all__ = ["PAGE", "main", "render"]

PAGE = Path(__file__).parent / "cli.md"
HEADER = """\
<!-- Written by `make docs` from the code. Edits here are lost: edit the help text of the command. -->

# Command reference

Data goes to stdout and progress to stderr. Exit codes: 0 done; 1 the run failed; 2 your input;
3 a fidelity gate failed; 4 stopped early, and the same command goes on. `--debug` stands before
the verb: `arte-edge --debug tasks ls`.

"""


def render() -> str:
    """Return the page: the header above, then one section a command.

    Raises:
        RuntimeError: a default names this machine's home folder, which would differ on every other.
        subprocess.CalledProcessError: the command cannot be imported; its traceback is on stderr.
    """
    command = [sys.executable, "-m", "typer", "arte_edge.cli.main", "utils", "docs", "--name", "arte-edge"]
    body = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True).stdout
    if (home := str(Path.home())) != "/" and home in body:
        raise RuntimeError(f"A default in the help names {home}; give that option a default of None")
    # One page has one top heading, and it is the header's.
    lowered = "\n".join(f"#{line}" if line.startswith("#") else line for line in body.strip().splitlines())
    return f"{HEADER}{lowered}\n"


def main(argv: list[str]) -> int:
    """Write the page, or with ``--check`` compare it; return 1 if it is out of date."""
    wanted = render()
    if "--check" not in argv:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    found = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if found == wanted:
        return 0
    diff = unified_diff(found.splitlines(), wanted.splitlines(), "docs/cli.md", "the code", lineterm="", n=1)
    print("\n".join(diff))
    print("docs/cli.md differs from the code: make docs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
