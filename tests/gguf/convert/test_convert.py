import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Make

from arte_edge.errors import ArteError, InputError
from arte_edge.gguf.convert.convert import convert
from arte_edge.gguf.reader import Field, read_model_header


def copied(checkpoint: Path, out: Path, **config: Any) -> Path:
    """Copy a checkpoint with keys of its config.json changed; None removes one."""
    shutil.copytree(checkpoint, out)
    content = json.loads((out / "config.json").read_text("utf-8")) | config
    (out / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}), "utf-8")
    return out


def edited(checkpoint: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy a checkpoint with its tensors changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_shards_give_the_same_file(make_checkpoint: Make, tmp_path: Path) -> None:
    one, many = make_checkpoint("llama"), make_checkpoint("llama", shard="60KB")
    assert (many / "model.safetensors.index.json").is_file()
    assert convert(one, tmp_path / "a.gguf").read_bytes() == convert(many, tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("damage", ["shard missing", "tensor in no shard"])
def test_a_sharded_checkpoint_that_is_not_whole_is_refused(
    damage: str, make_checkpoint: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(make_checkpoint("llama", shard="60KB"), folder)
    if damage == "shard missing":
        sorted(folder.glob("*.safetensors"))[1].unlink()
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.extra.weight"] = next(iter(index["weight_map"].values()))
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"safetensors|model\.extra"):
        convert(folder, tmp_path / "out.gguf")


def test_a_tied_output_matrix_is_left_out_even_where_the_checkpoint_has_it(
    make_checkpoint: Make, tmp_path: Path
) -> None:
    tied = make_checkpoint("qwen2", tie_word_embeddings=True)
    both = edited(
        tied,
        tmp_path / "both",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    )
    assert "output.weight" not in read_model_header(convert(both, tmp_path / "a.gguf")).shapes
    own = read_model_header(convert(make_checkpoint("qwen2"), tmp_path / "b.gguf"))
    assert own.shapes["output.weight"] == own.shapes["token_embd.weight"]


def test_an_untied_output_matrix_that_is_missing_is_refused(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = edited(make_checkpoint("qwen2"), tmp_path / "copy", lambda t: t.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"lm_head\.weight is missing"):
        convert(folder, tmp_path / "out.gguf")


def test_an_unknown_family_names_the_known_ones_and_the_way_out(
    make_checkpoint: Make, tmp_path: Path
) -> None:
    folder = copied(make_checkpoint("llama"), tmp_path / "copy", model_type="mamba")
    with pytest.raises(InputError, match="mamba") as caught:
        convert(folder, tmp_path / "out.gguf")
    assert "smollm3" in caught.value.hint and "--llama-cpp" in caught.value.hint


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}, "no_rope_layers"),
        ("gemma3", {"query_pre_attn_scalar": 77}, "query_pre_attn_scalar"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "layer_types"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized already"),
        ("llama", {"vocab_size": 12}, "vocab_size"),
        ("llama", {"num_attention_heads": None}, "num_attention_heads"),
        ("llama", {"num_hidden_layers": 3}, "missing"),
        ("llama", {"num_attention_heads": 8, "head_dim": 16}, "does not fit"),
    ],
)
def test_settings_that_would_load_and_answer_wrongly_are_refused(
    family: str, config: dict[str, Any], said: str, make_checkpoint: Make, tmp_path: Path
) -> None:
    folder = copied(make_checkpoint(family), tmp_path / "copy", **config)
    with pytest.raises(InputError, match=said):
        convert(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_weights_that_are_not_whole_are_refused_by_name(make_checkpoint: Make, tmp_path: Path) -> None:
    lost = "model.layers.1.mlp.up_proj.weight"
    folder = edited(make_checkpoint("llama"), tmp_path / "a", lambda t: t.pop(lost))
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight is missing"):
        convert(folder, tmp_path / "out.gguf")
    folder = edited(
        make_checkpoint("llama"), tmp_path / "b", lambda t: t.update({lost: t[lost][:40].clone()})
    )
    with pytest.raises(InputError, match="up_proj"):
        convert(folder, tmp_path / "out.gguf")
    folder = edited(
        make_checkpoint("llama"), tmp_path / "c", lambda t: t.update({"model.odd.weight": t[lost].clone()})
    )
    with pytest.raises(InputError, match=r"model\.odd\.weight has no place"):
        convert(folder, tmp_path / "out.gguf")
    cut = tmp_path / "d"
    shutil.copytree(make_checkpoint("llama"), cut)
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(InputError, match="cut short"):
        convert(cut, tmp_path / "out.gguf")


def test_values_too_large_for_float16_are_refused_and_fit_bfloat16(
    make_checkpoint: Make, tmp_path: Path
) -> None:
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
def test_a_name_with_which_llama_cpp_would_not_load_the_vocabulary_is_mended(
    family: str, name: bytes, written: bytes, make_checkpoint: Make, tmp_path: Path
) -> None:
    out = convert(
        make_checkpoint(family), tmp_path / "out.gguf", extra_fields={"general.name": Field(8, name)}
    )
    assert read_model_header(out).fields["general.name"].value == written


def test_a_process_killed_while_it_writes_leaves_no_file(make_checkpoint: Make, tmp_path: Path) -> None:
    out = tmp_path / "out" / "student.gguf"
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from arte_edge.gguf.convert.convert import convert\n"
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
def test_neither_torch_nor_transformers_is_loaded_and_memory_stays_small(
    make_checkpoint: Make, tmp_path: Path
) -> None:
    wide = make_checkpoint("llama", hidden_size=1024, intermediate_size=8192, num_hidden_layers=4)
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from arte_edge.gguf.convert.convert import convert\n"
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
