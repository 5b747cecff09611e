"""Servicers inside Envoy: its configuration, its supervision, and the host that runs in it."""
