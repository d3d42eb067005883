"""Where results go: ``student.json``, the model card, GGUF metadata, the Hub, a page to look at."""
