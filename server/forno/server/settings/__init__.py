"""Where settings come from: a YAML file, then the environment, then the command line; the later wins.

    forno.yaml         server: {drain_s: 5}       documents.py reads it, and remembers the lines
    the environment    FORNO_SERVER__DRAIN_S=5    overrides.py finds what each name means
    the command line   --set server.drain_s=5     overrides.py
            |
            v
    one tree of plain values, and the place of each
            |
            v
    Config, or a ConfigError with one line a fault (complaints.py)

`reference.py` is the other direction: from the settings to the text of `forno help settings`.
"""

from __future__ import annotations

from forno.server.settings.loading import load, load_model
from forno.server.settings.overrides import Override, parse_set

__all__ = ["Override", "load", "load_model", "parse_set"]
