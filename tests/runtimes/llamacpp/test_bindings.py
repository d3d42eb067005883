"""A library that was built for AMX must never get weights into that unit's layout."""

from types import SimpleNamespace

import pytest

from arte_edge.runtimes.llamacpp.bindings import model_params


def library(info: bytes, **fields: bool) -> SimpleNamespace:
    return SimpleNamespace(
        llama_model_default_params=lambda: SimpleNamespace(**fields), llama_print_system_info=lambda: info
    )


def test_a_library_built_for_amx_gets_no_extra_buffers() -> None:
    lib = library(b"CPU : AVX512 = 1 | AMX_INT8 = 1 | REPACK = 1 | ", use_extra_bufts=True)
    assert model_params(lib).use_extra_bufts is False


@pytest.mark.parametrize("info", [b"CPU : AVX2 = 1 | REPACK = 1 | ", b"CPU : NEON = 1 | ", b""])
def test_any_other_library_keeps_its_defaults(info: bytes) -> None:
    assert model_params(library(info, use_extra_bufts=True)).use_extra_bufts is True


def test_a_library_whose_fields_are_unknown_is_left_alone() -> None:
    assert vars(model_params(library(b"AMX_INT8 = 1"))) == {}
