"""Words of a private dialect that the field would have to translate are in no text that a user reads."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Each has a standard term: prompted, reported, is, resumes, rejected, required, few-shot, fixed, most expensive, …
DIALECT = re.compile(
    r"\b(asked|told|stands|goes on|refused|refuses|wanted|worked|mends?|mended|dearest|foretells?|wish|wishes"
    r"|parrots?|parroted|judged|the same command goes|what .* asks of)\b",
    re.IGNORECASE,
)
# Written values, keys of files and texts of others that have to stay as they are.
ALLOWED = {
    ("asking/form.py", "asked"),  # names in code
    ("distill/estimate.py", "asked"),
    ("distill/generation/rationales.py", "told"),
    ("results/comparison.py", "asked"),  # "as asked", a setting in summaries and tables
    ("verify/accuracy.py", "asked"),
    ("bench/report.py", "refused"),  # a status in bench.jsonl
    ("bench/runner.py", "refused"),
    ("bench/worker.py", "refused"),
    ("device/ssh/connection.py", "refused"),  # what ssh prints: "Connection refused"
    ("device/ssh/environment.py", "refused"),
    ("distill/stages/align.py", "asked"),  # keys of manifests, which runs of earlier versions have too
    ("distill/stages/elicit.py", "parroted"),
    ("distill/stages/tailor.py", "parroted"),
    ("distill/stages/evaluate.py", "worked"),
    ("export/chat.py", "asked"),  # a variable of a Go template
    ("results/rows.py", "refused"),
    ("results/student_json.py", "refused"),
    ("runtimes/autotune.py", "wanted"),  # sample texts for a timing
    ("tasks/folder.py", "worked"),  # a table of task.toml
    ("tasks/loaders.py", "worked"),
    ("verify/logits.py", "told"),  # a story that logits are compared on
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the string constants of a module that are no docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_messages_and_descriptions_are_plain() -> None:
    found = []
    for path in sorted((ROOT / "arte_edge").rglob("*.py")):
        name = path.relative_to(ROOT / "arte_edge").as_posix()
        for line, text in texts(path):
            found += [
                f"{name}:{line}: {match[0]}: {text[:60]}"
                for match in DIALECT.finditer(text)
                if (name, match[0].lower()) not in ALLOWED
            ]
    assert found == []


def test_the_documentation_is_plain() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [
        f"{page.name}:{number}: {line[:80]}"
        for page in pages
        for number, line in enumerate(page.read_text("utf-8").splitlines(), 1)
        if DIALECT.search(re.sub(r"`[^`]*`", "", line))
    ]
    assert found == []
