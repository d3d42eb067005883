import json
from pathlib import Path
from typing import Any

import pytest
from tiny import Capture, Folders

from arte_edge.distill.train import sft
from arte_edge.distill.train.common import Encoder, Lora, SftSettings, load
from arte_edge.distill.train.sft import encode_sft, train_sft
from arte_edge.errors import InputError

FULL = SftSettings(learning_rate=1e-2, batch_size=4, epochs=6, seed=3)
LORA = FULL.model_copy(update={"lora": Lora(rank=8, alpha=16), "learning_rate": 2e-2})


def load_weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def tuned(tiny_checkpoint: Any, sft_rows: Any, tmp_path_factory: Folders) -> Any:
    """Train once with all weights and once with LoRA."""
    folder = tmp_path_factory.mktemp("sft")
    return {
        name: train_sft(tiny_checkpoint(), sft_rows, folder / name, settings)
        for name, settings in (("full", FULL), ("lora", LORA))
    }


def test_prompt_tokens_carry_no_loss_and_the_end_token_does(tiny_checkpoint: Any) -> None:
    from transformers import AutoTokenizer

    for adds_bos in (False, True):
        coder = Encoder(AutoTokenizer.from_pretrained(tiny_checkpoint(adds_bos=adds_bos)))
        prompt, completion = "<|user|>Is true?\n", "<ans>no</ans>"
        (row,) = encode_sft(coder, [{"prompt": prompt, "completion": completion}], 64)
        ids, labels = row["input_ids"], row["labels"]
        n_prompt = len(coder.prompt(prompt))
        assert labels[:n_prompt] == [-100] * n_prompt
        assert labels[n_prompt:] == ids[n_prompt:]
        assert ids[-1] == coder.tokenizer.eos_token_id
        assert coder.tokenizer.decode(ids[n_prompt:-1]) == completion
        assert ids.count(coder.tokenizer.bos_token_id) == int(adds_bos)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_student_learns_and_writes_what_it_learned_once_loaded(kind: str, tuned: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    history = tuned[kind].history
    assert len(history) == tuned[kind].steps == 18
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(tuned[kind].checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tuned[kind].checkpoint)
    ids = Encoder(tokenizer).prompt("<|user|>Is 3 true? and and and\n")
    out = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :]
    text = tokenizer.decode(out)
    assert text.startswith("<ans>") and text.endswith("</ans><eos>")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_checkpoint_is_16_bit_with_the_bases_own_files(kind: str, tuned: Any, tiny_checkpoint: Any) -> None:
    import torch

    base, out = tiny_checkpoint(), tuned[kind].checkpoint
    assert {tensor.dtype for tensor in load_weights(out).values()} == {torch.float16}
    assert load_weights(out).keys() == load_weights(base).keys()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (out, base))
    assert ours == theirs | {"dtype": "float16"}
    for file in out.iterdir():
        assert str(out.parent).encode() not in file.read_bytes(), file.name
    assert not list(out.parent.glob(".*"))  # nothing is left of the work folder


def test_a_finished_training_returns_at_once_and_another_one_does_not(
    tiny_checkpoint: Any, sft_rows: Any, tmp_path: Path
) -> None:
    settings = FULL.model_copy(update={"epochs": 1.0})
    steps: list[int] = []

    def progress(done: int, total: int) -> None:
        steps.append(done)

    first = train_sft(tiny_checkpoint(), sft_rows, tmp_path / "out", settings, progress=progress)
    assert steps == [1, 2, 3]
    assert train_sft(tiny_checkpoint(), sft_rows, tmp_path / "out", settings, progress=progress) == first
    assert steps == [1, 2, 3]
    train_sft(tiny_checkpoint(), sft_rows[:8], tmp_path / "out", settings, progress=progress)
    assert steps == [1, 2, 3, 1, 2]


def test_a_folder_of_somebody_elses_is_not_replaced(tiny_checkpoint: Any, sft_rows: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not the result of a training"):
        train_sft(tiny_checkpoint(), sft_rows, tmp_path, FULL)
    assert (tmp_path / "thesis.txt").exists()


def test_rows_that_are_too_long_are_dropped_not_cut_and_some_must_be_left(tiny_checkpoint: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "no " * n, "completion": "yes"} for n in (1, 200)]
    short = FULL.model_copy(update={"max_length": 32, "epochs": 1.0})
    result = train_sft(tiny_checkpoint(), rows, tmp_path / "some", short)
    assert (result.examples, result.dropped) == (1, 1)
    with pytest.raises(InputError, match="fits into 32 tokens"):
        train_sft(tiny_checkpoint(), rows[1:], tmp_path / "none", short)


SOFT = [
    {"prompt": "<|user|>Is 3 true?\n", "completion": "yes", "others": {"no": 0.25, "maybe not": 0.15}},
    {"prompt": "<|user|>Is 3 false?\n", "completion": "no"},
]


@pytest.mark.parametrize("arch", ["llama", "gemma3"])  # the second: not packed into one row
def test_a_soft_label_costs_its_expected_negative_log_likelihood(
    arch: str, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny_checkpoint(arch=arch)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    encoder = Encoder(AutoTokenizer.from_pretrained(base))
    loss = n_token = torch.tensor(0.0)
    for row, weights in zip(SOFT, ({"yes": 0.6, "no": 0.25, "maybe not": 0.15}, {"no": 1.0}), strict=True):
        prompt = encoder.prompt(row["prompt"])
        for text, weight in weights.items():
            completion = encoder.completion(row["prompt"], text)
            logs = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            for place, token in enumerate(completion, len(prompt)):
                loss, n_token = loss - weight * logs[place - 1, token], n_token + weight
    (loss / n_token).backward()
    rate = 1e-3
    settings = SftSettings(learning_rate=rate, batch_size=2, warmup=0, dtype="float16")
    done = train_sft(base, SOFT, tmp_path / "out", settings)
    assert done.history[0]["loss"] == pytest.approx((loss / n_token).item(), rel=1e-3)
    # The first step of Adam goes against the sign of each gradient that is not tiny.
    before, after = (model.model.embed_tokens.weight, load_weights(done.checkpoint)["model.embed_tokens.weight"])
    steep = before.grad.abs() > 1e-4
    assert steep.any() and torch.equal((after.float() - before)[steep].sign(), -before.grad[steep].sign())


def test_without_others_a_soft_label_is_a_label(tiny_checkpoint: Any, sft_rows: Any, tmp_path: Path) -> None:
    import torch

    settings = FULL.model_copy(update={"epochs": 1.0, "accumulate": 2})
    hard = train_sft(tiny_checkpoint(), sft_rows, tmp_path / "hard", settings)
    soft = train_sft(tiny_checkpoint(), [row | {"others": {}} for row in sft_rows], tmp_path / "soft", settings)
    assert [row["loss"] for row in soft.history] == pytest.approx([row["loss"] for row in hard.history], rel=1e-4)
    a, b = load_weights(hard.checkpoint), load_weights(soft.checkpoint)
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)
    long = [SOFT[0] | {"others": {"no " * 100: 0.4}}]
    with pytest.raises(InputError, match="fits into 32 tokens"):
        train_sft(tiny_checkpoint(), long, tmp_path / "long", settings.model_copy(update={"max_length": 32}))


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_killed_training_goes_on_to_the_same_weights(
    kind: str, tiny_checkpoint: Any, sft_rows: Any, kill: Any, tmp_path: Path, capfd: Capture
) -> None:
    import torch

    settings = (FULL if kind == "full" else LORA).model_copy(update={"epochs": 2.0, "save_every_s": 0.0})
    whole = train_sft(tiny_checkpoint(), sft_rows, tmp_path / "whole", settings)
    kill("Sft", sft_rows, tmp_path / "killed", settings, step=4)
    assert not (tmp_path / "killed").exists()
    out = tmp_path / "moved" / "killed"  # to another machine
    (tmp_path / ".killed.work").rename(out.parent.mkdir() or out.with_name(".killed.work"))
    (out.with_name(".killed.work") / "checkpoints" / "checkpoint-4").mkdir(exist_ok=True)  # cut while written
    steps: list[int] = []
    capfd.readouterr()
    again = train_sft(tiny_checkpoint(), sft_rows, out, settings, progress=lambda done, total: steps.append(done))
    assert "missing keys" not in capfd.readouterr().err  # a tied output layer is no weight of its own
    assert steps == [4, 5, 6]  # three steps were kept
    assert [row["loss"] for row in again.history] == [row["loss"] for row in whole.history]
    a, b = load_weights(whole.checkpoint), load_weights(again.checkpoint)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any processor computes bfloat16 products, some of them slowly."""
    monkeypatch.setattr(sft, "multiplies_bfloat16", lambda: True)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])  # without and with biases
def test_the_forward_pass_is_exact_and_every_gradient_points_the_same_way(
    multiplies: None, tiny_checkpoint: Any, arch: str
) -> None:
    import torch

    found = []
    for rounded in (False, True):
        model, _ = load(tiny_checkpoint(arch=arch), frozen=False)
        assert not rounded or sft.gradients_in_bfloat16(model)
        ids = torch.arange(10, 34).reshape(2, 12)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.item(), {name: weight.grad for name, weight in model.named_parameters()}))
    (exact, gradients), (loss, rounded_gradients) = found
    assert loss == exact
    for name, gradient in gradients.items():
        other = rounded_gradients[name]
        assert other is not None and other.dtype == torch.float32, name
        # Of what the softmax does not see, such as the bias of keys, the gradient is rounding alone.
        if gradient.norm() > 1e-6:
            assert torch.nn.functional.cosine_similarity(gradient.flatten(), other.flatten(), 0) > 0.99, name
            assert other.norm().item() == pytest.approx(gradient.norm().item(), rel=0.02), name


def test_a_training_follows_the_loss_of_float32(
    multiplies: None, tiny_checkpoint: Any, sft_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SftSettings(learning_rate=1e-3, batch_size=4, epochs=4, seed=3)
    rounded = train_sft(tiny_checkpoint(), sft_rows, tmp_path / "rounded", settings)
    monkeypatch.setattr(sft, "multiplies_bfloat16", lambda: False)
    exact = train_sft(tiny_checkpoint(), sft_rows, tmp_path / "exact", settings)
    ours, theirs = ([row["loss"] for row in result.history] for result in (rounded, exact))
    assert ours[0] == theirs[0] and ours != theirs
    assert ours == pytest.approx(theirs, rel=0.01)
    assert theirs[-1] < 0.9 * theirs[0]  # there was something to follow
