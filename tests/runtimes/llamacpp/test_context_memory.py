"""Memory is foretold before it is taken, and the layout that a probe chose stays chosen."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from tiny import Patch, make_gguf

from arte_edge.errors import EngineError
from arte_edge.models.resolve import LocalModel
from arte_edge.runtimes.llamacpp import autotune as llama_probe
from arte_edge.runtimes.llamacpp import bindings
from arte_edge.runtimes.llamacpp.autotune import CANDIDATES, layout_for
from arte_edge.runtimes.llamacpp.bindings import DEFAULT_LAYOUT, check_fits, context_bytes

SIZES = {"attention.head_count": 9, "attention.head_count_kv": 3, "block_count": 30}
SIZES |= {"embedding_length": 576, "feed_forward_length": 1536}


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """SmolLM2-135M's shape, without its weights; the file has other, small ones."""
    lib = SimpleNamespace(__name__="llama", __version__="1")

    def size(*keys: str) -> int:
        return next((SIZES[key] for key in keys if key in SIZES), 0)

    return SimpleNamespace(n_vocab=49_152, path=make_gguf(tmp_path / "student.gguf"), size=size, lib=lib, widened=False)


class TestMemory:
    def test_the_cache_takes_its_bytes_a_token(self, model: Any) -> None:
        # 30 layers, keys and values of 3 heads of 64 dimensions, 2 bytes each
        grown = context_bytes(model, 40, 512, 512) - context_bytes(model, 40, 256, 512)
        scores = 2 * 512 * 256 * 9 * 4  # of 512 rows at once: 9 heads, 4 bytes each, and a copy
        assert grown == 40 * 256 * 30 * 2 * 3 * 64 * 2 + scores

    def test_a_context_that_cannot_fit_is_rejected(self, model: Any, monkeypatch: Patch) -> None:
        monkeypatch.setattr(bindings, "available_bytes", lambda: 500_000_000)
        check_fits(model, 23, 3, 512, 512)
        with pytest.raises(EngineError, match=r"^student\.gguf: 64 sequences of 512 tokens need") as error:
            check_fits(model, 67, 3, 512, 512)
        hint = error.value.hint or ""
        fitting = int(hint.split()[2])
        assert hint == f"parallel = {fitting} would fit."
        check_fits(model, fitting + 3, 3, 512, 512)
        with pytest.raises(EngineError):
            check_fits(model, fitting + 4, 3, 512, 512)
        with pytest.raises(EngineError, match="need") as error:
            check_fits(model, 4, 3, 1 << 20, 512)
        assert "one fits" in (error.value.hint or "")

    @pytest.mark.model
    def test_a_real_context_takes_about_what_was_said(self, smollm2: LocalModel) -> None:
        pytest.importorskip("llama_cpp")
        from arte_edge.runtimes.llamacpp.bindings import LlamaContext, LlamaModel, Row

        model = LlamaModel(smollm2.gguf)

        def resident_bytes(n_seq: int) -> int:
            context = LlamaContext(model, n_seq, 512, 1)
            context.decode([Row(at % 50 + 40, at, 0, True) for at in range(16)])
            taken = psutil.Process().memory_info().rss
            context.close()
            return int(taken)

        small, large = resident_bytes(2), resident_bytes(42)
        said = context_bytes(model, 42, 512, 512) - context_bytes(model, 2, 512, 512)
        model.close()
        assert 0.7 * said < large - small < 1.15 * said


class TestProbe:
    @pytest.fixture(autouse=True)
    def on(self, model_cache: Path, monkeypatch: Patch) -> None:
        monkeypatch.setenv("ARTE_EDGE_PROBE", "1")

    @staticmethod
    def times(monkeypatch: Patch, *seconds: float) -> list[int]:
        asked: list[int] = []

        def measured(*_: object) -> list[float]:
            asked.append(1)
            return list(seconds)

        monkeypatch.setattr(llama_probe, "probe", measured)
        return asked

    def test_the_first_answer_stays_for_tensors_of_these_shapes_and_a_number_of_threads(
        self, model: Any, monkeypatch: Patch
    ) -> None:
        asked = self.times(monkeypatch, 2.0, 1.0, 3.0)
        for sha256, threads in (("abc", 2), ("abd", 2), ("abc", 1), ("abc", 2)):
            assert layout_for(model, sha256, threads) == CANDIDATES[1]
        assert len(asked) == 2  # another file with the same tensors, such as a tuned student, takes it
        make_gguf(model.path.with_name("tuned.gguf"))
        self.times(monkeypatch, 1.0, 2.0, 3.0)
        for path in (model.path, model.path.with_name("tuned.gguf")):
            model.path = path
            assert layout_for(model, "abc", 2) == CANDIDATES[1]
        model.path = make_gguf(path.with_name("other.gguf"), rows=16)
        assert layout_for(model, "abc", 2) == DEFAULT_LAYOUT

    def test_a_hair_is_not_worth_leaving_the_default(self, model: Any, monkeypatch: Patch) -> None:
        self.times(monkeypatch, 1.0, 0.97, 1.2)
        assert layout_for(model, "abc", 2) == DEFAULT_LAYOUT

    def test_off_nothing_is_kept(self, model: Any, monkeypatch: Patch, model_cache: Path) -> None:
        asked = self.times(monkeypatch, 2.0, 1.0, 3.0)
        monkeypatch.setenv("ARTE_EDGE_PROBE", "0")
        assert layout_for(model, "abc", 2) == DEFAULT_LAYOUT
        assert layout_for(model, "", 2) == DEFAULT_LAYOUT
        assert not asked and not list(model_cache.iterdir())

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"layout": {"ubatch": 7}}', '{"layout": {"wide": 1}}'])
    def test_a_damaged_cache_is_replaced(self, model: Any, monkeypatch: Patch, model_cache: Path, text: str) -> None:
        self.times(monkeypatch, 2.0, 1.0, 3.0)
        layout_for(model, "abc", 2)
        (path,) = (model_cache / "layouts").glob("*.json")
        path.write_text(text)
        assert layout_for(model, "abc", 2) == CANDIDATES[1]
        assert json.loads(path.read_text())["layout"]["flash"] is True
