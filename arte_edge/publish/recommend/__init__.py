"""Which exported file to use on a device: constraints, measurements, Pareto front, choice."""
