import json
from pathlib import Path
from typing import Any

import pytest
from tiny import Folders, Patch

from arte_edge.distill.train import dpo
from arte_edge.distill.train.collapse import ProbeResult, is_untrained
from arte_edge.distill.train.common import CollapseLimits, DpoSettings, Encoder, Lora, SftSettings, load
from arte_edge.distill.train.dpo import _set_shards, encode_pairs, train_dpo
from arte_edge.distill.train.sft import train_sft
from arte_edge.errors import ArteError, InputError
from arte_edge.frozen_weights import FilePages

PAIRS = [
    {
        "prompt": f"<|user|>Write a question {i % 4}." + " not" * (i % 3) + "\n",
        "chosen": f"<ans>yes{i}</ans>",
        "rejected": "maybe " * (1 + i % 3) + "no",
    }
    for i in range(12)
]
FAST = DpoSettings(
    learning_rate=2e-2, batch_size=2, accumulate=1, epochs=1.0, lora=Lora(rank=4, alpha=8), probe_every=2, seed=1
)


def adapter(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def healthy(folder: Path) -> ProbeResult:
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    return ProbeResult(valid_rate=0.75, mean_tokens=40.0)


@pytest.fixture(scope="module")
def longer(tiny_checkpoint: Any, tmp_path_factory: Folders) -> Any:
    settings = FAST.model_copy(update={"epochs": 4.0, "probe_every": 8})
    out = tmp_path_factory.mktemp("longer") / "out"
    return train_dpo(tiny_checkpoint(), PAIRS, out, settings, probe=healthy)


def test_the_chosen_texts_win_and_the_adapter_is_a_peft_folder(longer: Any, tiny_checkpoint: Any) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = longer
    assert (result.steps, result.kept_step, result.collapse, result.dropped) == (24, 24, "", 0)
    assert len(result.history) == 24
    assert result.history[-1]["rewards/margins"] > 1.0 > abs(result.history[0]["rewards/margins"])
    assert result.history[-1]["logps/chosen"] > result.history[0]["logps/chosen"]  # the SFT part holds it
    assert [look["step"] for look in result.probes] == [0, 8, 16, 24]
    rows = [json.loads(line) for line in (result.adapter / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 24 + 4 and rows[0] == result.history[0] and rows[-1]["probe"]["step"] == 24
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    ids = torch.tensor([[4, 30, 31]])
    before = base(ids).logits
    assert not torch.allclose(PeftModel.from_pretrained(base, result.adapter)(ids).logits, before, atol=0.1)
    for file in result.adapter.iterdir():
        content = file.read_bytes()
        assert not any(str(path).encode() in content for path in (result.adapter.parent, tiny_checkpoint()))
    assert not list(result.adapter.parent.glob(".*"))


def test_an_ended_training_holds_no_model_in_memory(tiny_checkpoint: Any, tmp_path: Path) -> None:
    import gc

    from transformers import LlamaForCausalLM

    def models() -> int:
        return sum(type(thing) is LlamaForCausalLM for thing in gc.get_objects())

    checkpoint, before = tiny_checkpoint(), models()
    train_dpo(checkpoint, PAIRS, tmp_path / "dpo", FAST)
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    train_sft(checkpoint, rows, tmp_path / "sft", SftSettings(learning_rate=1e-3, batch_size=4))
    assert models() <= before


def test_sigmoid_alone_is_the_papers_loss(tiny_checkpoint: Any, tmp_path: Path) -> None:
    import math

    paper = FAST.model_copy(update={"losses": ("sigmoid",), "learning_rate": 1e-7})
    both = FAST.model_copy(update={"loss_weights": (1.0, 0.5), "learning_rate": 1e-7})
    first = train_dpo(tiny_checkpoint(), PAIRS, tmp_path / "a", paper).history[0]
    second = train_dpo(tiny_checkpoint(), PAIRS, tmp_path / "b", both).history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference are still the same
    assert second["loss"] > first["loss"] + 0.5


def test_the_rate_warms_up_and_falls_as_a_cosine(longer: Any) -> None:
    rates = [row["learning_rate"] for row in longer.history]
    peak = rates.index(max(rates))
    assert peak == 2 and rates[peak] == pytest.approx(2e-2)  # 10 % of 24 steps, rounded down
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[12] == pytest.approx(2e-2 * 0.6, rel=0.2) and rates[-1] < 1e-3


@pytest.mark.parametrize(
    ("broken", "named"), [(ProbeResult(0.1, 40.0), "valid drafts fell"), (ProbeResult(0.75, 400.0), "mean length went")]
)
def test_a_broken_teacher_stops_the_training_and_the_last_good_adapter_is_kept(
    broken: ProbeResult, named: str, tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    seen: list[dict[str, Any]] = []
    given_back: list[Any] = []
    monkeypatch.setattr(FilePages, "release_frozen", lambda pages: given_back.append(pages))

    def probe(folder: Path) -> ProbeResult:
        assert len(given_back) == len(seen) + 1, "before the probe opens the teacher a second time"
        seen.append(adapter(folder))
        changes = any(weight.any() for name, weight in seen[-1].items() if "lora_B" in name)
        assert is_untrained(folder) == (not changes) == (len(seen) == 1)
        return broken if len(seen) == 3 else healthy(folder)  # looks after 0, 2 and 4 steps

    result = train_dpo(tiny_checkpoint(), PAIRS, tmp_path / "out", FAST, probe=probe)
    assert (result.steps, result.kept_step) == (4, 2)
    assert named in result.collapse and result.probes[-1]["reason"] == result.collapse
    kept = adapter(result.adapter)
    assert all(torch.equal(kept[name], seen[1][name]) for name in kept)
    assert not all(torch.equal(kept[name], seen[2][name]) for name in kept)


def test_falling_log_probability_of_chosen_stops_between_looks_and_without_a_probe(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in PAIRS]
    harsh = {"probe_every": 100, "losses": ("sigmoid",), "learning_rate": 0.3, "warmup": 0.2}
    limits = CollapseLimits(max_chosen_drop_nats=1e-3)
    settings = FAST.model_copy(update={"limits": limits, **harsh})
    result = train_dpo(tiny_checkpoint(), swapped, tmp_path / "out", settings)
    assert "nats" in result.collapse
    assert result.kept_step == 0 and 0 < result.steps < 6
    assert not any(tensor.any() for name, tensor in adapter(result.adapter).items() if "lora_B" in name)


def test_pairs_are_tokenized_as_the_engines_do(tiny_checkpoint: Any) -> None:
    from transformers import AutoTokenizer

    coder = Encoder(AutoTokenizer.from_pretrained(tiny_checkpoint(adds_bos=True)))
    pair = {"prompt": "<bos><|user|>the ans", "chosen": "wer is no", "rejected": "wer is yes"}
    (encoded,) = encode_pairs(coder, [pair], 64)
    assert encoded["prompt_ids"] == coder.prompt("<bos><|user|>the ans") and encoded["prompt_ids"].count(1) == 1
    for key in ("chosen", "rejected"):
        ids = encoded[f"{key}_ids"]
        assert ids[-1] == 2 and coder.tokenizer.decode(ids[:-1]) == pair[key]


def test_a_pair_that_is_too_long_is_dropped_and_counted(tiny_checkpoint: Any, tmp_path: Path) -> None:
    long = {"prompt": "Is it?\n", "chosen": "yes", "rejected": "no " * 300}
    settings = FAST.model_copy(update={"max_length": 128})
    result = train_dpo(tiny_checkpoint(), [*PAIRS, long], tmp_path / "out", settings)
    assert (result.pairs, result.dropped) == (12, 1)
    with pytest.raises(InputError, match="fits into 128 tokens"):
        train_dpo(tiny_checkpoint(), [long], tmp_path / "none", settings)
    assert train_dpo(tiny_checkpoint(), [*PAIRS, long], tmp_path / "any", FAST).dropped == 0  # 0: no limit of ours


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Any, tmp_path_factory: Folders) -> Any:
    """An alignment that nobody disturbed."""
    return train_dpo(tiny_checkpoint(), PAIRS, tmp_path_factory.mktemp("dpo") / "out", FAST, probe=healthy)


def test_a_finished_alignment_returns_at_once(whole: Any, tiny_checkpoint: Any) -> None:
    def unwanted(folder: Path) -> ProbeResult:
        raise AssertionError("asked twice")

    assert train_dpo(tiny_checkpoint(), PAIRS, whole.adapter, FAST, probe=unwanted) == whole


@pytest.mark.parametrize(
    ("killed", "steps", "looks"),
    [
        ({"step": 4}, [3, 4, 5, 6], ["step-4", "step-6"]),  # between two checkpoints
        # while the teacher writes
        pytest.param({"look": 3}, [5, 6], ["step-4", "step-6"], marks=pytest.mark.slow),
        # at the last look of all
        pytest.param({"look": 4}, [], ["step-6"], marks=pytest.mark.slow),
    ],
)
def test_a_killed_alignment_goes_on_to_the_same_adapter(
    killed: dict[str, int],
    steps: list[int],
    looks: list[str],
    whole: Any,
    kill: Any,
    tiny_checkpoint: Any,
    tmp_path: Path,
) -> None:
    import torch

    out = tmp_path / "killed"
    kill("Dpo", PAIRS, out, FAST, **killed)
    taken: list[int] = []
    asked: list[str] = []

    def probe(folder: Path) -> ProbeResult:
        asked.append(folder.name)
        return healthy(folder)

    again = train_dpo(tiny_checkpoint(), PAIRS, out, FAST, probe=probe, progress=lambda done, total: taken.append(done))
    assert (taken, asked) == (steps, looks)
    assert again.probes == whole.probes
    assert [row["loss"] for row in again.history] == [row["loss"] for row in whole.history]
    a, b = adapter(whole.adapter), adapter(again.adapter)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


SIZED = FAST.model_copy(update={"learning_rate": 1e-4, "batch_size": 1, "probe_every": 4, "target_kl": 0.1})


@pytest.fixture(scope="module")
def sized(tiny_checkpoint: Any, tmp_path_factory: Folders) -> Any:
    """An alignment whose rate follows from the KL divergence."""
    out = tmp_path_factory.mktemp("sized") / "out"
    return train_dpo(tiny_checkpoint(), PAIRS[:10], out, SIZED, held_out=PAIRS[10:], probe=healthy)


def test_the_rate_follows_from_how_far_the_teacher_has_moved(sized: Any, tiny_checkpoint: Any) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert 0.085 <= sized.held_out.kl <= 0.1 and sized.held_out.right == sized.held_out.pairs == 2
    assert sized.held_out.margin > 0 and sized.kept_step == sized.steps
    rates = [row["learning_rate"] for row in sized.history]
    assert rates[:3] == pytest.approx([1e-4, 3e-4, 9e-4]) and rates[-1] < max(rates) / 2
    assert [row["kl"] for row in sized.history] == sorted(row["kl"] for row in sized.history)
    # The same figure from the adapter on the disk, each text on its own.
    coder = Encoder(AutoTokenizer.from_pretrained(tiny_checkpoint()))
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(), dtype=torch.float32).eval()
    divergences: list[Any] = []
    texts = [(pair["prompt"], pair[side]) for pair in PAIRS[10:] for side in ("chosen", "rejected")]
    ids = [(coder.prompt(prompt), coder.completion(prompt, text)) for prompt, text in texts]
    with torch.no_grad():
        before = [base(torch.tensor([start + rest])).logits[0] for start, rest in ids]
        aligned = PeftModel.from_pretrained(base, sized.adapter).eval()
        for logits, (start, rest) in zip(before, ids, strict=True):
            p, q = (
                x[len(start) - 1 : -1].double().log_softmax(-1)
                for x in (logits, aligned(torch.tensor([start + rest])).logits[0])
            )
            divergences += (p.exp() * (p - q)).sum(-1).tolist()
    assert sized.held_out.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)


def test_a_base_in_16_bits_is_aligned_as_far(
    sized: Any, tiny_checkpoint: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    from arte_edge.runtimes.transformers.placement import training_floats

    monkeypatch.delenv("ARTE_EDGE_DTYPE")
    if training_floats(tiny_checkpoint(), frozen=True) != "bfloat16":
        pytest.skip("this processor does not multiply bfloat16")
    result = train_dpo(tiny_checkpoint(), PAIRS[:10], tmp_path / "out", SIZED, held_out=PAIRS[10:])
    assert 0.085 <= result.held_out.kl <= 0.1 and result.held_out.right == 2
    assert sized.history[0]["kl"] < result.history[0]["kl"] < 2e-4  # rounding adds little to a step that does nothing
    assert {str(tensor.dtype) for tensor in adapter(result.adapter).values()} == {"torch.float32"}


def test_a_step_beyond_the_target_is_scaled_back_before_anybody_sees_it(tiny_checkpoint: Any, tmp_path: Path) -> None:
    wild = SIZED.model_copy(update={"learning_rate": 0.05, "target_kl": 0.01})
    result = train_dpo(tiny_checkpoint(), PAIRS, tmp_path / "out", wild, held_out=PAIRS[:2], probe=healthy)
    assert result.steps == result.kept_step == result.probes[-1]["step"] == 1
    assert 0.0085 <= result.held_out.kl <= 0.01


def test_few_pairs_are_seen_again_until_there_are_steps_to_steer(tiny_checkpoint: Any, tmp_path: Path) -> None:
    few = SIZED.model_copy(update={"accumulate": 2})
    result = train_dpo(tiny_checkpoint(), PAIRS[:3], tmp_path / "out", few)
    assert 5 < result.steps <= 8 and result.held_out.pairs == 0 and 0.05 < result.held_out.kl <= 0.1


@pytest.mark.parametrize("killed", [{"step": 5}, {"look": 4}])
def test_a_killed_alignment_with_a_target_goes_on_with_the_same_rates(
    killed: dict[str, int], sized: Any, kill: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    import torch

    out = tmp_path / "killed"
    kill("Dpo", PAIRS[:10], out, SIZED, held_out=PAIRS[10:], **killed)
    again = train_dpo(tiny_checkpoint(), PAIRS[:10], out, SIZED, held_out=PAIRS[10:], probe=healthy)
    rates, before = ([row["learning_rate"] for row in result.history] for result in (again, sized))
    assert rates == before and again.held_out == sized.held_out
    a, b = adapter(sized.adapter), adapter(again.adapter)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_adapter_that_a_spread_model_cannot_hold_is_an_error() -> None:
    import torch

    with pytest.raises(ArteError, match=r"no place for 1 of the adapter's 1 weights: base\.lora_A\.weight"):
        _set_shards(torch.nn.Linear(2, 2), {"base.lora_A.weight": torch.zeros(1, 2)})


def test_a_base_held_in_its_16_bits_is_aligned_as_one_in_float32(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    import torch

    from arte_edge.distill.train import common
    from arte_edge.frozen_weights import load_frozen

    four = SIZED.model_copy(update={"epochs": 0.4})
    made: list[Path] = []
    monkeypatch.setattr(common, "load_frozen", lambda folder, **how: made.append(folder) or load_frozen(folder, **how))
    monkeypatch.setattr(common, "keeps_16_bits", lambda n_params: True)
    held = train_dpo(tiny_checkpoint(), PAIRS[:10], tmp_path / "held", four, held_out=PAIRS[10:])
    assert made
    monkeypatch.setattr(common, "keeps_16_bits", lambda n_params: False)
    monkeypatch.setattr(common, "computes_twice", lambda *args: True)  # nor does what is kept change a number
    plain = train_dpo(tiny_checkpoint(), PAIRS[:10], tmp_path / "plain", four, held_out=PAIRS[10:])
    torch.testing.assert_close(adapter(held.adapter), adapter(plain.adapter), rtol=1e-6, atol=1e-6)
    for key in ("loss", "logps/chosen", "grad_norm", "kl"):
        ours, theirs = ([row[key] for row in result.history] for result in (held, plain))
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert (held.held_out.kl, held.held_out.margin) == pytest.approx(
        (plain.held_out.kl, plain.held_out.margin), rel=1e-5
    )


def test_a_teacher_of_four_bits_is_aligned_by_an_adapter_as_any_other(tiny_checkpoint: Any, tmp_path: Path) -> None:
    bits = pytest.importorskip("bitsandbytes")
    model, _ = load(tiny_checkpoint(), frozen=True, four_bits=True)
    linear = [module for name, module in model.named_modules() if name.endswith("_proj")]
    assert linear and all(isinstance(module, bits.nn.Linear4bit) for module in linear)
    for layer in linear[:2]:  # an evaluation does not end the gradient, on no processor
        layer.eval()
        inputs = layer.weight.new_ones(2, layer.in_features, dtype=layer.compute_dtype)
        layer(inputs)
        layer.train()(inputs.requires_grad_()).sum().backward()
        assert inputs.grad is not None and inputs.grad.any()
    settings = FAST.model_copy(update={"weights": "nf4", "epochs": 2.0})
    result = train_dpo(tiny_checkpoint(), PAIRS, tmp_path / "out", settings, probe=healthy)
    assert result.history[-1]["loss"] < result.history[0]["loss"] - 0.1
    sixteen = train_dpo(tiny_checkpoint(), PAIRS, tmp_path / "16", settings.model_copy(update={"weights": "16-bit"}))
    one, other = adapter(result.adapter), adapter(sixteen.adapter)
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}
    assert any((one[name] - other[name]).abs().max() > 1e-6 for name in one)  # the bases differ


def test_an_alignment_that_was_begun_before_there_were_four_bits_is_the_same(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    """The request of settings without the key, by which a training in a folder is recognized."""
    seen: list[Any] = []
    monkeypatch.setattr(dpo, "finished", lambda out, request, read: seen.append(request) or "done")
    monkeypatch.setattr(dpo, "content_key", lambda *parts: parts[-1])
    train_dpo(tiny_checkpoint(), PAIRS, tmp_path, FAST)
    train_dpo(tiny_checkpoint(), PAIRS, tmp_path, FAST.model_copy(update={"weights": "nf4"}))
    assert "weights" not in seen[0] and seen[1] == seen[0] | {"weights": "nf4"}
