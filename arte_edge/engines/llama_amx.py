"""Keep llama.cpp off Intel's AMX unit, where many builds of it crash on the first quantized product.

ggml sets the unit's tiles up through `_tile_loadconfig`, which gcc up to 13.2 compiles so that all but
eight bytes of the set-up may be optimised away; the processor then faults (seen with gcc 12 on a Sapphire
Rapids machine; ggml-org/llama.cpp issue 20824, pull request 26954). A fault cannot be caught, and which
compiler built an installed library is not known. So a library that was built for AMX gets no "extra
buffers": they are what brings weights into the unit's layout. They also bring them into the layouts of
other units, which costs speed with 4-bit files; `make setup` therefore builds without AMX.
"""

from __future__ import annotations

from typing import Any

__all__ = ["model_params"]


def model_params(lib: Any) -> Any:
    """Return llama.cpp's default parameters of a model, changed so that loading it is safe here."""
    params = lib.llama_model_default_params()
    if b"AMX_INT8 = 1" in lib.llama_print_system_info() and hasattr(params, "use_extra_bufts"):
        params.use_extra_bufts = False
    return params
