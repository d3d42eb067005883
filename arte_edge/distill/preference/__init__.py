"""What the student learns best from: scores of drafts, adaptive scoring, pairs for DPO."""
