"""Servicers: one file a protocol. Each decodes, submits, awaits and encodes; `status.py` has the errors."""
