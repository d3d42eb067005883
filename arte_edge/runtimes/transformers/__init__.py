"""Checkpoint folders in transformers."""
