"""GGUF files through the prebuilt xllamacpp, where llama-cpp-python has no wheel (ARM).

xllamacpp (MIT licence) wraps llama.cpp's own server: `CommonParams`, `Server` and the server's HTTP
endpoints, which is all that is used here. It gives text, tokens and the server's timings, not the logits of a
prompt: comparing logits and scoring choices need llama-cpp-python.

Each prefill and each decode step is one request of its own. Its time includes the server's handling of it,
which `XllamaRuntime.facts` states. The prebuilt Linux wheels are made for any CPU of their
kind (AVX2 at most on x86-64, plain armv8-a on ARM), so a llama.cpp compiled on the device may be faster: the
row's `build` says which features are in use.
"""

from __future__ import annotations

import json
import re
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from arte_edge.errors import EngineError, InputError, first_line
from arte_edge.gguf.reader import read_model_header
from arte_edge.machine import thread_count
from arte_edge.runtimes.prompt_render import Conversation, Message, render
from arte_edge.runtimes.protocol import BaseRuntime, Rendered, RuntimeFacts, until_stop

_N_BATCH, _N_UBATCH = 2048, 512  # llama.cpp's defaults
_TEXT_TOKENS = 2048  # of context for a prompt and its answer; the file is opened again for longer ones
_RENDER_TOKENS, _RENDER_S = 64, 600  # of context for rendering templates, and how long it may take
_ERRORS = 1  # verbosity of llama.cpp's log
_SPARE_TOKENS = 1  # the server wants room for the token that it writes


class XllamaServer:
    """llama.cpp's server in this process, one sequence, with a key that only this process knows."""

    def __init__(
        self, path: Path, threads: int, context_tokens: int, *, for_texts: bool = False, template: str = ""
    ) -> None:
        """Load the file; `for_texts` only to render chat templates, with a `template` in place of the file's own.

        Raises InputError: not a GGUF, cut short, or one that llama.cpp does not load;
        EngineError: xllamacpp is not installed, or does not load.
        """
        self.header = read_model_header(path)  # a file cut short would end in a crash inside the runtime
        library = _import()
        key = secrets.token_hex()
        params = library.CommonParams()
        params.model.path = str(path)
        params.api_keys = [key]
        params.port = 0  # any free one, of the loopback interface
        params.ui = params.warmup = params.fit_params = False
        params.verbosity = _ERRORS if for_texts else -1  # llama.cpp's log would bury the progress lines
        params.no_extra_bufts = for_texts
        params.chat_template = template
        params.n_parallel = 1
        params.n_ctx = context_tokens + _SPARE_TOKENS
        params.n_batch, params.n_ubatch = _N_BATCH, _N_UBATCH
        params.cache_ram_mib = 0  # prompts of before stay nowhere but in the sequence's own cache
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        try:
            self._server = library.Server(params)
        except RuntimeError as error:
            raise InputError(
                f"{path}: llama.cpp in xllamacpp {library.__version__} cannot load this file ({error})",
                "It may be damaged, of a newer model family, or too large for the memory.",
            ) from error
        self.path = path
        self.runtime = f"xllamacpp {library.__version__}"
        info = library.BUILD_INFO
        self.build_commit = _commit(str(info.get("commit", "")), library.__version__)
        system = str(library.get_system_info()).strip(" |\n")
        self.build = f"{system}; {info.get('compiler', '')} {info.get('build_target', '')}".strip("; ")
        self._http = httpx.Client(
            base_url=self._server.listening_address,
            headers={"Authorization": f"Bearer {key}"},
            timeout=None,
            trust_env=False,
        )

    def complete(self, prompt: Sequence[int], max_tokens: int, **settings: Any) -> dict[str, Any]:
        """Return the answer to one greedy completion, the ids and the words that ended it included.

        Raises EngineError: the server reports an error.
        """
        return self._checked(self.post("/completion", _greedy(prompt, max_tokens, settings) | {"return_tokens": True}))

    def advance(self, prompt: Sequence[int]) -> dict[str, float]:
        """Compute the logits after `prompt`, reusing what is cached of it; return the server's timings, in ms.

        This is a call inside the process and quicker than `complete`, but it does not tell the next token's id.
        """
        answer = self._checked(self._server.handle_completions(_greedy(prompt, 1, {"cache_prompt": True})))
        timings: dict[str, float] = answer["timings"]
        return timings

    def _checked(self, answer: Any) -> dict[str, Any]:
        if error := answer.get("error"):
            raise EngineError(f"{self.path.name}: {self.runtime} reports: {error.get('message', error)}")
        return dict(answer)

    def post(self, route: str, document: dict[str, Any] | None = None) -> Any:
        """Return what one of the server's endpoints answers."""
        if document is None:
            return self._http.get(route).json()
        return self._http.post(route, json=document).json()

    def streamed(self, document: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the parts of an answer of the chat endpoint. Raises EngineError: the server reports an error."""
        with self._http.stream("POST", "/v1/chat/completions", json=document | {"stream": True}) as answer:
            if answer.status_code != httpx.codes.OK:
                self._checked(json.loads(answer.read()))
            for line in answer.iter_lines():
                if (data := line.removeprefix("data: ")) != line and data != "[DONE]":
                    yield self._checked(json.loads(data))

    @cached_property
    def n_vocab(self) -> int:
        return int(self.post("/v1/models")["data"][0]["meta"]["n_vocab"])

    @cached_property
    def n_ctx(self) -> int:
        """Return the tokens that a prompt and its continuation may have; the server allows none beyond training."""
        return int(self.post("/props")["default_generation_settings"]["n_ctx"])

    def close(self) -> None:
        if self._server is not None:
            self._http.close()
            self._server = None


class XllamaRuntime(BaseRuntime):
    """`Runtime` of one GGUF file, without what the server does not give: logits, and the list of the tokens."""

    def __init__(self, path: Path, threads: int | None = None, context_tokens: int = 0) -> None:
        """Load the file; raises what `XllamaServer` does.

        Args:
            context_tokens: room in the cache; 0: for a prompt and its answer, and more when it is needed.

        Raises InputError: a longer context than the model was trained for.
        """
        self._path, self._threads = path, thread_count(threads)
        self._server = XllamaServer(path, self._threads, context_tokens or _TEXT_TOKENS)
        self.name, self.quantization = path.name, self._server.header.quantization
        self.n_vocab = self._server.n_vocab
        self.context_tokens: int = context_tokens or self._server.n_ctx
        if self._server.n_ctx < context_tokens:
            self._server.close()
            raise InputError(
                f"{path.name}: {context_tokens} tokens of context, and the model was made for {self._server.n_ctx}",
                "xllamacpp runs no model beyond that: shorten the prompt or the depth.",
            )
        self.chat_template = self._server.header.chat_template
        known = self._server.post("/props")
        self.special_tokens = {name: str(known[name]) for name in ("bos_token", "eos_token")}
        self._tokens: list[int] = []
        self._overhead_ms: list[float] = []

    @property
    def facts(self) -> RuntimeFacts:
        notes: tuple[str, ...] = ()
        if self._overhead_ms:
            extra = statistics.median(self._overhead_ms)
            notes = (f"each decode step is a request: {extra:.2f} ms of handling a token included",)
        return RuntimeFacts(
            runtime=self._server.runtime,
            build_commit=self._server.build_commit,
            build=self._server.build,
            n_batch=_N_BATCH,
            n_ubatch=_N_UBATCH,
            type_k="f16",
            type_v="f16",
            notes=notes,
        )

    def clear(self) -> None:
        self._tokens = []

    def prefill(self, tokens: Sequence[int]) -> int:
        """See `Decoder.prefill`. (InputError: nothing to read, or more than the cache has room for.)"""
        room = self.context_tokens - len(self._tokens)
        if not 0 < len(tokens) <= room:
            raise InputError(f"{len(tokens)} tokens to read, and the context has room for {room}")
        cached = bool(self._tokens)  # after `clear`, nothing that the sequence holds may be used again
        self._tokens += tokens
        return int(self._server.complete(self._tokens, 1, cache_prompt=cached)["tokens"][0])

    def step(self, token: int) -> None:
        begin = time.perf_counter()
        self._tokens.append(token)
        timings = self._server.advance(self._tokens)
        inside_ms = timings["prompt_ms"] + timings["predicted_ms"]
        self._overhead_ms.append((time.perf_counter() - begin) * 1e3 - inside_ms)

    @property
    def added_tokens(self) -> tuple[str, ...]:
        raise self._missing("added tokens")

    @property
    def eos_tokens(self) -> frozenset[int]:
        raise self._missing("end tokens")

    @property
    def stop_tokens(self) -> frozenset[int]:
        raise self._missing("stop tokens")

    def token_text(self, token: int) -> str:
        raise self._missing("texts of tokens")

    def vocabulary(self) -> list[str]:
        raise self._missing("vocabulary")

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        raise self._missing("logits")

    def _missing(self, what: str) -> EngineError:
        return EngineError(
            f"xllamacpp does not give the {what} of {self.name}, which verifying compares",
            "Verify where llama-cpp-python is installed: pip install 'arte-edge[gguf]'.",
        )

    def tokenize(self, text: str) -> list[int]:
        ids = self._ids(text)
        # A chat template that writes BOS itself would otherwise give two.
        return ids[1:] if len(ids) > 1 and ids[:1] == self._begin and ids[1:2] == self._begin else ids

    def _ids(self, text: str) -> list[int]:
        document = {"content": text, "add_special": True, "parse_special": True}
        return [int(token) for token in self._server.post("/tokenize", document)["tokens"]]

    @cached_property
    def _begin(self) -> list[int]:
        return self._ids("")[:1]

    def _generate(self, prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        return [self._text(prompt, max_tokens, stop) for prompt in prompts]

    def constrained(self, messages: Sequence[Message], grammar: str, max_tokens: int, stop: Sequence[str] = ()) -> str:
        if self.chat_template is None:
            return self._text(render(self, messages), max_tokens, stop, grammar=grammar)
        return self._answer([dict(message) for message in messages], max_tokens, tuple(stop), grammar=grammar)

    def _text(self, prompt: str, max_tokens: int, stop: Sequence[str], **settings: Any) -> str:
        ids = self.tokenize(prompt)
        self._make_room(len(ids) + max_tokens)
        answer = self._server.complete(ids, max_tokens, stop=list(stop), **settings)
        return str(answer["content"] + answer["stopping_word"])

    def _make_room(self, needed: int) -> None:
        if needed > self._server.n_ctx:
            self._server.close()
            self._server = XllamaServer(self._path, self._threads, 2 * needed)

    def _chat(self, conversations: list[list[dict[str, str]]], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        return [self._answer(messages, max_tokens, stop) for messages in conversations]

    def _answer(self, messages: list[dict[str, str]], max_tokens: int, stop: tuple[str, ...], **settings: Any) -> str:
        """Return what the server's chat endpoint writes, ended at a stop string, which that itself would leave out."""
        self._make_room(len(self.tokenize(self.render(messages) or "")) + max_tokens)
        text = ""
        for part in self._server.streamed(
            {"messages": messages, "max_tokens": max_tokens, "temperature": 0.0, **settings}
        ):
            text += part["choices"][0]["delta"].get("content") or "" if part["choices"] else ""
            if (whole := until_stop(text, stop)) is not None:
                return whole
        return text

    def close(self) -> None:
        self._server.close()


def server_rendering(path: Path, conversations: Sequence[Conversation]) -> list[Rendered]:
    """Return what llama.cpp's server makes of conversations, in a child process; nothing without xllamacpp.

    llama.cpp has an engine of its own for templates. A failed assertion in it would end this process.
    """
    if find_spec("xllamacpp") is None:
        return []
    try:
        done = _ask_child(path, conversations)
        if done.returncode < 0 and (other := _ask_child(path, conversations, "chatml")).returncode == 0:
            refusal = f"it is ended by signal {-done.returncode}, and not with another template"
            return [Rendered(json.loads(other.stdout)["program"], refusal=refusal)]
        answer = json.loads(done.stdout)
    except (ValueError, subprocess.TimeoutExpired) as error:
        return [Rendered("xllamacpp", unable=f"it ends without an answer ({first_line(error)})")]
    if answer.pop("starts_without", False):
        lines = [line for line in done.stderr.splitlines() if "rror:" in line]
        answer["refusal"] = lines[-1].rpartition("rror:")[2].strip() if lines else "no reason given"
    return [Rendered(**answer | {"texts": tuple(answer.get("texts", ()))})]


def _ask_child(
    path: Path, conversations: Sequence[Conversation], template: str = ""
) -> subprocess.CompletedProcess[str]:
    document = json.dumps([conversation._asdict() for conversation in conversations])
    command = [sys.executable, "-P", "-m", __name__, str(path), template]
    return subprocess.run(
        command, input=document, capture_output=True, encoding="utf-8", errors="replace", timeout=_RENDER_S
    )


def _render_all(path: Path, template: str, conversations: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of a `Rendered`, or that the server starts without the file's own template only."""
    try:
        server = XllamaServer(path, 1, _RENDER_TOKENS, for_texts=True, template=template)
    except InputError as error:
        program = f"xllamacpp {_import().__version__}"
        try:
            XllamaServer(path, 1, _RENDER_TOKENS, for_texts=True, template="chatml").close()
        except InputError:
            return {"program": program, "unable": error.message}
        return {"program": program, "starts_without": True}
    answers = [server.post("/apply-template", conversation) for conversation in conversations]
    refusals = [answer["error"]["message"] for answer in answers if "error" in answer]
    adds = server.post("/tokenize", {"content": "", "add_special": True})["tokens"]
    return {
        "program": server.runtime,
        "texts": [answer.get("prompt") for answer in answers],
        "refusal": first_line(refusals[0]) if refusals else "",
        "begin": server.post("/props")["bos_token"] if adds else "",
    }


def _greedy(prompt: Sequence[int], max_tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": list(prompt), "max_tokens": max_tokens, "n_predict": max_tokens, "temperature": 0.0, **settings}


def _import() -> Any:
    try:
        import xllamacpp
    except ModuleNotFoundError as error:
        raise EngineError("xllamacpp is not installed", "pip install 'arte-edge[xllamacpp]'") from error
    except ImportError as error:  # a shared library that it needs is missing
        hint = "sudo apt install libgomp1" if "libgomp" in str(error) else "Install xllamacpp again, for this Python."
        raise EngineError(f"xllamacpp does not load: {error}", hint) from error
    return xllamacpp


def _commit(commit: str, version: str) -> str:
    """Return what the build says or, as its wheels say nothing, llama.cpp's build number.

    xllamacpp's versions are year.month.build: 2026.10.11549 holds llama.cpp b11549.
    """
    if commit not in ("", "unknown"):
        return commit
    found = re.match(r"20\d\d\.\d+\.(\d+)", version)
    return f"b{found[1]}" if found else ""


if __name__ == "__main__":
    print(json.dumps(_render_all(Path(sys.argv[1]), sys.argv[2], json.load(sys.stdin))))
