"""Devices: what they are, what fits on them, how fast they should be, and how to reach them."""
