"""Turn a GGUF file into a safetensors checkpoint, once, and cache it.

Training needs weights that torch can read, and transformers takes half a minute and more to unpack a GGUF. The folder
appears only when it is complete, has been loaded again, and was held against llama.cpp on the file itself: the same
tokens and the same predictions. What transformers' reader ignores silently makes another model: the pre-tokenizer
(``tokenizer.ggml.pre``) and the rotary scaling are restored here, and whatever else it may miss is an error.
``origin.json`` in the folder has the comparison.

A child process does it, ``python -P -m arte_edge.gguf.to_hf GGUF OUT``, so that running out of memory ends the child
and not the run, all of its memory is returned, and the output of the libraries does not mix with our progress. It
reports to its parent in JSON lines: ``{"step": …}``, or ``{"error": …, "hint": …}``. Its input stays open while the
parent lives: when it closes, also because the parent was killed, the child ends.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from heapq import __about__ as PROSE  # an essay: rotary scaling shows after some hundred tokens
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
from arte_edge.frozen_weights import load_frozen
from arte_edge.gguf import rope
from arte_edge.gguf.reader import FULL_WIDTH, GgufHeader, read_model_header
from arte_edge.machine import thread_count

# Part of the folder's name: raised when the conversion changes, so that old results are not reused.
VERSION = 2
# Texts like prompts, with what tokenizers get wrong: digits, spaces, quotes, newlines, other scripts.
PROBES = (
    "There are 1234567 apples, 12 pears and 3.14159 pies on 2024-05-06.",
    "Hello  world\n\n\tI'm   here, you'll see; DON'T.",
    "not ( True ) and ( False ) is<ans>True</ans>",
    "<Question_4><input>x=12;y=[1,2,3]\n    return 007</input>",
    "Ünïcödé, 日本語テキスト, مرحبا, 🙂 ½ ²",
    "a\r\nb and some more  ",
)
_HELD_TOKENS = 384
# Limits of mean KL divergence (nats) and of the share of equal most likely tokens, by the width of the weights.
# llama.cpp rounds activations to 8 bits before a product with quantized weights, transformers does not, and
# bfloat16 is coarser than F32: random models lose 1e-3 to 4e-3 nats to the first and 1e-5 to the second.
_WIDE_LIMITS, _QUANTIZED_LIMITS = (0.003, 0.95), (0.02, 0.85)


def checkpoint_folder(name: str, sha256: str) -> Path:
    """Return the cache folder for the checkpoint of a GGUF with this checksum; it need not exist."""
    return cache_dir() / "checkpoints" / f"{slug(name)}-{sha256[:16]}-v{VERSION}"


def to_checkpoint(name: str, gguf: Path, sha256: str, progress: Progress | None = None) -> Path:
    """Return the safetensors checkpoint of `gguf`, bfloat16 or from F16 float16, converting it if that was never done.

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
                held = _run_child(gguf, staging, what, progress)
                origin = {"gguf": gguf.name, "sha256": sha256, "quantization": header.quantization, "held": held}
                (staging / "origin.json").write_text(json.dumps(origin, indent=1) + "\n", "utf-8")
                staging.chmod(0o755)  # mkdtemp's folder would be closed to other users of a shared cache
                rename_into_place(staging, final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return final


def _run_child(gguf: Path, out: Path, what: str, progress: Progress | None) -> dict[str, float]:
    """Run this module; pass its steps to `progress`, its errors to the caller, and return its comparison."""
    command = [sys.executable, "-P", "-m", "arte_edge.gguf.to_hf", str(gguf.absolute()), str(out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    failure: dict[str, str] = {}
    held: dict[str, float] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": output}
        child = subprocess.Popen(command, **pipes, text=True, env=environment)
        try:
            for line in child.stdout or ():
                message = json.loads(line)
                if progress and "step" in message:
                    progress(message["step"], 0, 0)
                failure = message if "error" in message else failure
                held = message.get("held", held)
        finally:
            if child.poll() is None and sys.exc_info()[0] is not None:
                child.kill()
            code = child.wait()
            if child.stdin:
                child.stdin.close()
        output.seek(0)
        printed = output.read()
    if code == 0:
        return held
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


def _unpack(header: GgufHeader, out: Path, report: Callable[[str], None]) -> dict[str, float]:
    """Write the tokenizer and the 16-bit weights of a GGUF to `out`, load both again and compare with llama.cpp."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, file = header.path.parent, header.path.name
    scaling = rope.restored(header)
    dtype = torch.float16 if {t.type for t in header.tensors.values()} <= {"F16", "F32"} else torch.bfloat16
    report("reading the tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        _restore_pre_tokenizer(tokenizer, header)
        tokenizer.chat_template = tokenizer.chat_template or header.chat_template
        tokenizer.save_pretrained(out)
        report("reading the weights")
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=dtype, **_dense_weights())
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"{header.path}: transformers cannot read a '{header.architecture}' GGUF ({error})",
            "Give the original checkpoint (a folder or its Hub id) instead.",
        ) from error
    _clear_quantization_marks(model)
    _set_scaling(model.config, scaling)
    ends = [header.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    if len(known := [end for end in dict.fromkeys(ends) if isinstance(end, int)]) > 1:
        model.generation_config.eos_token_id = known
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
    ids = again(PROSE + "\n".join(PROBES))["input_ids"][: min(_HELD_TOKENS, header.context_tokens or _HELD_TOKENS)]
    return _hold(header, out, ids)


def _set_scaling(config: Any, scaling: dict[str, Any]) -> None:
    """Give a model's settings the rotary scaling of its GGUF; in a nested table it is that of full attention."""
    if not scaling:
        return
    table = dict(getattr(config, "rope_parameters", None) or {})
    if "full_attention" in table:
        table["full_attention"] = {**table["full_attention"], **scaling}
    else:
        table |= scaling
    config.rope_parameters = table
    original = "original_max_position_embeddings"
    if original in scaling and hasattr(config, original):  # of Phi; it has priority
        setattr(config, original, scaling[original])


def _hold(header: GgufHeader, checkpoint: Path, ids: list[int]) -> dict[str, float]:
    """Compare the next-token distributions of a checkpoint with llama.cpp's on the GGUF it was made from."""
    import torch

    model = load_frozen(checkpoint)
    with torch.inference_mode():
        ours = model(torch.tensor([ids])).logits[0]
    del model
    theirs = torch.from_numpy(_llama_cpp_logits(header, ids))
    width = min(ours.shape[1], theirs.shape[1])
    log_p, log_q = (logits[:, :width].double().log_softmax(-1) for logits in (theirs, ours))
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    top1 = float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    most, least = unpacked_limits(header)
    if not (kl <= most and top1 >= least):
        raise ArteError(
            f"{header.path}: what transformers reads is another model: on {len(ids)} tokens it differs from "
            f"llama.cpp by {kl:.3g} nats a token (limit {most}), and the most likely token is the same at {top1:.1%} "
            f"(limit {least:.0%})",
            "Give the original checkpoint (a folder or its Hub id) instead.",
        )
    return {"tokens": len(ids), "kl_mean": kl, "top1": top1}


def unpacked_limits(header: GgufHeader) -> tuple[float, float]:
    """Return how far what is made of a GGUF may be from llama.cpp on it: mean KL (nats), share of equal top tokens."""
    quantized = any(tensor.type not in FULL_WIDTH for tensor in header.tensors.values())
    return _QUANTIZED_LIMITS if quantized else _WIDE_LIMITS


def _llama_cpp_logits(header: GgufHeader, ids: list[int]) -> Any:
    from llama_cpp import Llama

    runtime = Llama(str(header.path), n_ctx=len(ids), logits_all=True, verbose=False, n_threads=thread_count(None))
    try:
        runtime.eval(ids)
        return runtime.scores[: len(ids)].copy()
    finally:
        runtime.close()


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

    Raises ArteError: they differ; shows the text.
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


def _exit_with_parent() -> None:
    # Not sys.stdin: a thread that holds its lock is fatal when the interpreter exits.
    while os.read(0, 4096):
        pass
    os._exit(130)


def main(argv: list[str]) -> int:
    """Unpack the GGUF ``argv[0]`` into the folder ``argv[1]``; return the exit code of the error."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # Whatever the libraries print to stdout goes to stderr: only our messages reach the parent.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def report(**line: Any) -> None:
        print(json.dumps(line), file=lines, flush=True)

    try:
        held = _unpack(read_model_header(Path(argv[0])), Path(argv[1]), lambda step: report(step=step))
        report(held=held)
    except ArteError as error:
        report(error=error.message, hint=error.hint)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
