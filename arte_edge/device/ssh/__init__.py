"""Devices over ssh: connect, upload, prepare an environment, run jobs detached from the connection."""
