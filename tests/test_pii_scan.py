from pathlib import Path

from arte_edge.pii_scan import Machine, first_held


def test_texts_for_a_search_through_weights_are_too_long_to_occur_by_chance(tmp_path: Path) -> None:
    machine = Machine(frozenset({"ada"}), ("/home/ada", "/tmp"))
    texts = machine.private_paths(tmp_path)
    assert str(tmp_path) in texts and "/home/ada/" in texts
    assert min(map(len, texts)) > len("/tmp/")


def test_the_first_text_that_a_file_holds_is_returned(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(5000) + b"/home/ada/x" + bytes(5000))
    assert first_held(path, ["/home/bob/", "/home/ada/"]) == "/home/ada/"
    assert first_held(path, ["/home/bob/"]) == ""
    path.write_bytes(b"")
    assert first_held(path, ["/home/ada/"]) == ""
