"""What arithmetic expects of a file on a device that did not measure it: decode rate and memory.

From the file's own header and the device's profile; a file that is not beside ``student.json``
(they were sent away alone) gets no prediction.
"""

from __future__ import annotations

from pathlib import Path

from arte_edge.device.model_size import ModelShape
from arte_edge.device.profiles import Profile
from arte_edge.errors import InputError
from arte_edge.publish.recommend.measurements import Prediction, Predictor
from arte_edge.results.student_json import Artifact

__all__ = ["READS_FASTER", "predict_shape", "predictor"]

# Prompts are read faster than text is written. How much faster depends on kernels more than on
# memory, so no formula gives it; this is the least ratio published for a Raspberry Pi 5 (nyunai's
# edge-llm-leaderboard, stable-code-3b Q4_K_M, four threads: 10.8 to 5.56 tokens/s).
READS_FASTER = 1.9


def predictor(folder: Path, profile: Profile, context_tokens: int) -> Predictor:
    """Return what predicts the files in `folder` on the device, with `context_tokens` in the cache."""

    def predict(artifact: Artifact) -> Prediction | None:
        path = folder / artifact.file
        if not path.exists():
            return None
        try:
            shape = ModelShape.of(path)
        except InputError:  # a layout whose sizes we cannot read
            return None
        return predict_shape(shape, profile, context_tokens)

    return predict


def predict_shape(shape: ModelShape, profile: Profile, context_tokens: int) -> Prediction:
    """Return what is expected of a model of these sizes on the device."""
    from arte_edge.device.memory_estimate import fit
    from arte_edge.device.roofline import expected

    speed = expected(shape, profile, context_tokens)
    found = fit(shape, profile.memory_bytes[0], context_tokens)
    rate = speed.decode_tokens_per_s if speed else None
    return Prediction(
        rate,
        found.peak_bytes,  # what a measured peak will be beside
        speed.basis if speed else "sizes in the file's header",
        rate and rate * READS_FASTER,
        f"assumed to be {READS_FASTER} times the decode rate",
    )
