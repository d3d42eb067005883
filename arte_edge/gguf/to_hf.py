"""Turn a GGUF file into a safetensors checkpoint, once, and cache it.

Training needs weights that torch can read, and transformers takes half a minute and more to unpack a GGUF. The folder
appears only when it is complete and has been loaded again: same logits, and the same tokens as llama.cpp's. (A GGUF
names its pre-tokenizer, ``tokenizer.ggml.pre``; a converter that ignores it silently changes the model's tokens.)

A child process does it, ``python -m arte_edge.gguf.to_hf GGUF OUT``, so that running out of memory ends the child and
not the run, all of its memory is returned, and the output of the libraries does not mix with our progress. It reports
to its parent in JSON lines: ``{"step": …}``, or ``{"error": …, "hint": …}``.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arte_edge.cache import (
    DISK_FULL_MESSAGES,
    DiskFull,
    Progress,
    cache_dir,
    cache_subdir,
    check_free_space,
    cleanup_on_full_disk,
    locked,
    rename_into_place,
    slug,
)
from arte_edge.errors import ArteError, InputError
from arte_edge.extras import need
from arte_edge.gguf.reader import GgufHeader, read_model_header

__all__ = ["PROBES", "VERSION", "check_tokenizer", "checkpoint_folder", "main", "to_checkpoint"]

# Part of the folder's name: raised when the conversion changes, so that old results are not reused.
VERSION = 1
# Texts like prompts, with what tokenizers get wrong: digits, spaces, quotes, newlines, other scripts.
PROBES = (
    "There are 1234567 apples, 12 pears and 3.14159 pies on 2024-05-06.",
    "Hello  world\n\n\tI'm   here, you'll see; DON'T.",
    "not ( True ) and ( False ) is<ans>True</ans>",
    "<Question_4><input>x=12;y=[1,2,3]\n    return 007</input>",
    "Ünïcödé, 日本語テキスト, مرحبا, 🙂 ½ ²",
    "a\r\nb and some more  ",
)
_PROBE = "The quick brown fox"
# Loading twice must give the same numbers apart from the order of summation.
_LOGIT_TOLERANCE = 1e-2


def checkpoint_folder(name: str, sha256: str) -> Path:
    """Return the cache folder for the checkpoint of a GGUF with this checksum; it need not exist."""
    return cache_dir() / "checkpoints" / f"{slug(name)}-{sha256[:16]}-v{VERSION}"


def to_checkpoint(name: str, gguf: Path, sha256: str, progress: Progress | None = None) -> Path:
    """Return the bfloat16 safetensors checkpoint of `gguf`, converting it if that was never done.

    Raises:
        InputError: an architecture that transformers cannot read from GGUF.
        ArteError: packages are missing, the disk or the memory is too small, or the result is wrong.
    """
    final = checkpoint_folder(name, sha256)
    if final.is_dir():
        return final
    for extra in ("train", "gguf"):
        need(extra, "Converting a GGUF to a checkpoint")
    with locked(final.name, progress):
        if final.is_dir():  # another process was first
            return final
        header = read_model_header(gguf)
        what = f"the checkpoint of '{name}'"
        for left_over in cache_subdir("staging").glob(f"{final.name}.*"):
            shutil.rmtree(left_over, ignore_errors=True)  # a conversion cannot be resumed
        staging = Path(tempfile.mkdtemp(dir=cache_subdir("staging"), prefix=f"{final.name}."))
        try:
            with cleanup_on_full_disk(staging, what):
                check_free_space(staging, 2 * header.parameter_count, what)
                _run_child(gguf, staging, what, progress)
                origin = {"gguf": gguf.name, "sha256": sha256, "quantization": header.quantization}
                (staging / "origin.json").write_text(json.dumps(origin, indent=1) + "\n", "utf-8")
                staging.chmod(0o755)  # mkdtemp's folder would be closed to other users of a shared cache
                rename_into_place(staging, final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return final


def _run_child(gguf: Path, out: Path, what: str, progress: Progress | None) -> None:
    """Run this module and pass its steps to `progress`, its errors to the caller."""
    command = [sys.executable, "-m", "arte_edge.gguf.to_hf", str(gguf.absolute()), str(out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    failure: dict[str, str] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": output}
        child = subprocess.Popen(command, **pipes, text=True, env=environment)
        try:
            for line in child.stdout or ():
                message = json.loads(line)
                if progress and "step" in message:
                    progress(message["step"], 0, 0)
                failure = message if "error" in message else failure
        finally:
            if child.poll() is None and sys.exc_info()[0] is not None:
                child.kill()
            code = child.wait()
        output.seek(0)
        printed = output.read()
    if code == 0:
        return
    if any(mark in printed + failure.get("error", "") for mark in DISK_FULL_MESSAGES):
        raise DiskFull(out.parent, what)
    if failure:
        raise (InputError if code == InputError.exit_code else ArteError)(failure["error"], failure["hint"])
    if code == -9:
        raise ArteError(
            f"Making {what} was killed by the system, most likely for lack of memory",
            "It needs about three times the size of the checkpoint, which has two bytes a parameter.",
        )
    last = (printed.strip().splitlines() or ["no message"])[-1]
    raise ArteError(f"Making {what} failed: {last[:300]}", "Please report this with the model's name.")


def _unpack(header: GgufHeader, out: Path, report: Callable[[str], None]) -> None:
    """Write the tokenizer and the bfloat16 weights of a GGUF to `out`, load both again and compare."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, file = header.path.parent, header.path.name
    report("reading the tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        _restore_pre_tokenizer(tokenizer, header)
        tokenizer.chat_template = tokenizer.chat_template or header.chat_template
        tokenizer.save_pretrained(out)
        report("reading the weights")
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=torch.bfloat16, **_dense_weights()
        )
    except ValueError as error:
        raise InputError(
            f"{header.path}: transformers cannot read a '{header.architecture}' GGUF ({error})",
            "Give the original checkpoint (a folder or its Hub id) instead.",
        ) from error
    _clear_quantization_marks(model)
    expected = _logits(model, tokenizer)
    report("writing the checkpoint")
    try:
        model.save_pretrained(out)
    except Exception as error:  # safetensors has an error class of its own, with the reason in its text
        if any(mark in str(error) for mark in DISK_FULL_MESSAGES):
            raise DiskFull(out, "the checkpoint") from error
        raise
    del model
    gc.collect()  # two copies of a large teacher do not fit into a small memory
    report("checking the checkpoint")
    again = AutoTokenizer.from_pretrained(out)
    check_tokenizer(again, header)
    found = _logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16), again)
    if found.shape != expected.shape or not (found - expected).abs().max() <= _LOGIT_TOLERANCE:
        raise ArteError(
            f"{header.path}: the written checkpoint does not give the logits that its GGUF gives",
            "Please report this with the versions of torch and transformers.",
        )


def _dense_weights() -> dict[str, Any]:
    """Return the option that keeps newer transformers from leaving the weights quantized."""
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _clear_quantization_marks(model: Any) -> None:
    """Remove the marks of a quantized model, with which `save_pretrained` rejects the dense weights."""
    model.hf_quantizer = None
    for mark in ("is_quantized", "quantization_method"):
        if hasattr(model, mark):
            setattr(model, mark, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _logits(model: Any, tokenizer: Any) -> Any:
    """Return float32 logits ``[n_token, n_vocabulary]`` of a short text."""
    import torch

    with torch.inference_mode():
        logits = model(**tokenizer(_PROBE, return_tensors="pt")).logits[0].float()
    if not torch.isfinite(logits).all():
        raise ArteError(f"The weights of {tokenizer.name_or_path} give logits that are not finite")
    return logits


def _restore_pre_tokenizer(tokenizer: Any, header: GgufHeader) -> None:
    """Restore what transformers drops of ``tokenizer.ggml.pre``: SmolLM's split of numbers into digits."""
    from tokenizers import pre_tokenizers

    if header.metadata.get("tokenizer.ggml.pre") != "smollm":
        return
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])


def check_tokenizer(tokenizer: Any, header: GgufHeader) -> None:
    """Raise unless `tokenizer` and llama.cpp tokenize every probe in the same way.

    Raises:
        ArteError: they differ; shows the text.
    """
    from llama_cpp import Llama

    runtime = Llama(str(header.path), vocab_only=True, verbose=False)
    try:
        for text in PROBES:
            ours = tokenizer(text)["input_ids"]
            theirs = runtime.tokenize(text.encode("utf-8"), add_bos=True, special=True)
            if ours != theirs:
                raise ArteError(
                    f"{header.path}: transformers and llama.cpp tokenize {text!r} differently",
                    "Training would teach tokens the device never reads. Give the original checkpoint.",
                )
    finally:
        runtime.close()


def main(argv: list[str]) -> int:
    """Unpack the GGUF ``argv[0]`` into the folder ``argv[1]``; return the exit code of the error."""
    # Whatever the libraries print to stdout goes to stderr: only our messages reach the parent.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def report(**line: str) -> None:
        print(json.dumps(line), file=lines, flush=True)

    try:
        _unpack(read_model_header(Path(argv[0])), Path(argv[1]), lambda step: report(step=step))
    except ArteError as error:
        report(error=error.message, hint=error.hint)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
