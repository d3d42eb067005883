"""llama.cpp inside the prebuilt `xllamacpp`, called as `llama_runtime` calls llama-cpp-python.

llama-cpp-python has no ARM wheel, and compiling it takes a Raspberry Pi most of an hour. The
extension module of xllamacpp (MIT licence) holds the whole of llama.cpp and exports its C
functions; its Python classes offer a server, which knows neither logits nor single steps. This is
the ctypes border to those functions, under the names that llama-cpp-python gives them, so that
everything above it works with either.

Where struct fields stand is read off the library (`xllama_params`) and proved after each use: a
context that did not get what was asked for is refused. Windows builds export nothing.
Do not load both packages in one process: each has a llama.cpp of its own.
"""

from __future__ import annotations

import ctypes
import re
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from arte_edge.errors import EngineError
from arte_edge.runtimes.llamacpp.xllama_abi import (
    FUNCTIONS,
    Batch,
    LogCallback,
    ModelParams,
    TokenData,
    TokenDataArray,
)
from arte_edge.runtimes.llamacpp.xllama_params import context_params_type, find_fields

__all__ = ["XllamaLibrary", "load_xllamacpp"]

_GOOD = "2026.10.11549"  # the version that this file was tested with
_REFUSED = f"pip install 'xllamacpp=={_GOOD}' is known to fit; please report the version that does not."
_WINDOWS = "Its Windows builds do not: pip install 'arte-edge[gguf]', which compiles llama-cpp-python."

_BUFFER = re.compile(rb"(\S+) model buffer size\s*=\s*([\d.]+) MiB")
_FLASH = re.compile(rb"flash_attn\s*=\s*(\w+)")


class XllamaLibrary:
    """The functions of llama.cpp that `llama_runtime` calls, and what the library says of itself.

    Attributes:
        buffers_mib: where the weights of the model loaded last went, as the library logs it:
            ``CPU_Mapped`` is the file itself, ``CPU_REPACK`` a copy in the CPU's own order.
        flash_attn: of the context made last; None if the library does not say.
    """

    if TYPE_CHECKING:  # the functions of FUNCTIONS

        def __getattr__(self, name: str) -> Any: ...

    __name__ = "xllamacpp"
    llama_adapter_lora_p_ctypes = ctypes.c_void_p
    llama_log_callback = LogCallback
    llama_token_data = TokenData
    llama_token_data_array = TokenDataArray

    def __init__(self, library: Any, version: str, build_info: dict[str, Any]) -> None:
        """Bind the functions of `library`, a `ctypes.CDLL`.

        Raises:
            EngineError: a function is not there, or the parameters cannot be found.
        """
        self.__version__ = version
        self.build_info = build_info
        self.buffers_mib: dict[str, float] = {}
        self.flash_attn: bool | None = None
        self.log = LogCallback(self.listen)  # llama.cpp keeps a pointer to it, so it must outlive every model
        try:
            for name, (returns, takes) in FUNCTIONS.items():
                function = getattr(library, name)
                function.restype, function.argtypes = returns, takes
                setattr(self, name, function)
            self._load, self._init = library.llama_model_load_from_file, library.llama_init_from_model
            self._batch_init, defaults = library.llama_batch_init, library.llama_context_default_params
        except AttributeError as error:
            hint = _WINDOWS if sys.platform == "win32" else _REFUSED
            raise EngineError(f"xllamacpp {version} exports no llama.cpp: {error}", hint) from error
        defaults.restype, defaults.argtypes = ModelParams, []
        if (fields := find_fields(bytes(defaults()))) is None:
            raise EngineError(f"xllamacpp {version}: llama.cpp's context parameters are new", _REFUSED)
        params = context_params_type(fields)
        defaults.restype = params
        self.llama_context_default_params = defaults
        self._load.restype, self._load.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ModelParams]
        self._init.restype, self._init.argtypes = ctypes.c_void_p, [ctypes.c_void_p, params]
        self._batch_init.restype, self._batch_init.argtypes = Batch, [ctypes.c_int32] * 3

    def listen(self, level: int, text: bytes, user_data: int) -> None:
        """Read the facts we want from one line of llama.cpp's log and drop the rest of it."""
        if found := _BUFFER.search(text):
            self.buffers_mib[found[1].decode(errors="replace")] = float(found[2])
        elif found := _FLASH.search(text):
            self.flash_attn = found[1] == b"enabled"

    def llama_model_load_from_file(self, path: bytes, params: Any) -> int | None:
        self.buffers_mib = {}
        handle: int | None = self._load(path, params)
        return handle

    def llama_init_from_model(self, model: int, params: Any) -> int | None:
        """Make a context, None without memory for it.

        Raises:
            EngineError: the context is not the one that `params` ask for.
        """
        self.flash_attn = None
        handle: int | None = self._init(model, params)
        if handle and (wrong := self._differences(handle, params)):
            self.llama_free(handle)
            raise EngineError(
                f"xllamacpp {self.__version__} did not take {', '.join(wrong)} as given", _REFUSED
            )
        return handle

    def _differences(self, handle: int, params: Any) -> list[str]:
        """Return the names of what the context has otherwise; llama.cpp may round n_ctx up and batches down."""
        unified = getattr(params, "kv_unified", False)  # one cache for all; else each has its part
        each = params.n_ctx if unified else params.n_ctx // params.n_seq_max
        right = {
            "n_ctx": self.llama_n_ctx(handle) >= params.n_ctx,
            "kv_unified": each <= self.llama_n_ctx_seq(handle) < each + 256,
            "n_batch": min(params.n_batch, params.n_ctx) <= self.llama_n_batch(handle) <= params.n_batch,
            "n_ubatch": self.llama_n_ubatch(handle) == min(params.n_ubatch, self.llama_n_batch(handle)),
            "n_seq_max": self.llama_n_seq_max(handle) == params.n_seq_max,
            "n_threads": self.llama_n_threads(handle) == params.n_threads,
            "n_threads_batch": self.llama_n_threads_batch(handle) == params.n_threads_batch,
        }
        return [name for name, same in right.items() if not same]

    def llama_batch_init(self, n_tokens: int, embd: int, n_seq_max: int) -> Any:
        """Return a batch with room for `n_tokens` tokens.

        Raises:
            EngineError: its arrays are not where llama.h of the tested version has them.
        """
        batch = self._batch_init(n_tokens, embd, n_seq_max)
        arrays = (batch.token, batch.pos, batch.n_seq_id, batch.seq_id, batch.logits)
        # llama.cpp ends the list of sequence lists with a null pointer, so that it can free them
        if batch.n_tokens or batch.embd or not all(arrays) or batch.seq_id[n_tokens]:
            raise EngineError(f"xllamacpp {self.__version__}: llama.cpp's batches are new", _REFUSED)
        return batch


@cache
def load_xllamacpp() -> XllamaLibrary:
    """Import xllamacpp and return its llama.cpp, its log read and not printed.

    Raises:
        ImportError: it is not installed.
        EngineError: it is, and cannot be loaded or used.
    """
    try:
        import xllamacpp
    except ModuleNotFoundError:
        raise
    except ImportError as error:  # a shared library that it needs is missing
        raise EngineError(f"xllamacpp does not load: {error}", _missing(str(error))) from error
    native = xllamacpp.xllamacpp.__file__
    library = XllamaLibrary(ctypes.CDLL(native), xllamacpp.__version__, dict(xllamacpp.BUILD_INFO))
    library.llama_log_set(library.log, None)
    library.llama_backend_init()
    return library


def _missing(error: str) -> str:
    return "sudo apt install libgomp1" if "libgomp" in error else "Install xllamacpp again, for this Python."
