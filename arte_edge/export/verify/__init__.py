"""Prove that an exported file is still the model it was made from, or refuse it."""

from __future__ import annotations

from arte_edge.export.verify.gate import Check, Thresholds, Verdict, verify, verify_file
from arte_edge.export.verify.opened import Opened, open_model
from arte_edge.export.verify.thresholds import thresholds_for

__all__ = [
    "Check",
    "Opened",
    "Thresholds",
    "Verdict",
    "open_model",
    "thresholds_for",
    "verify",
    "verify_file",
]
