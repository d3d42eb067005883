"""Reading protocol buffers without a package: the fields of one message, as places in its bytes.

A field is ``number << 3 | wire type`` and a value: a varint, eight or four bytes, or a length and so many bytes
(https://protobuf.dev/programming-guides/encoding). Values are skipped over, so a file of gigabytes that is mapped
into memory is read in milliseconds.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def fields(data: bytes | mmap.mmap, at: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Yield ``(field number, start, end)`` of the values between `at` and `end`; a varint's are its bytes.

    Raises:
        ValueError, IndexError: the message is damaged or cut short.
    """
    end = len(data) if end is None else end
    while at < end:
        key, at = varint(data, at)
        wire = key & 7
        start = at
        if wire == _BYTES:
            size, start = varint(data, at)
            at = start + size
        elif wire == _VARINT:
            _, at = varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at > end:
            raise ValueError("cut short")
        yield key >> 3, start, at


def varint(data: bytes | mmap.mmap, at: int) -> tuple[int, int]:
    """Return the number that begins at `at`, and the place after it.

    Raises:
        ValueError, IndexError: it has no end.
    """
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number without an end")
