#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0 on Linux: a tensor that is deleted frees no memory while another of its file lives.
#
# What: load_file maps the file, and every tensor is a view of that one mapping, which ends with the last of them. A
# program that replaces weights one by one, to quantize or to pack them, therefore holds both forms of the whole model
# once it has read them, although each replaced tensor is gone and its own storage says that it is as large as the
# tensor alone. The pages are the file's, so the system may take them when memory runs short, but they count as resident
# until then. Way out: madvise(MADV_DONTNEED) on a tensor's whole pages, or load tensor by tensor and copy.
# Seen: two tensors of 64 MB, read once: 128 MB of the file are resident; after one is deleted still 128; none after both.
# Fails if the first deletion gives its pages back, or a storage is larger than its tensor.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'torch==2.13.0' 'safetensors==0.8.0' 'numpy<3'
cd "$work"
"$work/venv/bin/python" - <<'PY'
import gc
import re

import safetensors
import torch
from safetensors.torch import load_file, save_file


def resident_mb():
    gc.collect()
    with open("/proc/self/smaps") as file:
        blocks = re.findall(r"weights\.safetensors\n(?:.*\n)*?Rss: +(\d+) kB", file.read())
    return round(sum(map(int, blocks)) / 1024)


save_file({name: torch.ones(16, 1024, 1024) for name in ("one", "two")}, "weights.safetensors")
tensors = load_file("weights.safetensors")
sizes = {name: (tensor.untyped_storage().nbytes(), tensor.nbytes) for name, tensor in tensors.items()}
total = sum(float(tensor.sum()) for tensor in tensors.values())
seen = [resident_mb()]
del tensors["one"]
seen.append(resident_mb())
del tensors["two"]
seen.append(resident_mb())
print(f"safetensors {safetensors.__version__}, torch {torch.__version__}: MB resident with two, one and no tensor: {seen}")
assert total == 2 * 16 * 1024 * 1024
assert all(storage == own for storage, own in sizes.values()), sizes
assert seen == [128, 128, 0], seen
PY
