"""A machine to measure on."""

import pytest

from arte_edge.results.rows import DeviceFacts


@pytest.fixture(scope="session")
def this_device() -> DeviceFacts:
    return DeviceFacts(fingerprint="0" * 16, cpu="test", arch="x86_64", cores=1, memory_bytes=1 << 32)
