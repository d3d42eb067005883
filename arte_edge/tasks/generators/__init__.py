"""Seeded generators of the shipped tasks' data, which `arte_edge.tasks.scaffold` writes."""
