"""`forno help settings`: every setting, what it takes, its default and what it does."""

from __future__ import annotations

import textwrap

_INTRODUCTION = """\
Settings stand in a forno.yaml, in a model.yaml beside a model (those below models.NAME), in the environment,
or on the command line; the later wins. All have defaults.

  forno.yaml            server: {drain_s: 5}
  environment           FORNO_SERVER__DRAIN_S=5      (nested by two underscores)
  command line          --set server.drain_s=5"""
_WIDTH = 100


def text() -> str:
    """The reference as text for a terminal."""
    from forno.server.settings.reference import entries  # noqa: PLC0415  (brings pydantic)

    lines = [_INTRODUCTION]
    section = ""
    for entry in entries():
        top = entry.path.partition(".")[0]
        lines += ["", *([top.upper(), ""] if top != section else [])]
        section = top
        lines.append(f"  {entry.path} = {entry.default}")
        lines.append(f"      takes {entry.expected}")
        lines += textwrap.wrap(entry.text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
