"""The `forno` command: finds the subcommand, and imports nothing else.

A command is a module with DESCRIPTION, EPILOG, `add_arguments(parser)` and `run(arguments) -> exit status`.
It is imported by its name when it is called: `forno --help` is quick, and `predict`, which belongs to the
client, runs without any of the server's dependencies. (Server and client do not import each other; this table
of names is the one place that knows both.)
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from forno.server.errors import ConfigError
from forno.server.spelling import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "serve": ("forno.server.cli.serve", "serve models over gRPC and REST"),
    "fleet": ("forno.server.cli.fleet", "look at replicas, change their number, replace them"),
    "check": ("forno.server.cli.check", "load models, and say what would be served and how"),
    "keys": ("forno.server.cli.keys", "make, list and remove API keys"),
    "predict": ("forno.client._command", "call a running server once"),
    "health": ("forno.client._health", "ask a running server whether it is ready"),
}
_EXTRAS = {"opentelemetry": "telemetry", "jwt": "security"}  # package -> the extra that brings it
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
_OVERVIEW = """\
usage: forno COMMAND ...

Forno serves trained models over gRPC and REST.

{commands}
  help [COMMAND]    this, or the help of a command
  help settings     every setting, with its unit and default

  forno --version

Environment: FORNO_SECTION__SETTING sets a setting; FORNO_DEBUG=1 shows where an error comes from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name.

    Args:
        arguments: The command line without the program; None = the process's own.

    Returns:
        Exit status: 0, 1 where the command failed, 2 where it was asked for something that cannot be.
    """
    # gRPC's own preparations for a fork go wrong now and then while it is busy, and what we start is another program.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        status = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # here, where a reader that has gone is no error; the interpreter's own would complain
        return status
    except ConfigError as error:
        return _fail(error, str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "forno":
            raise
        extra = _EXTRAS.get(error.name.partition(".")[0], "server")
        return _fail(error, f"{error.name} is not installed; install it with: pip install 'forno[{extra}]'")
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _dispatch(words: list[str]) -> int:
    match words:
        case [] | ["help" | "-h" | "--help"]:
            print(_overview())
            return 0 if words else EXIT_USAGE
        case ["--version" | "-V" | "version"]:
            print(f"forno {_version()}")
            return 0
        case ["help", "settings"]:
            print(importlib.import_module("forno.server.cli.reference").text())
            return 0
        case ["help", command]:
            return _run(command, ["--help"])
        case _:
            return _run(words[0], words[1:])


def _run(name: str, words: list[str]) -> int:
    if name not in COMMANDS:
        raise ConfigError(_unknown(name, words))
    command = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(
        f"forno {name}",
        description=command.DESCRIPTION,
        epilog=command.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return int(command.run(parser.parse_intermixed_args(words)))


def _unknown(name: str, words: list[str]) -> str:
    if Path(name).exists():
        return f"{name} is a path, expected a command; to serve it: forno serve {' '.join([name, *words])}"
    meant = nearest(name, [*COMMANDS, "help"])
    hint = f"did you mean `{meant}`?" if meant else f"there are {', '.join(COMMANDS)} and help"
    return f"{name!r} is not a command; {hint}"


def _overview() -> str:
    lines = [f"  {name:<16}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return _OVERVIEW.format(commands="\n".join(lines))


def _version() -> str:
    from importlib import metadata  # noqa: PLC0415  (20 ms that only `--version` needs)

    try:
        return metadata.version("forno")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _fail(error: Exception, text: str) -> int:
    if os.environ.get("FORNO_DEBUG", "") not in ("", "0"):
        raise error
    for line in text.splitlines():
        print(f"forno: {line}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
