"""A command in the place of ``vllm``, over real tiny weights; the tests of a server that a run starts make it.

It takes vLLM's arguments and key, has a child as vLLM has, and writes what it was given to ``ARTE_TEST_VLLM``.
``ARTE_TEST_VLLM_DOES``: ``fail`` ends at once, ``wait`` answers nothing.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

HERE = Path(__file__).resolve().parent
SLEEP = "import time; time.sleep(600)"


class OnSocket(ThreadingMixIn, UnixStreamServer):
    """An HTTP server on a Unix socket."""

    daemon_threads = True
    request_queue_size = 64


def write_command(folder: Path) -> Path:
    """Write the executable ``vllm`` into a folder."""
    path = folder / "vllm"
    rooms = [str(room) for room in (HERE / "runtimes", HERE / "runtimes" / "openai", HERE, HERE.parent)]
    path.write_text(f"#!{sys.executable}\nimport sys\nsys.path[:0] = {rooms}\nfrom vllm_stand_in import main\nmain()\n")
    path.chmod(0o755)
    return path


def started(folder: Path) -> list[dict[str, Any]]:
    """Return what each server that was started wrote, in order."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def main() -> None:
    does = os.environ.get("ARTE_TEST_VLLM_DOES", "")
    child = subprocess.Popen([sys.executable, "-c", SLEEP])
    record = {"argv": sys.argv[1:], "env": dict(os.environ), "pids": [os.getpid(), child.pid]}
    path = Path(os.environ["ARTE_TEST_VLLM"]) / f"{time.time_ns()}.json"
    path.with_suffix(".new").write_text(json.dumps(record))
    path.with_suffix(".new").rename(path)
    if does == "fail":
        print("RuntimeError: no room for 1 GPU block\nlast line", flush=True)
        sys.exit(3)
    if does == "wait":
        time.sleep(600)
    from conftest import Front
    from test_served import Vllm

    front, model = Front(lambda _: (404, {})), Vllm(Path(sys.argv[2]))

    def answer(seen: Any) -> tuple[int, Any]:
        if seen.path == "/health":
            return 200, b""
        if seen.headers.get("authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
            return 401, {"error": "Unauthorized"}
        return model(seen)

    front.answer = answer
    OnSocket(sys.argv[sys.argv.index("--uds") + 1], front._handler()).serve_forever()
