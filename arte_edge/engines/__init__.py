"""Engines: what completes prompts, by llama.cpp, transformers or an OpenAI-compatible server."""
