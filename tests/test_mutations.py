"""A thousandth of the mutated inputs of ``benchmarks/mutations.py``: every reader of users' files, a new seed never."""

from pathlib import Path

import pytest
from mutations import READERS, Reader, faults

N_INPUT = 100 // len(READERS) + 1


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name.replace(" ", "-"))
def test_a_mutated_file_is_read_or_refused(reader: Reader, tmp_path: Path) -> None:
    assert [fault for fault in faults(reader, N_INPUT, 0, tmp_path) if fault] == []


def test_a_reader_that_raises_is_found(tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        int((folder / "x.json").read_text("utf-8", errors="replace"))

    reader = Reader("numbers", lambda folder: (folder / "x.json").write_text("12345"), "x.json", read)
    found = [fault for fault in faults(reader, 40, 0, tmp_path) if fault]
    assert found and all(fault.what.startswith("ValueError") for fault in found)
