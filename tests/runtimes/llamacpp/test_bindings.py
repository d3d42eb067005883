"""A library that was built for AMX must never get weights into that unit's layout."""

from types import SimpleNamespace

import pytest

from arte_edge.runtimes.llamacpp.bindings import model_params


def library(info: bytes, **fields: bool) -> SimpleNamespace:
    return SimpleNamespace(
        llama_model_default_params=lambda: SimpleNamespace(**fields), llama_print_system_info=lambda: info
    )


@pytest.mark.parametrize(
    ("info", "kept"),
    [
        (b"CPU : AVX512 = 1 | AMX_INT8 = 1 | REPACK = 1 | ", False),
        *((b"CPU : AVX2 = 1 | REPACK = 1 | ", True), (b"CPU : NEON = 1 | ", True), (b"", True)),
    ],
)
def test_only_a_library_built_for_amx_gets_no_extra_buffers(info: bytes, kept: bool) -> None:
    assert model_params(library(info, use_extra_bufts=True)).use_extra_bufts is kept
    assert vars(model_params(library(info))) == {}, "fields that are not known are left alone"
