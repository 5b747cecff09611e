"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# One budget a test is enough: pytest-timeout's. A slow machine must not fail a property.
settings.register_profile("forno", deadline=None)
settings.load_profile("forno")
