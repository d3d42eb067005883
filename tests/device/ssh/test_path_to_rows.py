"""From ``bench --device`` to the rows that come back: at most 20 files, and the ones docs/architecture.md names."""

import json
import sys
from pathlib import Path
from typing import Any

import tracing
from tiny import Capture, Patch

from arte_edge.bench import remote
from arte_edge.cli.main import main

LIMIT = 20
# What the device runs: the benchmark, and its child process, with a list of the files that ran in each.
TRACER = """
import json, os, sys
sys.path[:0] = {path!r}
import tracing
from arte_edge.bench import runner, worker
found, leave = set(), os._exit
def write(code):
    with open({out!r}, "a") as file:
        file.write(json.dumps(sorted(found - tracing.GROUND_FLOOR)) + chr(10))
    leave(code)
os._exit = write
worker.run_child.__kwdefaults__["command"] = [sys.executable, __file__, "child"]
with tracing.files_run(found):
    code = worker.main() if sys.argv[1] == "child" else runner.main(sys.argv[1])
os._exit(code)
"""


def test_the_null_model_on_a_device(device: Any, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    root, out, tracer = Path(tracing.__file__).parent, tmp_path / "found.jsonl", tmp_path / "tracer.py"
    tracer.write_text(TRACER.format(path=[str(root), str(root.parent)], out=str(out)))
    monkeypatch.setattr(remote, "install", lambda *_: sys.executable)  # its module runs anyhow: it makes a plan
    monkeypatch.setattr(remote, "BENCH", (str(tracer),))
    profile = tmp_path / "kitchen.toml"
    profile.write_text(
        f'title = "kitchen"\nbase = "raspberry-pi-5"\n[remote]\nhost = "kitchen"\n'
        f'ssh_config = "{device.config}"\npython = "{sys.executable}"\n'
    )
    found = {"device/ssh/agent"}  # not traced: it runs from the uploaded wheel
    with tracing.files_run(found):
        code = main(["bench", "null", "--device", str(profile), "-p", "4", "-n", "4", "-r", "1", "-o", "jsonl"])
    assert code == 0
    assert [json.loads(line)["test"] for line in capsys.readouterr().out.splitlines()] == ["pp4", "tg4"]
    for line in out.read_text().splitlines():
        found |= set(json.loads(line))
    assert len(found) <= LIMIT, "\n".join(sorted(found))
    assert found == tracing.documented("`bench --device`")
