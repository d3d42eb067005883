"""Verification: proves that an exported file still is the student, or says why it is not."""
