"""One interface to every runtime that can run a model, used by distillation, verification and benchmarks."""
