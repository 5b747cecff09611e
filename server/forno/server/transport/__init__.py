"""How bytes arrive: gRPC inside Envoy (`envoy/`), or on its own (`aio.py`)."""
