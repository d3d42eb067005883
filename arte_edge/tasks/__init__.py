"""Tasks: what a student is to learn, where its examples come from, and when an answer is right."""
