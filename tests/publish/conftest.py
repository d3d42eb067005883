"""A Hub of our own, to which nothing leaves this machine: it speaks the part of the HTTP API that a push uses.

What huggingface_hub sends is sent over HTTP and checked as the Hub would: the token, the sums of
large files, the order of a commit's lines. Large files take git-lfs' basic transfer.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny import Make, Patch

TOKEN = "hf_" + "x" * 34
_LARGE_BYTES = 200
_OID = "0" * 40


class FakeHub(ThreadingHTTPServer):
    """The server, and what it was given. Set `refuse` (status) or `fail_uploads` to make it fail."""

    daemon_threads = True

    def __init__(self, benchmarks: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.benchmarks = benchmarks
        self.repos: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.refuse = 0
        self.fail_uploads = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, document: Any, status: int = 200) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _begin(self) -> bool:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.refuse and self.path.startswith("/api/repos"):
            self._body()
            self._answer({"error": "no"}, self.server.refuse)
            return False
        return True

    def do_HEAD(self) -> None:
        self._answer({})

    def do_GET(self) -> None:
        if not self._begin():
            return
        if self.path.startswith("/api/datasets"):
            self._answer([{"id": name, "tags": []} for name in self.server.benchmarks])
        elif any(self.path.startswith(f"/api/models/{name}") for name in self.server.repos):
            self._answer({"id": "x/y", "sha": _OID, "siblings": [], "tags": []})
        else:
            self._answer({"error": "Repository not found"}, 404)

    def do_PUT(self) -> None:
        body = self._body()
        self.server.requests.append(f"PUT {self.path}")
        if self.server.fail_uploads:
            self.server.fail_uploads -= 1
            self._answer({"error": "broken"}, 400)
            return
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self._answer({})

    def do_POST(self) -> None:
        if not self._begin():
            return
        body = self._body()
        if self.path != "/api/validate-yaml" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "who are you"}, 401)
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            known = name in self.server.repos
            self.server.repos.setdefault(name, wanted)
            self._answer({"url": f"https://huggingface.co/{name}"}, 409 if known else 200)
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            self._answer({"files": [self._mode(file) for file in json.loads(body)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer({"objects": [self._place(one) for one in json.loads(body)["objects"]]})
        else:
            self._commit(body)

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        there = self.server.files.get(file["path"])
        oid = None if there is None else hashlib.sha1(b"blob %d\0" % len(there) + there).hexdigest()
        mode = "lfs" if file["size"] > _LARGE_BYTES and file["path"].endswith(".gguf") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.large:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}}

    def _commit(self, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        assert lines[0]["key"] == "header"
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            else:
                self.server.files[value["path"]] = self.server.large[value["oid"]]
        self.server.commits.append(lines[0]["value"]["summary"])
        repo = "/".join(self.path.split("/")[3:5])
        self._answer({"commitUrl": f"https://huggingface.co/{repo}/commit/{_OID}", "commitOid": _OID})


@pytest.fixture
def hub(monkeypatch: Patch, tmp_path: Path) -> Iterator[Make]:
    """Start a Hub of our own and log in to it: ``hub(benchmarks=[...])`` returns the server."""
    servers: list[FakeHub] = []

    def start(benchmarks: Sequence[str] = ()) -> FakeHub:
        server = FakeHub(list(benchmarks))
        servers.append(server)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        names = ["ARTE_EDGE_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"]
        for name in names:
            monkeypatch.delenv(name, raising=False)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
