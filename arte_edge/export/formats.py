"""What can be exported, how a user spells it, and what the file is called.

GGUF types have llama.cpp's names in any case (``q4_k_m``, and ``q4_k`` for the usual
mix). ONNX is ``int4``, ``int8`` or ``fp32`` for onnxruntime-genai, the same with
``optimum-`` in front for the portable layout, whose int8 may name the processor it is
made for: ``optimum-int8-arm64``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast, get_args

from arte_edge.errors import InputError, nearest
from arte_edge.gguf.types import FULL_WIDTH, find_type

__all__ = [
    "ARCHS",
    "FULL_WIDTH",
    "Arch",
    "Family",
    "Format",
    "format_of",
    "gguf_format",
    "onnx_format",
    "parse_list",
    "unique",
]

Family = Literal["gguf", "onnx-genai", "onnx-optimum"]
Arch = Literal["arm64", "avx2", "avx512"]
ARCHS: tuple[str, ...] = get_args(Arch)
_REMOVED = ("Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8")
_GENAI = ("int4", "int8", "fp32")
_OPTIMUM = ("fp32", "int8")


@dataclass(frozen=True)
class Format:
    """One kind of file. `type` is a GGUF type in capitals, or an ONNX precision in small letters."""

    family: Family
    type: str
    arch: str = ""  # of a processor; optimum's int8 only

    @property
    def label(self) -> str:
        """The name by which recipes and messages call it: ``Q4_K_M``, ``int4``, ``optimum-int8-avx2``."""
        if self.family != "onnx-optimum":
            return self.type
        return "-".join(filter(None, ("optimum", self.type, self.arch)))

    @property
    def is_folder(self) -> bool:
        """True if the artifact is a folder of files: an ONNX model with its tokenizer and settings."""
        return self.family != "gguf"

    def file_name(self, model: str) -> str:
        """Return the name of the file or folder for the model called `model`."""
        return f"{model}-onnx-{self.label}" if self.is_folder else f"{model}-{self.type}.gguf"


def gguf_format(text: str) -> Format:
    """Return the GGUF format that `text` names, in any case.

    Raises:
        InputError: llama.cpp has no such type, or has it no more.
    """
    if text.strip().upper() in _REMOVED:
        raise InputError(f"GGUF type {text}: llama.cpp removed it", "Use Q4_0: it is repacked when loaded.")
    return Format("gguf", find_type(text).name)


def onnx_format(text: str, arch: Arch = "avx2") -> Format:
    """Return the ONNX format that `text` names; `arch` is taken where an optimum int8 names no processor.

    Raises:
        InputError: no such format.
    """
    name = text.strip().lower()
    if name in _GENAI:
        return Format("onnx-genai", name)
    builder, _, rest = name.partition("-")
    precision, _, named = rest.partition("-")
    if builder == "optimum" and precision in _OPTIMUM and (not named or named in ARCHS):
        if precision == "int8":
            return Format("onnx-optimum", precision, named or arch)
        if not named:
            return Format("onnx-optimum", precision)
    known = [*_GENAI, "optimum-fp32", "optimum-int8", *(f"optimum-int8-{arch}" for arch in ARCHS)]
    raise InputError(f"ONNX format '{text}': there is none of that name", nearest(name, known))


def format_of(label: str) -> Format:
    """Return the format that a recipe calls `label`, GGUF or ONNX.

    Raises:
        InputError: no such format.
    """
    name = label.strip().lower()
    return onnx_format(name) if name in _GENAI or name.startswith("optimum") else gguf_format(label)


def parse_list(gguf: str | None, onnx: str | None, arch: str = "avx2") -> tuple[Format, ...]:
    """Return the formats of two comma lists, in their order and each once.

    Raises:
        InputError: a name is unknown, or a list is empty.
    """
    formats: list[Format] = []
    for flag, text in (("--gguf", gguf), ("--onnx", onnx)):
        if text is None:
            continue
        names = [name for name in text.split(",") if name.strip()]
        if not names:
            raise InputError(f"{flag}: names no format", f"For example {flag} {_EXAMPLE[flag]}")
        formats += [
            gguf_format(name) if flag == "--gguf" else onnx_format(name, cast(Arch, arch)) for name in names
        ]
    return unique(formats)


_EXAMPLE = {"--gguf": "Q4_K_M,Q8_0", "--onnx": "int4"}


def unique(formats: Iterable[Format]) -> tuple[Format, ...]:
    """Return `formats` without repetitions, in order."""
    return tuple(dict.fromkeys(formats))
