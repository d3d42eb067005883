"""The llama.cpp engine on the real SmolLM2-135M: batches write what single prompts write."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from tiny import Patch, choose, make_gguf

from arte_edge.errors import ArteError
from arte_edge.models.resolve import LocalModel
from arte_edge.runtimes.completion import Request, Sampling

pytest.importorskip("llama_cpp")
from arte_edge.runtimes.llamacpp import engine as llamacpp
from arte_edge.runtimes.llamacpp.bindings import Layout
from arte_edge.runtimes.llamacpp.engine import LlamaCppEngine, as_float32

WORDS = ["sun", "moon", "tree", "river", "stone", "bread", "horse", "winter", "music", "window"]
SHARED = "You are a helpful assistant who answers in one short and friendly sentence.\n"
PROMPTS = [f"{SHARED}Question: Tell me about {w}{end}\nAnswer:" for w in WORDS for end in (".", ", please.")]


@pytest.fixture(scope="module")
def engine(smollm2: LocalModel) -> Iterator[LlamaCppEngine]:
    """One engine with fewer slots than prompts, so that slots are refilled.

    With flash attention, whose rounding does not depend on the shape of a batch: these weights have four
    bits, and their products with rounded activations make much of little.
    """
    with Patch.context() as patch:
        patch.setattr(llamacpp, "layout_for", lambda *_: Layout(flash=True))
        engine = LlamaCppEngine(smollm2.gguf, sha256=smollm2.sha256, parallel=6)
        yield engine
        engine.close()


def texts(engine: LlamaCppEngine, prompts: list[str], sampling: Sampling) -> list[str]:
    return [c.text for c in engine.complete([Request(prompt) for prompt in prompts], sampling)]


@pytest.mark.model
class TestComplete:
    def test_a_sampled_text_is_its_requests_own(self, engine: LlamaCppEngine) -> None:
        sampling = Sampling(temperature=1.0, max_tokens=10, seed=3)
        requests = [Request(PROMPTS[0], i) for i in range(4)]
        first = engine.complete(requests, sampling)
        assert [c.text for c in engine.complete(requests, sampling)] == [c.text for c in first]
        assert len({c.text for c in first}) == 4
        backwards = engine.complete(requests[::-1], sampling)
        assert [c.text for c in backwards[::-1]] == [c.text for c in first]
        reseeded = engine.complete(requests, Sampling(temperature=1.0, max_tokens=10, seed=4))
        assert [c.text for c in reseeded] != [c.text for c in first]

    def test_a_stop_string_is_kept_at_the_end(self, engine: LlamaCppEngine) -> None:
        prompt = "1, 2, 3, 4, 5, 6, 7,"
        (counted,) = engine.complete([Request(prompt)], Sampling(max_tokens=24, stop=("10", "\n\n\n")))
        assert counted.finish == "stop"
        assert counted.text.strip() == "8, 9, 10"

    def test_a_grammar_holds_the_format(self, engine: LlamaCppEngine) -> None:
        grammar = 'root ::= [^<]+ "<ans>" answer "</ans>"\nanswer ::= "light_on" | "off"\n'
        for temperature in (0.0, 1.5):
            sampling = Sampling(temperature, max_tokens=160, stop=("</ans>",), grammar=grammar)
            for completion in engine.complete([Request(prompt) for prompt in PROMPTS[:3]], sampling):
                whole = re.fullmatch(r"[^<]+<ans>(light_on|off)</ans>", completion.text)
                assert whole or (completion.finish in ("length", "loop") and "</" not in completion.text)
        strict = 'root ::= "<ans>" ("yes" | "no") "</ans>"\n'
        for text in texts(engine, PROMPTS[:4], Sampling(1.5, max_tokens=20, grammar=strict)):
            assert text in ("<ans>yes</ans>", "<ans>no</ans>")

    def test_a_prompt_that_is_too_long_harms_no_other(self, engine: LlamaCppEngine) -> None:
        sampling = Sampling(max_tokens=6)
        long = "word " * (engine.model.n_ctx_train + 10)
        first, failed, last = engine.complete([Request(p) for p in (PROMPTS[0], long, PROMPTS[1])], sampling)
        assert failed.finish == "error" and "context" in failed.error and failed.text == ""
        assert [first.text, last.text] == texts(engine, PROMPTS[:2], sampling)
        (only,) = engine.complete([Request(long)], sampling)
        assert only.finish == "error"

    def test_a_penalty_diverts_from_the_examples(self, engine: LlamaCppEngine) -> None:
        line = "we dance in the kitchen until the neighbours knock"
        prompt = f"1. {line}\n2. play the drums\n3. we dance in the"
        copied, diverted = (
            texts(engine, [prompt], Sampling(max_tokens=12, stop=("\n",), repeat_penalty=nats))[0]
            for nats in (0.0, 1.6)
        )
        assert copied.strip() in line
        assert "until the neighbours knock" not in diverted and diverted.strip()

    def test_a_text_that_goes_round_in_circles_is_ended(self, engine: LlamaCppEngine) -> None:
        prompt = "ha ha ha ha ha ha ha ha ha ha ha ha ha ha ha ha ha ha ha ha ha ha ha ha"
        (looped,) = engine.complete([Request(prompt)], Sampling(max_tokens=400))
        assert looped.finish == "loop"
        assert looped.completion_tokens < 200


@pytest.mark.model
def test_the_order_of_prompts_and_choices_does_not_matter(engine: LlamaCppEngine) -> None:
    scores = choose(engine, "", PROMPTS[:4], [" yes", " no"])
    turned = choose(engine, "", PROMPTS[3::-1], [" no", " yes"])
    assert turned[::-1, ::-1] == pytest.approx(scores, abs=1e-2)


@pytest.fixture
def avx2(monkeypatch: Patch, tmp_path: Path) -> Path:
    """A processor with AVX2 alone, for which even a tiny model is worth a copy; returns the folder of the copies."""
    monkeypatch.setenv("ARTE_EDGE_HOME", str(tmp_path))
    monkeypatch.setattr(llamacpp, "detect", lambda: SimpleNamespace(features=("avx", "avx2")))
    monkeypatch.setattr(llamacpp, "_WIDENED", (0, 300_000_000))
    return tmp_path / "staging"


def test_small_16_bit_weights_are_widened_where_that_is_faster(
    avx2: Path, bench_gguf: Path, monkeypatch: Patch
) -> None:
    killed, running = avx2 / "float32-killed", avx2 / "float32-running"
    for folder in (killed, running):
        folder.mkdir(parents=True)
    os.utime(killed, (0, 0))

    def written() -> tuple[bool, list[str], list[float]]:
        made = LlamaCppEngine(bench_gguf, sha256="5" * 64)
        assert made.model.path == bench_gguf and [*avx2.glob("*")] == [running], "the copy is removed at once"
        found = texts(made, ["ab", "abc"], Sampling(max_tokens=8))
        (scores,) = choose(made, "abc", [""], ["x", "yz", "w"])
        made.close()
        return made.model.widened, found, [float(each) for each in scores]

    widened, wide_texts, wide_scores = written()
    monkeypatch.setattr(llamacpp, "detect", lambda: SimpleNamespace(features=("avx2", "avx512f")))
    kept, own_texts, own_scores = written()
    assert widened and not kept
    assert wide_texts == own_texts and wide_scores == pytest.approx(own_scores, abs=0.02)


@pytest.mark.parametrize("why", ["quantized", "large", "no room"])
def test_other_weights_are_opened_as_they_are(
    avx2: Path, bench_gguf: Path, tmp_path: Path, monkeypatch: Patch, why: str
) -> None:
    path = bench_gguf
    if why == "quantized":
        path = make_gguf(tmp_path / "m-Q8_0.gguf")
    elif why == "large":
        monkeypatch.setattr(llamacpp, "_WIDENED", (0, 1_000))
    else:
        monkeypatch.setattr(llamacpp, "quantize", Mock(side_effect=ArteError("the disk is full")))
    with as_float32(path) as opened:
        assert opened == path
    assert not [*avx2.glob("*")]
