"""What was measured on one file of a student: right answers, and speed on each device. Part of ``student.json``.

A speed entry is one file on one device with one runtime and number of threads. It holds every
test that was run there, and above them the figures that people ask for, taken from the tests: the
sound ones where there are any, else those of a device that had throttled, and marked so.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Accuracy", "Evaluation", "Section", "Speed", "SpeedTest"]


class Section(BaseModel):
    """A part of ``student.json``: frozen, and closed to keys that nobody declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Accuracy(Section):
    """Right answers of one file on held-out examples of the task."""

    task: str = Field(default="", description="name of the task; a run's is the one it was tuned for")
    split: str = Field(description="which examples: validation")
    n: int = Field(ge=1)
    right: int = Field(ge=0)
    accuracy: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1, description="95 % Wilson interval")
    high: float = Field(ge=0, le=1)
    difference: float | None = Field(default=None, description="paired, file minus student")
    difference_low: float | None = None
    difference_high: float | None = None
    p_value: float | None = Field(default=None, description="exact McNemar test of the pairs")


class Evaluation(Accuracy):
    """An accuracy that `arte-edge bench` measured on a device, with the file that runs there."""

    device: str = Field(description="name of the device's profile or its fingerprint")
    fingerprint: str = Field(default="", description="of the device, over what does not change between runs")
    runtime: str = ""
    threads: int = Field(ge=1)
    partial: bool = Field(default=False, description="not all of the split, for trying out only")
    task_sha256: str = ""
    reference: str = Field(default="", description="what the difference is paired with")
    reference_right: int | None = None
    answer_seconds_p50: float | None = Field(default=None, description="from the prompt to the last token")
    answer_seconds_p95: float | None = None
    test_time: str = Field(default="", description="when it was measured, ISO 8601, UTC")


class SpeedTest(Section):
    """One test of one file, as `llama-bench` names them: pp512 reads 512 tokens, tg128 writes 128."""

    test: str
    n_prompt: int = Field(ge=0)
    n_gen: int = Field(ge=0)
    status: Literal["ok", "crashed", "out-of-memory", "timeout", "refused"] = "ok"
    reason: str = Field(default="", description="why it is not ok")
    test_time: str = Field(default="", description="when it was measured, ISO 8601, UTC")
    n_samples: int = Field(default=0, ge=0, description="repetitions that count")
    tokens_per_s: float | None = Field(default=None, description="median of the repetitions")
    cv_ratio: float | None = Field(default=None, description="standard deviation over mean of them")
    sustained_tokens_per_s: float | None = Field(default=None, description="rate of the test's last third")
    load_ms: float | None = None
    ttft_ms: float | None = None
    itl_p50_ms: float | None = None
    itl_p95_ms: float | None = None
    peak_rss_bytes: int | None = None
    temperature_c_max: float | None = None
    throttled: bool | None = Field(default=None, description="null: the device does not tell")
    energy_j: float | None = Field(default=None, description="of the repetitions that count, as measured")
    energy_source: str = ""


class Speed(Section):
    """Speed of one file on one device. Written by `arte-edge bench`; empty after an export."""

    device: str = Field(description="name of the device's profile or its fingerprint")
    runtime: str = Field(description="runtime, version and build")
    threads: int = Field(ge=1)
    ttft_ms: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    itl_p50_ms: float | None = None
    itl_p95_ms: float | None = None
    peak_rss_bytes: int | None = None
    temperature_c_max: float | None = None
    throttled: bool | None = None
    energy_j: float | None = None
    fingerprint: str = Field(default="", description="of the device, over what does not change between runs")
    profile: str = Field(default="", description="name of the device's profile; empty: none fits")
    cpu: str = Field(default="", description="the processor as its maker calls it")
    n_depth: int = Field(default=0, ge=0, description="tokens in the cache before a test begins")
    tests: tuple[SpeedTest, ...] = Field(default=(), description="what the figures above are taken from")

    @property
    def measured(self) -> bool:
        """Some rate is known; false where every test failed."""
        return self.decode_tokens_per_s is not None or self.prefill_tokens_per_s is not None

    @property
    def date(self) -> str:
        """Return the day of the newest test, empty if not known."""
        return max((test.test_time[:10] for test in self.tests), default="")
