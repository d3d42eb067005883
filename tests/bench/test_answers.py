"""Right answers are measured in a child too: what it says comes back as a row, what it cannot do as well."""

from __future__ import annotations

from pathlib import Path

import pytest

from arte_edge.bench.answers import run_quality
from arte_edge.errors import InputError
from arte_edge.models.resolve import LocalModel
from arte_edge.results.rows import DeviceFacts, QualityRow


class Quiet:
    def progress(self, text: str) -> None: ...


def test_a_model_that_cannot_answer_is_a_row_with_a_reason(this_device: DeviceFacts) -> None:
    seen: list[QualityRow] = []
    (row,) = run_quality(
        [Path("null")], "home_intents", threads=1, device=this_device, reporter=Quiet(), on_row=seen.append
    )
    assert seen == [row]
    assert row.status in ("refused", "crashed") and row.reason
    assert (row.n, row.right, row.task) == (0, 0, "home_intents")


def test_an_unknown_task_is_refused_before_anything_is_opened(this_device: DeviceFacts) -> None:
    with pytest.raises(InputError, match="home_intens"):
        run_quality(
            [Path("null")], "home_intens", threads=1, device=this_device, reporter=Quiet(), on_row=print
        )


@pytest.mark.model
def test_smollm2_answers_and_the_row_says_that_it_is_partial(
    smollm2: LocalModel, this_device: DeviceFacts
) -> None:
    assert smollm2.gguf is not None
    (row,) = run_quality(
        [smollm2.gguf],
        "home_intents",
        split="validation",
        limit=2,
        threads=1,
        device=this_device,
        reporter=Quiet(),
        on_row=lambda row: None,
    )
    assert row.status == "ok", row.reason
    assert (row.n, row.partial, row.split, len(row.answers)) == (2, True, "validation", 2)
    assert row.sha256 and row.tensor_sha256 and row.n_threads == 1
    assert row.answer_seconds_p50 and row.answer_seconds_p50 > 0
