#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU with AVX512-BF16: once a 4-bit layer was evaluated, no gradient passes it any more.
#
# What: Linear4bit (NF4) under QLoRA is frozen, and gradients pass through it to the adapters of earlier layers. On such a
# CPU its first forward pass in eval mode without gradients, as an evaluation between two training steps makes it,
# repacks the weight for an inference kernel, for good: layer.train() does not undo it. That kernel has no backward pass,
# so training goes on, with one UserWarning of torch, and layers before it get no gradient through it. On other CPUs and
# on GPUs nothing is repacked. Way out: layer.support_avx512bf16_for_cpu = False before the first evaluation.
# Seen: the gradient is there before the evaluation, gone after it, and there with the way out; without AVX512-BF16 it
# is there always.
# Fails if one of them behaves differently.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'torch==2.13.0' 'bitsandbytes==0.50.2' 'numpy<3'
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import bitsandbytes as bnb
import torch


def gradients(way_out):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(64, 128), requires_grad=False, quant_type="nf4")
    layer.to("cpu")  # quantizes it
    if way_out:
        layer.support_avx512bf16_for_cpu = False

    def has_gradient():
        x = torch.ones(3, 128, requires_grad=True)
        layer(x).sum().backward()
        return x.grad is not None

    before = has_gradient()
    layer.eval()
    with torch.no_grad():
        layer(torch.ones(3, 128))
    layer.train()
    return before, has_gradient()


able = bool(bnb.functional.has_avx512bf16())
found = gradients(way_out=False), gradients(way_out=True)
print(f"bitsandbytes {bnb.__version__}, AVX512-BF16 {able}: gradient before and after an evaluation {found[0]}, "
      f"with the way out {found[1]}")
assert found == ((True, not able), (True, True)), found
PY
