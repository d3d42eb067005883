"""Verification: compare an exported file with the 16-bit student."""
