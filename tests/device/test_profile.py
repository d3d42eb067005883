"""Profiles: what ships is whole and sourced, and what is wrong with a file is said with file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from arte_edge import catalog
from arte_edge.device.profile import Profile, load_profile, read_profile
from arte_edge.errors import InputError

NAMES = catalog.names("devices")
GOOD = 'title = "Board"\ncores = 4\nmemory_bytes = [4000000000]\n'


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_fact_has_a_source_and_figures_that_can_be_true(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name and profile.remote is None
    assert {"cores", "features", "memory_bytes", "system_bytes"} <= set(profile.sources)
    assert set(profile.sources) <= set(Profile.model_fields)
    peak, effective = profile.peak_bandwidth, profile.effective_bandwidth
    assert peak is not None and 1e9 < peak.value < 1e12
    assert effective is None or 0.1 * peak.value < effective.value < 0.9 * peak.value
    assert profile.system_bytes < profile.memory_bytes[0]
    assert profile.throttle_c is None or 60 <= profile.throttle_c.value <= 110
    assert profile.power_w is None or 1 <= profile.power_w.value <= 200
    for fact in profile.facts().values():
        says_so = "assumed" in fact.source or "not looked up" in fact.source or fact.evidence != "measured"
        assert says_so, "nobody of us measured these boards"


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_of_a_profile_exists(name: str) -> None:
    assert load_profile(name).recipe in catalog.names("export")


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        (GOOD + "corse = 4\n", "unknown key 'corse'", "cores"),
        (
            GOOD + "[peak_bandwidth]\nvalue = 1.0\nevidence = 'measured'\nsuorce = 'abcd'\n",
            "suorce",
            "source",
        ),
        (GOOD + "[match]\nmodle = 'x'\n", "unknown key 'match.modle'", "model"),
        (GOOD + "[peak_bandwidth]\nvalue = 1.0\nevidence = 'hearsay'\nsource = 'abcd'\n", "evidence", ""),
        (GOOD + "[peak_bandwidth]\nvalue = 1.0\nevidence = 'published'\n", "peak_bandwidth.source", ""),
        (GOOD.replace("cores = 4", "cores = 0"), "cores", ""),
        (GOOD + "base = 'raspberry-pi-55'\n", "base", "raspberry-pi-5"),
        ("title = ", "not readable as TOML", ""),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path: Path, text: str, says: str, hint: str) -> None:
    path = tmp_path / "board.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_profile(path)
    assert str(path) in caught.value.message and says in caught.value.message
    assert hint in caught.value.hint
