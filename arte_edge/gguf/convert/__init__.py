"""From a transformers checkpoint to a GGUF file."""
