"""What `serve` and `check` take alike: paths and settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from forno.server.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from forno.server.config import Config

_SETTINGS_SUFFIXES = (".yaml", ".yml")
_PATH_HELP = """\
a model file (x.onnx), a model folder (NAME/model.onnx or NAME/VERSION/model.onnx, with settings in
NAME/model.yaml if wanted), a folder of model folders, or a settings file (forno.yaml) that lists models"""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments to a command's parser."""
    parser.add_argument("paths", nargs="*", metavar="PATH", help=_PATH_HELP)
    parser.add_argument("--config", metavar="FILE", help="settings file; the same as giving it as a PATH")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="sets",
        help="one setting, such as models.spam.batching.max_rows=64; may be repeated; wins over file and "
        "environment (FORNO_MODELS__spam__BATCHING__MAX_ROWS=64). All of them: forno help settings",
    )


def resolve(arguments: argparse.Namespace, flags: Sequence[str] = ()) -> tuple[Config, list[Path]]:
    """The settings, and the paths that are models.

    Args:
        arguments: What was parsed.
        flags: Settings that have a flag of their own, such as server.address.

    Raises:
        ConfigError: There are two settings files, or a setting is wrong.
    """
    from forno.server.settings import Override, load, parse_set  # noqa: PLC0415  (`--help` needs none of it)

    paths = [Path(text) for text in arguments.paths]
    files = [path for path in paths if path.suffix in _SETTINGS_SUFFIXES]
    if arguments.config is not None:
        files.append(Path(arguments.config))
    if len(files) > 1:
        raise ConfigError(f"{files[0]} and {files[1]} are both settings files; expected one")
    overrides = [
        Override(tuple(key.split(".")), value, f"--{name.replace('_', '-')}")
        for key in flags
        if (value := getattr(arguments, name := key.partition(".")[2])) is not None
    ]
    overrides += [parse_set(text) for text in arguments.sets]
    config = load(files[0] if files else None, os.environ, overrides)
    return config, [path for path in paths if path not in files]
