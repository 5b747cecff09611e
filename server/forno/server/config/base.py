"""What all settings have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Numbers are strict, so that `true` is not 1 and a quoted "8" is not 8.
Rows = Annotated[int, Field(strict=True, ge=1, le=65536)]
Bytes = Annotated[int, Field(strict=True, ge=1024, le=2**31 - 1)]
PixelCount = Annotated[int, Field(strict=True, ge=1, le=1_000_000_000)]

MAX_PIXELS = 32_000_000
"""Of one image, where no setting says otherwise: 8000 x 4000."""


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused.

    The text below a field is its documentation: `forno help settings` reads it from the source, only when
    asked, because pydantic's own reading of it would cost every start 10 ms. Numbers become text where text
    is expected, so that a version may be written 3 as well as "3".
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)
