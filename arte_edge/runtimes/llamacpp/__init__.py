"""GGUF files in llama.cpp."""
