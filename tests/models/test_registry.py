"""The registry: shipped entries are whole, a user's entries are read with every mistake named."""

import re
from pathlib import Path

import pytest
from tiny import Make

from arte_edge import catalog
from arte_edge.errors import InputError
from arte_edge.models import registry

_GOOD = """
[[model]]
name = "mine"
role = "student"
license = "MIT"
file = "mine.gguf"
size_bytes = 3
sha256 = "%s"
hub = { id = "me/mine" }
""" % ("0" * 64)


def _write(cache: Path, text: str) -> None:
    (cache / "models.toml").write_text(text)


def test_every_shipped_file_is_an_entry_with_two_sources(model_cache: Path) -> None:
    files = list(catalog.root("models").rglob("*.toml"))
    assert len(files) >= 4
    shipped = registry.entries()
    assert sorted(shipped) == sorted(path.stem for path in files)
    for entry in shipped.values():
        assert entry.hub and entry.mirror, entry.name
        assert len({part.package for part in entry.mirror.parts}) == len(entry.mirror.parts)
        assert entry.description and entry.license


def test_the_large_teacher_is_joined_in_the_order_of_its_parts(model_cache: Path) -> None:
    mirror = registry.entry("qwen2.5-coder-1.5b-instruct").mirror
    assert mirror is not None
    numbers = [re.findall(r"\d+", part.member)[-1] for part in mirror.parts]
    assert numbers == [f"{number:02}" for number in range(1, 23)]


def test_a_user_adds_a_model_and_replaces_a_shipped_one(model_cache: Path) -> None:
    _write(model_cache, _GOOD + _GOOD.replace('"mine"', '"gemma-3-270m"'))
    assert registry.entry("mine").hub == registry.Hub(id="me/mine")
    assert registry.entry("gemma-3-270m").license == "MIT"
    assert registry.entry("smollm2-135m-instruct").license == "Apache-2.0"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (_GOOD.replace("license", "licence"), "unknown key 'licence'", "license"),
        (
            _GOOD.replace('id = "me/mine"', 'id = "me/mine", revison = "x"'),
            "unknown key 'hub.revison'",
            "revision",
        ),
        (_GOOD + 'mirror = { version = "1", parts = [{ package = "p", membr = "x" }] }', "membr", "member"),
        (_GOOD.replace("0" * 64, "abc"), "mine: sha256", ""),
        (_GOOD.replace('hub = { id = "me/mine" }', ""), r"\[hub\], \[mirror\]", ""),
        (_GOOD.replace("mine.gguf", "../mine.gguf"), "mine: file", ""),
        (_GOOD.replace("size_bytes = 3", "size_bytes = 0"), "mine: size_bytes", ""),
        (_GOOD.replace("[[model]]", "[[modle]]"), "unknown key 'modle'", r"\[\[model\]\]"),
        (_GOOD.replace("[[model]]", "[model]"), "not a list", r"\[\[model\]\]"),
        ("this is = = not toml", "not TOML", ""),
    ],
)
def test_a_mistake_in_the_users_file_is_named_with_its_place(
    model_cache: Path, text: str, message: str, hint: str
) -> None:
    _write(model_cache, text)
    with pytest.raises(InputError, match=message) as caught:
        registry.entries()
    assert str(model_cache / "models.toml") in caught.value.message
    assert re.search(hint, caught.value.hint)


@pytest.mark.parametrize("package", ["--index-url=http://x", "-r", "a b", "git+https://x", "./local"])
def test_a_package_name_cannot_be_an_option_or_an_address_for_pip(
    model_cache: Path, package: str, register: Make
) -> None:
    register("mine", b"abc", packages=[package])
    with pytest.raises(InputError, match=r"parts\.0\.package"):
        registry.entries()
