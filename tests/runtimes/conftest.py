"""A tiny server with faults in front of it, and tiny checkpoints."""

import json
import string
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import Folders, Make, Patch


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    at_s: float


Answer = Callable[[Seen], tuple[int, Any]]  # status, and a document or the bytes to send


@dataclass
class Front:
    """A server on a loopback port that passes requests to `answer`, after the faults of each row.

    `faults[i]` are those of the i-th distinct POST body, one an attempt, so that what
    happens to a row does not depend on the order in which threads arrive: "429", "500",
    "cut" and "cut-body" (the connection), "garbage", "truncated", "no-completion", "hang".
    """

    answer: Answer
    faults: Sequence[Sequence[str]] = ()
    retry_after: str = "0.05"
    hang_s: float = 2.0
    seen: list[Seen] = field(default_factory=list)
    _left: dict[str, list[str]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> "Front":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.handle_error = lambda *_: None  # clients that gave up waiting are part of the test
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def posts(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.path.endswith("/completions")]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _fault(self, body: str) -> str:
        with self._lock:
            n = len(self._left)
            left = self._left.setdefault(body, list(self.faults[n]) if n < len(self.faults) else [])
            return left.pop(0) if left else ""

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                return

            def do_GET(self) -> None:
                self._serve(b"")

            def do_POST(self) -> None:
                self._serve(self.rfile.read(int(self.headers["Content-Length"])))

            def _serve(self, raw: bytes) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                seen = Seen(self.path, json.loads(raw or b"{}"), headers, time.monotonic())
                front.seen.append(seen)
                fault = front._fault(raw.decode()) if self.path.endswith("/completions") else ""
                fixed = {"429": (429, b'{"error": {"message": "busy"}}', {"Retry-After": front.retry_after})}
                fixed |= {"500": (500, b"Internal Server Error"), "garbage": (200, b"<html>\xff no json </html>")}
                fixed |= {"no-completion": (200, b'{"object": "list", "choices": []}')}
                if fault in fixed:
                    self._send(*fixed[fault])
                elif fault in ("cut", "hang"):
                    time.sleep(front.hang_s if fault == "hang" else 0)
                    self.close_connection = True
                else:
                    status, document = front.answer(seen)
                    data = document if isinstance(document, bytes) else json.dumps(document).encode()
                    if fault == "truncated":
                        self._send(200, data[: len(data) // 2])
                    elif fault == "cut-body":
                        self._send(200, data[: len(data) // 2], {"Content-Length": str(len(data))})
                        self.close_connection = True
                    else:
                        self._send(status, data)

            def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        return Handler


@dataclass
class TinyModel:
    """Answers like an OpenAI-compatible server; `owned_by` decides which one it passes for."""

    models: tuple[str, ...] = ("tiny",)
    owned_by: str = "someone"
    continues: bool = False  # an answer that was begun for it
    routes: tuple[str, ...] = ("completions", "chat/completions")

    def __call__(self, seen: Seen) -> tuple[int, Any]:
        if seen.path == "/v1/models":
            return 200, {"data": [{"id": name, "owned_by": self.owned_by} for name in self.models]}
        if seen.path.removeprefix("/v1/") not in self.routes:
            return 404, {"error": {"message": f"no route {seen.path}"}}
        if seen.path.endswith("/chat/completions"):
            last = seen.body["messages"][-1]
            goes_on = self.continues and last["role"] == "assistant"
            text = "flies on" if goes_on else f"reply to {last['content']}"
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
            n_prompt = 3
        else:
            choice = {"text": f" after {seen.body['prompt'][-12:]}"}
            n_prompt = len(seen.body["prompt"]) // 3
        usage = {"prompt_tokens": n_prompt, "completion_tokens": 4}
        return 200, {"choices": [choice | {"finish_reason": "length"}], "usage": usage}


@pytest.fixture
def serve() -> Iterator[Make]:
    """Start a `Front`; all are closed at the end of the test."""
    started: list[Front] = []

    def start(answer: Answer | None = None, **settings: Any) -> Front:
        started.append(Front(answer or TinyModel(), **settings).start())
        return started[-1]

    yield start
    for front in started:
        front.close()


@pytest.fixture
def tiny_model() -> type[TinyModel]:
    return TinyModel


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: Patch) -> None:
    """Keep the keys of the person who runs the tests out of them."""
    monkeypatch.delenv("ARTE_EDGE_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


_CORPUS = "the cat sat on the mat. is it True or False? question answer one two three (A) (B) (C)\n"


def _tiny_checkpoint(folder: Path, family: str = "llama", adds_bos: bool = False) -> Path:
    """A two-layer model with weights large enough that its next token is no near-tie."""
    # No half characters: different tokens must be different texts.
    alphabet = sorted(set(string.ascii_letters + string.digits + string.punctuation) | {"Ġ", "Ċ"})
    specials = ["<s>", "</s>", "<|im_end|>"]
    inner = tiny.bpe([_CORPUS] * 4, specials, 160, begin="<s>" if adds_bos else "", alphabet=alphabet)
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = tiny.chat_tokenizer(inner, template, bos_token="<s>", eos_token="</s>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 256}
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos")}
    more = {"initializer_range": 0.4, "pad_token_id": None} | ({"sliding_window": 12} if family == "mistral" else {})
    return tiny.save_checkpoint(folder, tokenizer, family, dtype="float32", **sizes, **ids, **more)


@pytest.fixture
def tiny_checkpoint() -> Make:
    """Write a two-layer checkpoint into a folder: ``tiny_checkpoint(folder, "mistral", adds_bos=True)``."""
    return _tiny_checkpoint


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: Folders) -> Path:
    return _tiny_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> Iterator[Any]:
    """The transformers engine over a two-layer random Llama."""
    pytest.importorskip("torch")
    from arte_edge.runtimes.transformers.model import TransformersEngine

    engine = TransformersEngine(llama_folder, sha256="0" * 64, device="cpu")
    yield engine
    engine.close()
