"""The metadata keys by which a call says who makes it. Kept light: whoever starts Envoy needs them too."""

from __future__ import annotations

AUTHORIZATION, API_KEY, FORWARDED_CERTIFICATE = "authorization", "x-api-key", "x-forwarded-client-cert"
CERTIFICATE, PEER, DOOR = "certificate", "x-forno-peer", "x-forno-door"
CALLERS_KEYS = frozenset((AUTHORIZATION, API_KEY))
"""Metadata keys by which callers say who they are."""

EDGE_KEYS = CALLERS_KEYS | {FORWARDED_CERTIFICATE, PEER, DOOR}
"""Those and the ones by which our own Envoy says who they are; what callers send of them counts nowhere.
CERTIFICATE is no metadata key: a transport that sees certificates itself gives it, in PEM, beside the metadata."""

ADMIN = "admin"
"""The value of DOOR for what came in at `security.admin_address`."""
