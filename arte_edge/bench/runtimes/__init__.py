"""What runs a model under the clock: one file a runtime, all behind `arte_edge.bench.runtime.SpeedModel`."""

from __future__ import annotations

from arte_edge.bench.runtimes.open import open_speed_model, warm_import

__all__ = ["open_speed_model", "warm_import"]
