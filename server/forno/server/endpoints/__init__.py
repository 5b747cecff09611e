"""Endpoints: public names over models, and the codecs between JSON-friendly values and tensors.

    Payload -> reader -> arrays -> the model's queue and run -> outputs -> writer -> Reply

`payload.py` has what passes through, `endpoint.py` the way, `calls.py` its middle, `settings.py` what can be
set; `text.py`, `image.py`, `label.py` and `plain.py` are the codecs. `json_*.py` read and write JSON tensors, for
the codec `tensors` and for the REST side of models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forno.server.endpoints.calls import call
from forno.server.endpoints.payload import Payload, Reply

if TYPE_CHECKING:
    from forno.server.config import Config
    from forno.server.endpoints.endpoint import Endpoint
    from forno.server.registry import Registry

__all__ = ["Payload", "Reply", "build", "call"]


def build(config: Config, registry: Registry) -> dict[str, Endpoint]:
    """The endpoints that the configuration names, by name.

    Raises:
        ConfigError: One is wrong; says which, and what.
    """
    if not config.endpoints:
        return {}
    from forno.server.endpoints import endpoint  # noqa: PLC0415  (a tenth of a second, for pydantic)

    return endpoint.build(config, registry)
