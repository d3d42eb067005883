"""The numbers and names of the GGUF format: value types, tensor types, and quantizations by name.

Kept here, and compared with GGML's own package in the tests, because that package is optional on a device
that only downloads and checks models. Names, numbers and default tensor types of quantizations are those of
llama.cpp's ``llama_ftype`` and of ``llama-quantize``. A name stands for a mix: Q4_K_M is mostly Q4_K with
some Q6_K, and a tensor whose rows a type's blocks do not divide gets another type (`quantize` reports it).
"""

from __future__ import annotations

from dataclasses import dataclass

from arte_edge.errors import InputError, nearest

__all__ = [
    "ARRAY",
    "BOOL",
    "FILE_TYPES",
    "FLOAT32",
    "FULL_WIDTH",
    "INT32",
    "NEEDS_IMATRIX",
    "QUANT_TYPES",
    "SCALARS",
    "STRING",
    "TENSOR_TYPES",
    "UINT8",
    "UINT32",
    "UINT64",
    "QuantType",
    "find_type",
    "quality_warning",
    "tensor_type",
]

# Types of metadata values
UINT8, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 5, 6, 7, 8, 9, 10
# value type -> struct code of one scalar
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

# ggml type number -> (name, values in a block, bytes of a block)
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}


@dataclass(frozen=True)
class QuantType:
    """One file type: its name, llama.cpp's number for it, and the tensor type that most tensors get."""

    name: str
    number: int
    default: str
    needs_imatrix: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.default not in FULL_WIDTH


# Types of unquantized weights: a GGUF of one of these is written directly from a checkpoint.
FULL_WIDTH = ("F32", "F16", "BF16")

# A tensor in one of these is garbage without an importance matrix, and llama.cpp refuses it.
NEEDS_IMATRIX = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})

# `needs_imatrix` where some tensor of the mix is in NEEDS_IMATRIX, and for Q2_K_S by llama.cpp's own rule.
QUANT_TYPES = {
    row.name: row
    for row in (
        QuantType("F32", 0, "F32"),
        QuantType("F16", 1, "F16"),
        QuantType("BF16", 32, "BF16"),
        QuantType("Q8_0", 7, "Q8_0"),
        QuantType("Q6_K", 18, "Q6_K"),
        QuantType("Q5_K_M", 17, "Q5_K"),
        QuantType("Q5_K_S", 16, "Q5_K"),
        QuantType("Q5_1", 9, "Q5_1"),
        QuantType("Q5_0", 8, "Q5_0"),
        QuantType("Q4_K_M", 15, "Q4_K"),
        QuantType("Q4_K_S", 14, "Q4_K"),
        QuantType("Q4_1", 3, "Q4_1"),
        QuantType("Q4_0", 2, "Q4_0"),
        QuantType("IQ4_NL", 25, "IQ4_NL"),
        QuantType("IQ4_XS", 30, "IQ4_XS"),
        QuantType("MXFP4_MOE", 38, "MXFP4"),
        QuantType("Q3_K_L", 13, "Q3_K"),
        QuantType("Q3_K_M", 12, "Q3_K"),
        QuantType("Q3_K_S", 11, "Q3_K"),
        QuantType("IQ3_M", 27, "IQ3_S"),
        QuantType("IQ3_S", 26, "IQ3_S"),
        QuantType("IQ3_XS", 22, "IQ3_S", needs_imatrix=True),
        QuantType("IQ3_XXS", 23, "IQ3_XXS", needs_imatrix=True),
        QuantType("Q2_K", 10, "Q2_K"),
        QuantType("Q2_K_S", 21, "Q2_K", needs_imatrix=True),
        QuantType("IQ2_M", 29, "IQ2_S", needs_imatrix=True),
        QuantType("IQ2_S", 28, "IQ2_XS", needs_imatrix=True),
        QuantType("IQ2_XS", 20, "IQ2_XS", needs_imatrix=True),
        QuantType("IQ2_XXS", 19, "IQ2_XXS", needs_imatrix=True),
        QuantType("Q2_0", 41, "Q2_0"),
        QuantType("TQ2_0", 37, "TQ2_0"),
        QuantType("TQ1_0", 36, "TQ1_0"),
        QuantType("IQ1_M", 31, "IQ1_M", needs_imatrix=True),
        QuantType("IQ1_S", 24, "IQ1_S", needs_imatrix=True),
        QuantType("Q1_0", 40, "Q1_0"),
    )
}
# general.file_type -> the usual name of the mix
FILE_TYPES = {row.number: row.name for row in QUANT_TYPES.values()} | {39: "NVFP4"}
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # as in llama-quantize
# Types of intermediate results or of plain numbers: no weight is stored in them.
_NOT_FOR_WEIGHTS = frozenset({"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "NVFP4"})
_SMALL_MODEL = 1_800_000_000  # parameters; "1.5B" models have up to 1.78 billion


def find_type(name: str) -> QuantType:
    """Return the quantization called `name`, in any case.

    Raises:
        InputError: llama.cpp offers none of that name; names the nearest.
    """
    upper = name.strip().upper()
    found = QUANT_TYPES.get(_ALIASES.get(upper, upper))
    if found is None:
        raise InputError(
            f"'{name}' is not a quantization of llama.cpp", nearest(upper, [*QUANT_TYPES, *_ALIASES])
        )
    return found


def tensor_type(name: str) -> tuple[str, int]:
    """Return the name and ggml's number of the tensor type `name` ("q6_k", "F16"), in any case.

    Raises:
        InputError: no tensor of weights can have that type.
    """
    upper = name.strip().upper()
    weights = {row[0]: n for n, row in TENSOR_TYPES.items() if row[0] not in _NOT_FOR_WEIGHTS}
    if upper not in weights:
        raise InputError(f"'{name}' is not a tensor type for weights", nearest(upper, weights))
    return upper, weights[upper]


def quality_warning(quant: QuantType, n_parameter: int) -> str | None:
    """Return what is known to be wrong with a type for a model of that size, or None.

    Source: perplexity of imatrix quantizations on wikitext, ThomasBaruzier's GGUF repositories of
    Qwen2.5-0.5B and 1.5B, September 2024; docs/verify.md has our own figures beside them.
    """
    if quant.name == "Q4_0" and n_parameter <= _SMALL_MODEL:
        return (
            "Q4_0 costs a model this small 7 to 13 % of perplexity (published: Qwen2.5-0.5B +12.6 %, 1.5B +6.6 %), "
            "Q4_K_M 2 to 3 %. Take Q4_0 only for its faster prefill on ARM."
        )
    return None
