import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import Make, edited, edited_json

from arte_edge.errors import ArteError, InputError
from arte_edge.gguf.convert import convert
from arte_edge.gguf.reader import Field, read_model_header

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def test_shards_give_the_same_file(make_checkpoint: Make, tmp_path: Path) -> None:
    one, many = make_checkpoint("llama"), make_checkpoint("llama", shard="60KB")
    assert (many / "model.safetensors.index.json").is_file()
    assert convert(one, tmp_path / "a.gguf").read_bytes() == convert(many, tmp_path / "b.gguf").read_bytes()


def test_a_tensor_that_is_in_no_shard_is_rejected(make_checkpoint: Make, tmp_path: Path) -> None:
    sharded, name = make_checkpoint("llama", shard="60KB"), "model.safetensors.index.json"
    files = json.loads((sharded / name).read_text())["weight_map"]
    files["model.extra.weight"] = next(iter(files.values()))
    with pytest.raises(InputError, match=r"model\.extra"):
        convert(edited_json(sharded, tmp_path / "copy", name, weight_map=files), tmp_path / "out.gguf")


def test_the_output_matrix_is_written_only_if_untied(make_checkpoint: Make, tmp_path: Path) -> None:
    tied = make_checkpoint("qwen2", tie_word_embeddings=True)
    copy_embedding = lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})  # noqa: E731
    both = edited(tied, tmp_path / "both", copy_embedding)  # some checkpoints have it twice
    assert "output.weight" not in read_model_header(convert(both, tmp_path / "a.gguf")).shapes
    own = read_model_header(convert(make_checkpoint("qwen2"), tmp_path / "b.gguf"))
    assert own.shapes["output.weight"] == own.shapes["token_embd.weight"]
    lost = edited(make_checkpoint("qwen2"), tmp_path / "lost", lambda t: t.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"lm_head\.weight is missing"):
        convert(lost, tmp_path / "out.gguf")


def test_an_unknown_family_names_the_known_ones(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = edited_json(make_checkpoint("llama"), tmp_path / "copy", model_type="mamba")
    with pytest.raises(InputError, match="mamba") as caught:
        convert(folder, tmp_path / "out.gguf")
    assert "smollm3" in caught.value.hint and "--llama-cpp" in caught.value.hint


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "su"}}, "rope_type is 'longrope'"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'"),
        ("qwen2", {"rope_parameters": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "rope_type is 'mrope'"),
        ("llama", {"rope_parameters": YARN | {"truncate": False}}, "truncate"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ("llama", {"rope_parameters": YARN | {"rope_type": "llama3"}}, "low_freq_factor"),
        ("llama", {"rope_parameters": ["yarn"]}, "rotary scaling"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}, "no_rope_layers"),
        ("gemma3", {"query_pre_attn_scalar": 77}, "query_pre_attn_scalar"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "layer_types"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized"),
        ("llama", {"vocab_size": 12}, "vocab_size"),
        ("llama", {"num_attention_heads": None}, "num_attention_heads"),
        ("llama", {"num_hidden_layers": 3}, "missing"),
        ("llama", {"num_hidden_layers": 1 << 60}, "num_hidden_layers"),
        ("llama", {"num_attention_heads": 8, "head_dim": 16}, "does not fit"),
    ],
)
def test_settings_that_would_load_and_answer_wrongly_are_refused(
    family: str, config: dict[str, Any], said: str, make_checkpoint: Make, tmp_path: Path
) -> None:
    folder = edited_json(make_checkpoint(family), tmp_path / "copy", **config)
    with pytest.raises(InputError, match=said):
        convert(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(UP), r"blk\.1\.ffn_up\.weight is missing"),
        (lambda t: t.update({UP: t[UP][:40].clone()}), "up_proj"),
        (lambda t: t.update({"model.odd.weight": t[UP].clone()}), r"model\.odd\.weight has no place"),
    ],
)
def test_wrong_tensors_are_named(change: Any, named: str, make_checkpoint: Make, tmp_path: Path) -> None:
    folder = edited(make_checkpoint("llama"), tmp_path / "copy", change)
    with pytest.raises(InputError, match=named):
        convert(folder, tmp_path / "out.gguf")


def test_a_weight_file_cut_short_is_rejected(make_checkpoint: Make, tmp_path: Path) -> None:
    shutil.copytree(make_checkpoint("llama"), tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut short"):
        convert(tmp_path / "cut", tmp_path / "out.gguf")


def test_values_too_large_for_float16_fit_bfloat16(make_checkpoint: Make, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6

    folder = edited(make_checkpoint("llama"), tmp_path / "big", spoil)
    with pytest.raises(ArteError, match=r"blk\.1\.ffn_up\.weight"):
        convert(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    assert convert(folder, tmp_path / "out.gguf", "BF16").is_file()


def test_extra_fields_stand_over_what_the_checkpoint_says(make_checkpoint: Make, tmp_path: Path) -> None:
    extra = {"general.name": Field(8, "Süß".encode()), "arte_edge.version": Field(8, b"1")}
    out = convert(make_checkpoint("llama"), tmp_path / "out.gguf", extra_fields=extra)
    fields = read_model_header(out).fields
    assert {key: fields[key] for key in extra} == extra


@pytest.mark.parametrize(
    ("family", "name", "written"),
    [("llama", b"phi-3 teacher's pupil", b"Phi 3 teacher's pupil"), ("phi3", b"My Phi3", b"My Phi 3")],
)
def test_a_breaking_name_is_changed(
    family: str, name: bytes, written: bytes, make_checkpoint: Make, tmp_path: Path
) -> None:
    fields = {"general.name": Field(8, name)}
    out = convert(make_checkpoint(family), tmp_path / "out.gguf", extra_fields=fields)
    assert read_model_header(out).fields["general.name"].value == written


def test_a_process_killed_while_it_writes_leaves_no_file(make_checkpoint: Make, tmp_path: Path) -> None:
    out = tmp_path / "out" / "student.gguf"
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from arte_edge.gguf.convert import convert\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    checkpoint = make_checkpoint("llama")
    done = subprocess.run([sys.executable, "-c", script, str(checkpoint), str(out)], check=False)
    assert done.returncode == -9
    assert [path.suffix for path in out.parent.iterdir()] == [".partial"]
    convert(checkpoint, out)
    assert [path.name for path in out.parent.iterdir()] == ["student.gguf"]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_no_torch_is_loaded_and_memory_stays_small(make_checkpoint: Make, tmp_path: Path) -> None:
    wide = make_checkpoint("llama", hidden_size=1024, intermediate_size=8192, num_hidden_layers=4)
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from arte_edge.gguf.convert import convert\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), 'F32')\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        # not ru_maxrss: that begins with what the process that started this one had
        "lines = Path('/proc/self/status').read_text().splitlines()\n"
        "print(next(line.split()[1] for line in lines if line.startswith('VmHWM')))\n"
    )
    command = [sys.executable, "-c", script, str(wide), str(tmp_path / "out.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    weights_kib = (wide / "model.safetensors").stat().st_size // 1024
    assert weights_kib > 150_000
    assert int(done.stdout) < 250_000, "KiB: the interpreter and a few blocks, whatever the model's size"
