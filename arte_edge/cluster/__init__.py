"""Calls to local models spread over the machines of a Ray cluster."""
