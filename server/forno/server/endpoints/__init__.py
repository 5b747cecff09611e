"""Endpoints: public names over models, and the codecs between JSON-friendly values and tensors.

    Payload -> reader -> arrays -> the model's queue and run -> outputs -> writer -> Reply

`payload.py` has what passes through, `endpoint.py` the way, `settings.py` what can be set; `text.py`,
`image.py`, `label.py` and `plain.py` are the codecs. `json_*.py` read and write JSON tensors, for the codec
`tensors` and for the REST side of models.
"""

from __future__ import annotations

from forno.server.endpoints.endpoint import Endpoint, build, call
from forno.server.endpoints.payload import Payload, Reply

__all__ = ["Endpoint", "Payload", "Reply", "build", "call"]
