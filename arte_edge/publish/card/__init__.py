"""The model card: front matter, body, and the update that keeps a person's edits."""
