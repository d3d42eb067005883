"""What lies beside the exported files: the tokenizer, byte for byte the base's, and Ollama's Modelfile."""

from __future__ import annotations

from pathlib import Path

from arte_edge.cache import sha256_file
from arte_edge.export.modelfile import modelfile
from arte_edge.export.source import Source
from arte_edge.onnx.folder import TOKENIZER_FILES
from arte_edge.results.student_json import FileSum, Tokenizer
from arte_edge.store import write_atomic

__all__ = ["FOLDER", "MODELFILE", "write_modelfile", "write_tokenizer"]

FOLDER = "tokenizer"
MODELFILE = "Modelfile"


def write_tokenizer(out: Path, checkpoint: Path, template_sha256: str) -> Tokenizer:
    """Copy the checkpoint's tokenizer files to ``out/tokenizer``, each whole or not at all.

    Files that an earlier export left there and the checkpoint does not have are removed.
    """
    names = [name for name in TOKENIZER_FILES if (checkpoint / name).is_file()]
    for name in names:
        write_atomic(out / FOLDER / name, (checkpoint / name).read_bytes())
    for name in set(TOKENIZER_FILES) - set(names):
        (out / FOLDER / name).unlink(missing_ok=True)
    sums = (
        FileSum(
            file=f"{FOLDER}/{name}",
            size_bytes=(out / FOLDER / name).stat().st_size,
            sha256=sha256_file(out / FOLDER / name),
        )
        for name in names
    )
    return Tokenizer(files=tuple(sums), chat_template_sha256=template_sha256)


def write_modelfile(out: Path, ggufs: list[str], source: Source) -> Path | None:
    """Write the Modelfile for accepted GGUF files, of which the first is used; none: no Modelfile.

    A tailored student answers greedily, as it was measured.

    Raises:
        InputError: its template or system message cannot be quoted.
    """
    path = out / MODELFILE
    if not ggufs:
        path.unlink(missing_ok=True)
        return None
    sampling = {"temperature": 0.0} if source.asking else None
    text = modelfile(ggufs, source.chat, asking=source.asking, plain=source.plain, sampling=sampling)
    write_atomic(path, text.encode())
    return path
