"""Seeded generators of the shipped tasks' data; `arte_edge.tasks.generate` writes what they make."""
