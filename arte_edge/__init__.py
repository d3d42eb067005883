"""Make a small language model good at your task, and prove it on your device.

    import arte_edge as ae

    run = ae.distill(task="./mytask", teacher="qwen2.5-coder-1.5b-instruct", student="smollm2-135m-instruct")
    run.table                          # accuracy before and after, with 95 % intervals
    run.ask("dim the lights in the hall")
    run.export(gguf="Q4_K_M", onnx="int4")
    ae.bench("runs/mytask", suite="quick")
    ae.recommend("runs/mytask", device="raspberry-pi-5", max_ram="1GB")

The functions have the names and parameters of the command line's verbs and return typed objects. They
print nothing and raise `ArteError`. Importing the package loads none of them, nor any runtime.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inspect import Signature

    from arte_edge.api import (
        AnsweredTable,
        Reply,
        Run,
        Server,
        Student,
        ask,
        ask_file,
        bench,
        distill,
        export,
        load_run,
        open_student,
        recommend,
        report,
        serve,
        study,
        verify,
    )
    from arte_edge.errors import ArteError

__all__ = ["AnsweredTable", "ArteError", "Reply", "Run", "Server", "Student", "ask", "ask_file", "bench"]
__all__ += ["distill", "export", "load_run", "open_student", "recommend", "report", "serve", "study", "verify"]

__version__ = "0.1.0"

# These libraries report home unless told not to before they are imported, here and in child processes
# (docs/privacy.md). A value that the user has set is kept; an empty one is none: onnxruntime takes it for consent.
for _name, _value in (
    ("ORT_DISABLE_TELEMETRY", "1"),
    ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ("HF_UPDATE_DOWNLOAD_COUNTS", "0"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
    ("DO_NOT_TRACK", "1"),
):
    if not os.environ.get(_name, "").strip():
        os.environ[_name] = _value

# These verbs are the names of packages too, and importing a package binds its name here.
_PACKAGES = ("bench", "distill", "export", "verify")


class _Verb(ModuleType):
    """A package that can be called as the verb it is named after; it stays importable as a package."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def _function(self) -> Any:
        from arte_edge import api

        return getattr(api, self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> Signature:
        from inspect import signature

        return signature(self._function)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PACKAGES and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Return a public name, importing what it needs when it is first used."""
    from importlib import import_module

    if name in _PACKAGES:
        return import_module(f"arte_edge.{name}")
    if name == "ArteError":
        return import_module("arte_edge.errors").ArteError
    if name in __all__:
        return getattr(import_module("arte_edge.api"), name)
    raise AttributeError(f"module 'arte_edge' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
