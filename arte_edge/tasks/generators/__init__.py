"""Seeded generators of the shipped tasks' data; `arte_edge.tasks.scaffold` writes what they make."""
