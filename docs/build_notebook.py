"""Write docs/from-python.ipynb: the Python API on the quick start's run, executed, with its outputs.

    make quickstart                                   # or any finished run
    .venv/bin/python docs/build_notebook.py [RUN]     # RUN: default runs/quickstart

The run is not repeated: `ae.distill` finds its stages finished. `--check` says whether the cells in the file
are those below; the tests execute them on a small run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("from-python.ipynb")
RUN = "quickstart"
CELLS = (
    (
        "markdown",
        """# From a task to a file on a device, in Python

The functions have the names and parameters of the command line's verbs. They return typed objects, print
nothing, and raise `ArteError`.""",
    ),
    ("code", "import arte_edge as ae"),
    (
        "markdown",
        """## Distil

`quickstart` is a shipped preset; `ae.distill(task="./mytask", teacher=..., student=...)` takes your own task.
Interrupted at any moment, the same call resumes. Here the run is finished, so it returns at once.""",
    ),
    ("code", f'run = ae.distill("{RUN}")\nrun'),
    ("code", "run.table"),
    ("code", 'run.ask("please dim the lights in the hall a little")'),
    (
        "markdown",
        """## Export

Every file is opened in its own runtime and compared with the 16-bit student. One that is not the student any
more is named `*.rejected`.""",
    ),
    ("code", 'exported = run.export(gguf="Q4_K_M")\nexported'),
    (
        "markdown",
        """## Verify

The comparison by itself, for any two models.""",
    ),
    (
        "code",
        "file = exported.folder / exported.artifacts[0].file\n"
        'ae.verify(run.student, file, task="home_intents", limit=20)',
    ),
    (
        "markdown",
        """## Measure and choose

Settings are llama-bench's. `device="pi@kitchen"` measures on another machine over ssh.""",
    ),
    ("code", "ae.bench(file, n_prompt=64, n_gen=16, repetitions=3, warmup_s=2)"),
    ("code", 'ae.recommend(run.folder, max_ram="1GB")'),
    ("code", "page = run.report()\npage.path.name, page.missing"),
)


def notebook() -> Any:
    """Return the notebook without outputs."""
    import nbformat

    new = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = []
    for number, (kind, text) in enumerate(CELLS):
        cell = new[kind](text)
        cell["id"] = f"cell-{number}"  # random ids would change the file on every build
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def execute(folder: Path, run: str = RUN) -> Any:
    """Return the notebook executed in `folder` on `run`, the name of a preset or the path of a run.toml.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    from nbclient import NotebookClient

    page = notebook()
    for cell in page.cells if run != RUN else []:  # `force`: a small run's teacher may not be better
        cell["source"] = cell["source"].replace(f'ae.distill("{RUN}")', f"ae.distill({run!r}, force=True)")
    NotebookClient(page, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    for cell, (kind, text) in zip(page.cells, CELLS, strict=True):
        cell["source"] = text
        if kind == "markdown":
            continue
        cell["metadata"].pop("execution", None)  # times of day
        # Libraries' warnings on stderr name paths of this machine.
        cell["outputs"] = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
    return page


def main(argv: list[str]) -> int:
    import nbformat

    if argv == ["--check"]:
        stored = nbformat.read(PAGE, as_version=4)
        same = [cell["source"] for cell in stored.cells] == [text for _, text in CELLS]
        print(f"{PAGE.name} {'is up to date' if same else 'is outdated: run docs/build_notebook.py'}")
        return 0 if same else 1
    nbformat.write(execute(Path.cwd(), *(argv or [RUN])), PAGE)
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
