"""GGUF files: reading, writing, conversion from and to transformers checkpoints, quantization."""
