import sys
from pathlib import Path

import pytest
from tiny import Make

from arte_edge.errors import ArteError, InputError
from arte_edge.gguf.convert import convert_with_llama_cpp

# A stand-in for the script of a checkout, which would need minutes: it takes the same arguments.
SCRIPT = """
import argparse, pathlib, shutil, sys
parser = argparse.ArgumentParser()
parser.add_argument("model"); parser.add_argument("--outfile"); parser.add_argument("--outtype")
given = parser.parse_args()
{body}
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Make:
    """Make a checkout whose converter does what `body` says."""

    def make(body: str) -> Path:
        folder = tmp_path / "llama.cpp; touch x"
        folder.mkdir(exist_ok=True)
        (folder / "convert_hf_to_gguf.py").write_text(SCRIPT.format(body=body), "utf-8")
        return folder

    return make


def test_a_gguf_of_the_requested_type_is_kept(checkout: Make, make_gguf: Make, tmp_path: Path) -> None:
    made = make_gguf("made.gguf", general__file_type=1)
    folder = checkout(f"assert given.outtype == 'f16'; shutil.copy({str(made)!r}, given.outfile)")
    out = convert_with_llama_cpp(folder, tmp_path, tmp_path / "out dir" / "student.gguf")
    assert out.read_bytes() == made.read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["student.gguf"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("sys.exit('Model MambaForCausalLM is not supported')", "not supported"),
        ("import no_such_package_at_all", "no_such_package_at_all"),
        ("pass", "code 0"),
        ("pathlib.Path(given.outfile).write_bytes(b'GGUF nonsense')", "no usable GGUF"),
        ("shutil.copy(r'{q8}', given.outfile)", "instead of F16"),
    ],
)
def test_a_failed_converter_leaves_nothing(
    body: str, said: str, checkout: Make, make_gguf: Make, tmp_path: Path
) -> None:
    folder = checkout(body.replace("{q8}", str(make_gguf("q8.gguf"))))
    with pytest.raises(ArteError, match=said) as caught:
        convert_with_llama_cpp(folder, tmp_path, tmp_path / "out" / "student.gguf")
    assert list((tmp_path / "out").iterdir()) == []
    if "no_such_package" in said:
        assert "pip install -r" in caught.value.hint


def test_a_folder_without_a_converter_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="convert_hf_to_gguf"):
        convert_with_llama_cpp(tmp_path, tmp_path, tmp_path / "student.gguf")


def test_it_runs_with_this_python_and_without_the_network(checkout: Make, tmp_path: Path) -> None:
    folder = checkout("import os; sys.exit(sys.executable + os.environ['HF_HUB_OFFLINE'])")
    with pytest.raises(ArteError, match=f"{sys.executable}1"):
        convert_with_llama_cpp(folder, tmp_path, tmp_path / "student.gguf")
