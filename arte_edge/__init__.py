"""arte-edge: make a small language model good at your task and prove it on your device."""

from __future__ import annotations

__all__ = ["__version__"]
__version__ = "0.1.0"
