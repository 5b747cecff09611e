"""`forno keys`: makes, lists and removes the API keys of a keys file."""

from __future__ import annotations

import datetime as dt
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from forno.server.errors import ConfigError

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """\
Makes, lists and removes API keys. The file holds hashes alone: a key is shown once, when it is made. A running server
whose setting `security.keys_file` names the file notices within a second."""
EPILOG = """\
scopes:
  *                                    everything
  predict                              every model and endpoint
  predict:model/NAME                   one model; NAME may end in * and then stands for all that begin so
  predict:endpoint/NAME                one endpoint
  health, metrics, reflection, admin   the pages and methods of that kind

examples:
  forno keys add --file keys.yaml --name web --scope predict:model/spam --expires-days 90
  forno keys list --file keys.yaml
  forno keys remove web --file keys.yaml"""
_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("action", choices=("add", "list", "remove"), help="what to do")
    parser.add_argument("which", nargs="?", default="", metavar="WHICH", help="of remove: a key's id, or its name")
    parser.add_argument("--file", default="keys.yaml", metavar="FILE", help="the keys file (default keys.yaml)")
    parser.add_argument("--name", default="", metavar="NAME", help="of add: whose the key is")
    parser.add_argument("--scope", action="append", default=[], metavar="SCOPE", help="of add: may be repeated")
    parser.add_argument("--expires-days", type=int, metavar="N", help="of add: days until it ends (never)")
    parser.add_argument("--calls-per-s", type=float, metavar="N", help="of add: a rate limit of its own")


def run(arguments: argparse.Namespace) -> int:
    """Does what was asked for.

    Raises:
        ConfigError: An argument is wrong, or the file is.
    """
    path = Path(arguments.file)
    match arguments.action:
        case "add":
            return _add(path, arguments)
        case "remove":
            return _remove(path, arguments.which)
        case _:
            return _list(path)


def _add(path: Path, arguments: argparse.Namespace) -> int:
    from forno.server.security import keys  # noqa: PLC0415  (`--help` needs none of it)
    from forno.server.security.scopes import EXPECTED, Scopes  # noqa: PLC0415

    if arguments.which:
        raise ConfigError(f"keys add takes no {arguments.which!r}; did you mean --name {arguments.which}?")
    if not arguments.name:
        raise ConfigError("keys add takes --name NAME: whose key it is")
    if not arguments.scope:
        raise ConfigError(f"keys add takes at least one --scope: {EXPECTED}")
    more = {}
    if arguments.expires_days is not None:
        if arguments.expires_days < 1:
            raise ConfigError(f"--expires-days is {arguments.expires_days}; expected 1 or more")
        ends = dt.datetime.now(dt.UTC) + dt.timedelta(days=arguments.expires_days)
        more["expires"] = ends.strftime("%Y-%m-%dT%H:%M:%SZ")
    if arguments.calls_per_s is not None:
        if not 0 < arguments.calls_per_s <= 1e9:
            raise ConfigError(f"--calls-per-s is {arguments.calls_per_s:g}; expected more than 0")
        more["calls_per_s"] = arguments.calls_per_s
    try:
        Scopes(arguments.scope)
    except ValueError as error:
        raise ConfigError(f"--scope: {error}") from None
    key = keys.add(path, arguments.name, arguments.scope, **more)
    print(f"forno: {path} knows the key of {arguments.name} now; it is shown only here:", file=sys.stderr)
    print(key)
    return 0


def _remove(path: Path, which: str) -> int:
    from forno.server.security import keys  # noqa: PLC0415

    if not which:
        raise ConfigError("keys remove takes the id or the name of a key; forno keys list shows both")
    gone = keys.remove(path, which)
    for key_id in gone:
        print(f"removed {key_id}")
    if not gone:
        print(f"forno: {path} has no key {which!r}", file=sys.stderr)
    return 0 if gone else _FAILED


def _list(path: Path) -> int:
    from forno.server.security import keys  # noqa: PLC0415

    entries = keys.read(path)
    for key_id, entry in entries.items():
        until = f"until {entry.expires}" if entry.expires else "no end"
        print(f"{key_id}  {entry.name}  {until}  {' '.join(entry.scopes)}")
    if not entries:
        print(f"forno: {path} holds no keys", file=sys.stderr)
    return 0
