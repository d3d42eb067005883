"""Write docs/cli.md, the reference of every command, from the commands themselves.

Help text that is typed twice goes stale, so the page is made by Typer's own documenter and
``--check`` (part of ``make check``) fails while the page differs from the code.
"""

from __future__ import annotations

import re
import subprocess
import sys
from difflib import unified_diff
from pathlib import Path

PAGE = Path(__file__).parent / "cli.md"
HEADER = """\
<!-- Written by `make docs` from the code. Edits here are lost: edit the help text of the command. -->

# Command reference

Data goes to stdout and progress to stderr. Every command has `--help`. Exit codes: 0 done; 1 the run
failed; 2 invalid input; 3 a fidelity gate failed; 4 stopped early, re-run the same command to resume.
`--debug` precedes the verb: `arte-edge --debug tasks ls`.

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
    return HEADER + _compact(f"{lowered}\n")


def _compact(body: str) -> str:
    """Move each usage line into its heading; drop `--help` and the summaries of sections that follow."""
    usage = re.compile(r"^(#+) `(arte-edge[^`]*)`\n(.*?)\*\*Usage\*\*:\n\n```console\n\$ (.*?)\n```\n\n", re.M | re.S)
    body = usage.sub(lambda found: f"{found[1]} `{found[4].replace(' [OPTIONS]', '')}`\n{found[3]}", body)
    body = body.replace("* `--help`: Show this message and exit.\n", "")
    body = re.sub(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+\n?", "", body)
    body = re.sub(r"\*\*Options\*\*:\n\n(?!\* )", "", body)
    return re.sub(r"\n{3,}", "\n\n", body)


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
