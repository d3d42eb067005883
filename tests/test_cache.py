from arte_edge.cache import megabytes


def test_sizes_are_short() -> None:
    sizes = (1_250_000_000, 105_455_648, 100_000, 12_300, 12)
    assert [megabytes(size) for size in sizes] == ["1.25 GB", "105.5 MB", "0.1 MB", "12.3 kB", "12 B"]
