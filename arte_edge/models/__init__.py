"""Models: names, places and identities. `resolve` is the way in; everything else serves it."""

from __future__ import annotations

from arte_edge.models.resolve import LocalModel, resolve

__all__ = ["LocalModel", "resolve"]
