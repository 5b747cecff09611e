"""The first Python that runs inside Envoy: prepares for a quick start, then imports the rest."""

from __future__ import annotations

import gc


def main(argument: str) -> None:
    """Runs a server until it is told to stop. Called by the native module.

    Args:
        argument: The descriptor of the socket pair; see `inside.py`.
    """
    gc.disable()  # what is imported stays; `Server` enables it once that is frozen
    from forno.server.transport.envoy import inside  # noqa: PLC0415  (heavy)

    inside.main(int(argument))
