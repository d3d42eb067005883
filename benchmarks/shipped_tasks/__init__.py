"""Seeded generators of the shipped tasks' data, which ``python -m shipped_tasks`` writes."""
