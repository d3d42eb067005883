"""The alignment of a scripted teacher, its training replaced: the probe, the stage's line, damaged results."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import Patch

from arte_edge.distill.stages import align as module
from arte_edge.distill.stages.align import align
from arte_edge.distill.stages.calibrate import calibrate
from arte_edge.distill.stages.elicit import elicit
from arte_edge.distill.stages.prefer import prefer
from arte_edge.distill.train.collapse import ProbeResult
from arte_edge.distill.train.dpo import DpoResult


@pytest.fixture
def aligned(house: Any, monkeypatch: Patch) -> Any:
    """Run elicit to align with a training that probes once; return what the probe found, the summary and the run."""
    found: list[ProbeResult] = []

    def train(
        base: Path, pairs: list[Any], out: Path, settings: Any, *, probe: Any, progress: Any
    ) -> DpoResult:
        found.append(probe(out))
        progress(1, 1)
        return DpoResult(out, 1, 1, "", len(pairs), 0, 0.0, ({"rewards/margins": 0.007},), ())

    def write(adapter: Path, base: Path, out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(b"adapter")

    monkeypatch.setattr(module, "train_dpo", train)
    monkeypatch.setattr(module, "open_local", lambda *_, **__: house.teacher)
    monkeypatch.setattr("arte_edge.gguf.from_base.adapter_to_gguf", write)

    def start() -> tuple[list[ProbeResult], Any, Any]:
        run = house.run(align={"min_gap": 0.0})
        elicit(run)
        calibrate(run)
        prefer(run)
        result = align(run)
        run.close()
        return found, result, run

    return start


@pytest.mark.parametrize("n_seed", [1, 2, 8])
def test_the_probe_shows_the_seeds_that_there_are(house: Any, aligned: Any, n_seed: int) -> None:
    house.task = replace(house.task, seed=house.task.seed[:n_seed])
    found, (summary, adapter), run = aligned()
    assert found == [ProbeResult(valid_rate=1.0, mean_tokens=7.0)]
    assert adapter[0].read_bytes() == b"adapter" and adapter[1] == summary["adapter_sha256"]
    assert run.config.elicit.shown == 3


def test_the_line_of_an_alignment_that_learned_nothing_says_so(aligned: Any) -> None:
    summary = aligned()[1][0]
    assert summary["margin"] == 0.007
    assert "50.2% (untrained: 50 %)" in module._describe(summary)


@pytest.mark.parametrize("damage", ["[1]", '{"inputs": 3}', "[" * 5000, "no summary", "no margin", "a text"])
def test_a_damaged_manifest_is_made_again(house: Any, aligned: Any, damage: str) -> None:
    found, result, _ = aligned()
    path = house.folder / "align" / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    if damage == "no summary":
        del manifest["summary"]
    elif damage == "no margin":
        del manifest["summary"]["margin"]
    elif damage == "a text":
        manifest["summary"]["margin"] = "much"
    path.write_text(damage if damage[0] in "[{" else json.dumps(manifest), "utf-8")
    assert aligned()[1] == result and len(found) == 2
    assert json.loads(path.read_text("utf-8"))["summary"] == result[0]
