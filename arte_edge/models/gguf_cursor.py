"""Read a mapped GGUF file value by value and never past its end: what every reader of a head shares.

GGML's own reader trusts every length that it reads; here each is checked against the size of the
file before it is used. Little-endian; ggml/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from typing import Any

__all__ = ["ARRAY", "SCALARS", "STRING", "CutShort", "GgufCursor"]

# value type number -> struct code of one scalar; 8 is a string, 9 an array
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class CutShort(ValueError):
    """The file ends before what its head promises."""

    def __init__(self) -> None:
        super().__init__("it is cut short")


class GgufCursor:
    """A place in a mapped file; every read moves it on, or raises `CutShort`."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def skip(self, size_bytes: int) -> int:
        """Move on by `size_bytes`; return where that began."""
        start = self.at
        if size_bytes > len(self.data) - start:
            raise CutShort
        self.at = start + size_bytes
        return start

    def take(self, size_bytes: int) -> bytes:
        start = self.skip(size_bytes)
        return self.data[start : self.at]

    def scalar(self, code: str) -> Any:
        """Return one value of a struct code, as in `SCALARS`."""
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code)))[0]

    def raw_text(self) -> bytes:
        """Return a string's bytes as they stand in the file."""
        return self.take(self.scalar("Q"))

    def text(self) -> str:
        return self.raw_text().decode("utf-8", errors="replace")
