"""Models: references, registry, downloads, checksums. `resolve` turns any reference into a local model."""

from __future__ import annotations

from arte_edge.models.resolve import LocalModel, resolve

__all__ = ["LocalModel", "resolve"]
