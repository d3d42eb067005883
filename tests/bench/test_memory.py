from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from arte_edge.bench.memory import mapped_bytes, peak_rss_bytes

linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
MB = 1 << 20


def test_the_peak_stays_after_the_memory_is_given_back() -> None:
    before = peak_rss_bytes()
    assert before > 5 * MB
    block = bytearray(before + 32 * MB)  # more than ever was there: a peak that does not move tells nothing
    block[::4096] = b"x" * len(block[::4096])
    peak = peak_rss_bytes()
    assert peak >= len(block)
    del block
    assert peak_rss_bytes() >= peak - MB


def test_without_proc_the_system_call_says_about_the_same(tmp_path: Path) -> None:
    assert 0.5 < peak_rss_bytes(tmp_path) / peak_rss_bytes() < 2


@linux
def test_a_child_does_not_inherit_the_peak_of_its_parent() -> None:
    code = "from arte_edge.bench.memory import peak_rss_bytes; print(peak_rss_bytes())"
    block = bytearray(200 * MB)
    block[::4096] = b"x" * len(block[::4096])
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(child.stdout) < 150 * MB < peak_rss_bytes()


@linux
def test_only_the_pages_of_the_models_files_that_were_read_count(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    model, other = folder / "model file.gguf", tmp_path / "other.bin"
    for path in (model, other):
        path.write_bytes(b"w" * 8 * MB)
    assert mapped_bytes([model]) == 0
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) > 0
        assert mapped_bytes([model]) == 8 * MB
        assert mapped_bytes([folder]) == 8 * MB  # a folder stands for its files
        assert mapped_bytes([other]) == 0
        (tmp_path / "link.gguf").symlink_to(model)
        assert mapped_bytes([tmp_path / "link.gguf"]) == 8 * MB


def test_a_system_without_smaps_does_not_tell(tmp_path: Path) -> None:
    assert mapped_bytes([tmp_path], proc=tmp_path) is None
